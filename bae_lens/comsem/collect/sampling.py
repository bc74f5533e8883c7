"""Which tokens of a corpus are shown and asked of each feature of a dictionary."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import compress

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bae_lens.comsem.collect.background import kept_apart
from bae_lens.comsem.collect.corpus import ContextStore
from bae_lens.comsem.collect.instances import Excerpt, FeatureInstances, Instance
from bae_lens.comsem.collect.reservoirs import Reservoirs, SampledToken, TokenPool, first_of_each
from bae_lens.functional.strength import INSTANCES_TO_COUNT, count_instances

SPARE = 8  # instances kept beyond those needed, in case a sentence occurs several times in the corpus
POOL_SIZE = 1024  # tokens from which controls are matched
REACH = 31  # tokens on either side within which an instance's other firing tokens are remembered, as bits of an int64
ALONE = 1 << REACH  # these bits for a token by itself


@dataclass(frozen=True)
class SamplingSettings:
    """How instances are sampled."""

    examples: int = 5
    """Instances from which a feature is explained (m in the paper)."""
    held_out: int = 8
    """Other instances that are judged, at most."""
    in_corpus_order: bool = False
    """The first instances in the corpus (the paper's), rather than a seeded sample with no sentence twice."""
    max_features: int | None = 256
    """Features scored per dictionary, a seeded sample; None for all that have enough instances."""
    features: tuple[int, ...] = ()
    """Score these, of each dictionary, instead of a sample."""
    match_firing_rates: bool = False
    """Draw samples in which all dictionaries' features fire equally often, so far as these have such."""
    seed: int = 0
    """Of the sample."""
    excerpts: bool = False
    """Whether to keep how strongly features fire on the tokens near what is judged."""
    leave_nothing_out: bool = False
    """The authors' rules: outlier tokens count like others, and every token activates ten features, however weak."""
    rescale: bool = False
    """Whether the strength of a real activation is `rescaled_activations` over the corpus."""


@dataclass(frozen=True)
class TokenRows:
    """Where the tokens of content of a batch are, a row each."""

    place: Int[Tensor, " n"]
    """Of the context, in the store."""
    position: Int[Tensor, " n"]
    """In the context."""
    token: Int[Tensor, " n"]
    """Token id."""
    sentence: Int[Tensor, " n"]
    """Number of the sentence in the corpus, rising."""
    index: Int[Tensor, " n"]
    """Number of the token in the corpus, rising."""
    text: Int[Tensor, " n"]
    """Hash of the sentence's text, which may occur several times."""

    def sampled(self, row: Int[Tensor, " m"], nearby: Int[Tensor, " m"] | None = None) -> Int[Tensor, "m 5"]:
        """Some of them in the columns of `SampledToken`; without `nearby`, each by itself."""
        nearby = torch.full_like(row, ALONE) if nearby is None else nearby
        columns = (self.place, self.position, self.token, self.text)
        return torch.stack([*(column[row] for column in columns), nearby], 1)

    def stack(self) -> Int[Tensor, "6 n"]:
        """All in one tensor."""
        return torch.stack([getattr(self, field.name) for field in fields(self)])

    @classmethod
    def unstack(cls, stacked: Int[Tensor, "6 n"]) -> "TokenRows":
        """From what `stack` gave."""
        return cls(*stacked)


@dataclass(frozen=True)
class CollectedDictionary:
    """What a corpus gave for one dictionary."""

    d_sae: int
    """Features that it has."""
    feature_activated: int
    """Features activated by at least 8 tokens (Table 1)."""
    scoreable: int
    """Features with instances to explain them and at least one to judge."""
    never_fire: int
    """Features that fire on none of the tokens."""
    left_out: list[int]
    """Features that were asked for and are not scoreable."""
    features: list[FeatureInstances]
    """The scoreable ones, or those of them that were chosen."""
    random_features: list[FeatureInstances]
    """Tokens drawn at random, in the place of features: what a dictionary must beat."""


@dataclass(frozen=True)
class Collection:
    """What a corpus gave."""

    n_documents: int
    """Documents of the corpus."""
    n_contexts: int
    """Contexts that they were cut into."""
    n_sentences: int
    """A sentence cut in two by the end of a context counts twice."""
    n_tokens: int
    """Tokens of content."""
    dictionaries: dict[str, CollectedDictionary]
    """By name."""
    background: list[Instance]
    """Ordinary tokens, from sentences of which nothing is asked."""


class FeatureSampler:
    """Samples the instances of one dictionary's features from a stream of tokens, in memory that does not grow.

    What is asked stands in none of the sentences that are kept apart as background, except in corpus order, where the
    first instances are the first. `shown` holds the hashes of the sentences that came to be shown, `held_out` where the
    held-out instances of each feature are.
    """

    def __init__(self, d_sae: int, settings: SamplingSettings) -> None:
        self.d_sae, self.settings = d_sae, settings
        self.n_instances = torch.zeros(d_sae, dtype=torch.int64)
        self.n_fired = torch.zeros(d_sae, dtype=torch.int64)
        self.reservoirs = Reservoirs(d_sae, settings.examples + settings.held_out + SPARE)
        self.pool = TokenPool(POOL_SIZE, d_sae)
        self.shown: set[int] = set()
        self.held_out: dict[int, list[SampledToken]] = {}
        self._instance_keys = torch.Generator().manual_seed(settings.seed)
        self._pool_keys = torch.Generator().manual_seed(settings.seed)  # the same pool for every dictionary

    def add(self, rows: TokenRows, activated: Int[Tensor, "n k"], fires: Bool[Tensor, "n d_sae"]) -> None:
        """Takes a batch of tokens, with the features that each activates (-1 for none) and those that fire."""
        if len(rows.index) == 0:
            return
        self.n_instances += count_instances(activated, self.d_sae)
        self.n_fired += fires.sum(0)
        self._add_instances(rows, activated, fires)
        self._add_to_pool(rows, fires)

    def _add_instances(self, rows: TokenRows, activated: Int[Tensor, "n k"], fires: Bool[Tensor, "n d_sae"]) -> None:
        activated = activated.sort(1).values  # so that equal codes draw equal keys, whatever the order of strength
        taken = activated >= 0
        if not self.settings.in_corpus_order:
            taken &= ~kept_apart(rows.text)[:, None]
        row, column = taken.nonzero().unbind(1)
        feature = activated[row, column]
        if self.settings.in_corpus_order:
            key = rows.index[row].double()
        else:
            key = torch.rand(len(row), generator=self._instance_keys, dtype=torch.float64)
            local = rows.sentence[row] - rows.sentence.min()
            one_a_sentence = first_of_each(feature * (local.max() + 1) + local, key) if len(row) else row
            row, feature, key = row[one_a_sentence], feature[one_a_sentence], key[one_a_sentence]
        self.reservoirs.add(feature, key, rows.sampled(row, _firing_nearby(rows, fires, row, feature)))

    def _add_to_pool(self, rows: TokenRows, fires: Bool[Tensor, "n d_sae"]) -> None:
        key = torch.rand(len(rows.index), generator=self._pool_keys, dtype=torch.float64)
        chosen = first_of_each(rows.sentence, key)
        chosen = chosen[~kept_apart(rows.text[chosen])]
        sentences, number = rows.sentence.unique(return_inverse=True)
        anywhere = torch.zeros(len(sentences), self.d_sae).index_add_(0, number, fires.float()) > 0
        self.pool.add(key[chosen], rows.sampled(chosen), anywhere[number[chosen]])

    def scoreable(self) -> list[int]:
        """Features with instances to explain them and at least one to judge, in seeded order."""
        examples = self.settings.examples
        enough = (self.reservoirs.sizes() > examples).nonzero().flatten()
        order = torch.randperm(len(enough), generator=torch.Generator().manual_seed(self.settings.seed))
        return [feature for feature in enough[order].tolist() if len(self._usable(feature)) > examples]

    def finish(
        self,
        chosen: list[int],
        scoreable: list[int],
        store: ContextStore,
        token_counts: Int[Tensor, " vocabulary"],
        n_tokens: int,
    ) -> CollectedDictionary:
        """Reads the sampled instances of the features that were chosen of the scoreable ones."""
        features = []
        for feature in sorted(chosen):
            items, candidates = self._usable(feature), self.pool.silent(feature)
            rate, count = self.n_fired[feature].item() / n_tokens, int(self.n_instances[feature])
            self.held_out[feature] = items[self.settings.examples :]
            features.append(self._feature(store, feature, rate, count, items, candidates, token_counts))
        return CollectedDictionary(
            d_sae=self.d_sae,
            feature_activated=int((self.n_instances >= INSTANCES_TO_COUNT).sum()),
            scoreable=len(scoreable),
            never_fire=int((self.n_fired == 0).sum()),
            left_out=sorted(set(self.settings.features) - set(scoreable)),
            features=features,
            random_features=self._random_features(store, token_counts),
        )

    def _usable(self, feature: int) -> list[SampledToken]:
        """A feature's tokens, at most as many as are shown; with no sentence twice unless in corpus order."""
        items = self.reservoirs.of(feature)
        if not self.settings.in_corpus_order:
            items = list({item.text: item for item in reversed(items)}.values())[::-1]
        return items[: self.settings.examples + self.settings.held_out]

    def _feature(
        self,
        store: ContextStore,
        feature: int,
        rate: float,
        n_instances: int,
        items: list[SampledToken],
        candidates: Int[Tensor, " n"],
        token_counts: Int[Tensor, " vocabulary"],
    ) -> FeatureInstances:
        examples = [read_instance(store, item) for item in items]
        self.shown.update(item.text for item in items)
        m = self.settings.examples
        _, position, token, *_ = torch.tensor(items[m:]).unbind(1)
        shown = {instance.sentence for instance in examples}
        matched = self.pool.matched(candidates, token, position, token_counts)
        n_highlights = [len(instance.highlights) for instance in examples[m:]]
        rng = random.Random(f"{self.settings.seed} {feature}")
        silent = self.pool.tokens(matched)
        controls = [read_control(store, item, n, rng) for item, n in zip(silent, n_highlights, strict=False)]
        usable = [instance.sentence not in shown for instance in controls]
        controls = list(compress(controls, usable))
        excerpts: list[Excerpt] = []
        if self.settings.excerpts:
            excerpts = [read_excerpt(store, item, nearby_positions(item)) for item in items[m:]]
            excerpts += [read_excerpt(store, item, []) for item in compress(silent, usable)]
        return FeatureInstances(feature, rate, n_instances, examples[:m], examples[m:], controls, excerpts)

    def _random_features(
        self, store: ContextStore, token_counts: Int[Tensor, " vocabulary"], n: int = 32
    ) -> list[FeatureInstances]:
        """Up to n disjoint sets of tokens of the pool, with half of it left for controls."""
        order = torch.randperm(len(self.pool.items), generator=torch.Generator().manual_seed(self.settings.seed))
        size = self.settings.examples + self.settings.held_out
        drawn, rest = order[: len(order) // 2], order[len(order) // 2 :]
        features = []
        for number, members in enumerate(drawn.split(size)[:n]):
            if len(members) == size:
                items = self.pool.tokens(members)
                features.append(self._feature(store, number, 0.0, size, items, rest, token_counts))
        return features


def _firing_nearby(
    rows: TokenRows, fires: Bool[Tensor, "n d_sae"], row: Int[Tensor, " m"], feature: Int[Tensor, " m"]
) -> Int[Tensor, " m"]:
    """On which tokens within `REACH` of each instance, in the same sentence, its feature fires; bit REACH is itself."""
    bits = torch.full((len(row),), ALONE)
    for offset in range(-REACH, REACH + 1):
        other = (row + offset).clamp(0, max(0, len(rows.index) - 1))
        # Rows of one context are in order, but tokens that are no content are missing between them.
        distance = rows.position[other] - rows.position[row]
        near = (rows.sentence[other] == rows.sentence[row]) & (distance.abs() <= REACH) & (distance * offset >= 0)
        bits |= (near & fires[other, feature]).long() << (distance.clamp(-REACH, REACH) + REACH)
    return bits


def nearby_positions(item: SampledToken) -> list[int]:
    """Positions of the tokens that the bits of `SampledToken.nearby` stand for."""
    return [item.position + bit - REACH for bit in range(2 * REACH + 1) if item.nearby >> bit & 1]


def read_instance(store: ContextStore, item: SampledToken) -> Instance:
    """A token on which a feature fires, with the others of its sentence on which it does highlighted."""
    return store.read(item.place).instance(item.position, nearby_positions(item))


def read_excerpt(store: ContextStore, item: SampledToken, fired: Iterable[int]) -> Excerpt:
    """The tokens within `REACH` of a token in its sentence; 1 at the positions where its feature fired."""
    return store.read(item.place).excerpt(item.position, REACH, dict.fromkeys(fired, 1.0))


def read_control(store: ContextStore, item: SampledToken, n_highlights: int, rng: random.Random) -> Instance:
    """A token on which a feature does not fire, with as many others of its sentence highlighted, drawn at random."""
    context = store.read(item.place)
    others = [other for other in context.nearby(item.position, len(context.tokens)) if other != item.position]
    drawn = rng.sample(others, max(0, min(n_highlights - 1, len(others))))
    return context.instance(item.position, [item.position, *drawn])
