"""What a dictionary does to hidden states it has not seen: quality, rate, firing, and the tokens of its features."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from bae_lens.activation import INSTANCES_TO_COUNT, burstiness, count_instances, strongest_features
from bae_lens.bae import BAE
from bae_lens.contexts import PADDING
from bae_lens.harvest import HiddenStates
from bae_lens.losses import marginal_entropy

DENSE_RATE = 0.1  # a feature on, and off, for more than this share of the tokens is dense


@dataclass(frozen=True)
class DictionaryMetrics:
    """Measured on held-out hidden states; see each field. L0, bits and counts refer to which features fire."""

    n_tokens: int
    """Hidden states measured."""
    explained_variance: float
    """1 minus squared error over squared distance to the mean; 1 is perfect, 0 is no better than the mean."""
    l0: float
    """Features that fire per token, in the mean."""
    informative_l0: float
    """Features per token that differ from what they do most of the time; equals L0 if all features are rare."""
    support_bits: float
    """Sum of the Bernoulli entropies of the firing rates: an upper bound, in bits per token, on what is needed to say
    which features fire. All there is to say for a BAE; the values of other dictionaries cost more."""
    never_on: int
    """Features that fired for no token."""
    always_on: int
    """Features that fired for every token."""
    dense: int
    """Features that fire on over 10 % of the tokens and stay off on over 10 %."""
    feature_activated: int
    """Features among the 10 strongest of at least 8 tokens (Table 1), not counting strengths that say nothing."""
    firing_rates: list[float]
    """Share of the tokens on which each feature fires, (d_sae,)."""


@torch.no_grad()
def evaluate_dictionary(
    sae: SAE[Any], activations: Float[Tensor, "n d_in"], batch_size: int = 2048
) -> DictionaryMetrics:
    """Measures a dictionary on raw hidden states, accumulating in float64.

    A BAE's prior is set to its firing rates on them first, because strength is relative to the analysed set.
    Raises ValueError if there are no hidden states.
    """
    n = len(activations)
    if n == 0:
        raise ValueError("there are no hidden states to evaluate on")
    if isinstance(sae, BAE):
        sae.estimate_prior(activations.split(batch_size))
    error = squares = torch.zeros((), dtype=torch.float64)
    total = torch.zeros(sae.cfg.d_in, dtype=torch.float64)
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.float64)
    instances = torch.zeros(sae.cfg.d_sae, dtype=torch.int64)
    for batch in activations.split(batch_size):
        x = batch.to(sae.device, sae.dtype)
        feature_acts = sae.encode(x)
        error = error + (sae.decode(feature_acts) - x).double().square().sum().cpu()
        squares = squares + x.double().square().sum().cpu()
        total += x.double().sum(0).cpu()
        fired += (feature_acts != 0).sum(0).cpu()
        instances += count_instances(activated_features(sae, feature_acts), sae.cfg.d_sae).cpu()
    rate = fired / n
    rare_side = torch.minimum(rate, 1 - rate)
    return DictionaryMetrics(
        n_tokens=n,
        explained_variance=(1 - error / (squares - total.square().sum() / n)).item(),
        l0=rate.sum().item(),
        informative_l0=rare_side.sum().item(),
        support_bits=marginal_entropy(rate).item(),
        never_on=int((rate == 0).sum()),
        always_on=int((rate == 1).sum()),
        dense=int((rare_side > DENSE_RATE).sum()),
        feature_activated=int((instances >= INSTANCES_TO_COUNT).sum()),
        firing_rates=rate.tolist(),
    )


def activated_features(sae: SAE[Any], feature_acts: Float[Tensor, "*batch d_sae"]) -> Int[Tensor, "*batch k"]:
    """Indices of the 10 strongest features of each token, by burstiness for a BAE and by activation for the others."""
    if isinstance(sae, BAE):
        return strongest_features(burstiness(feature_acts, sae.prior))
    return strongest_features(feature_acts, floor=0.0)


@dataclass(frozen=True)
class LanguageModelLoss:
    """Cross entropy of the model's predictions at tokens of content, in nats per token."""

    n_tokens: int
    clean: float
    """Of the model as it is."""
    with_sae: float
    """With the dictionary's reconstructions instead of the hidden states."""
    ablated: float
    """With zeros instead of the hidden states."""
    recovered: float
    """Share of the loss between `ablated` (0) and `clean` (1) that the reconstructions recover."""


class LossMeter:
    """Measures `LanguageModelLoss` on contexts spread evenly over harvested ones.

    Only hidden states of content are replaced: special tokens, and those of massive norm, which no dictionary was
    trained on, keep theirs. Raises ValueError if there is nothing to predict.
    """

    def __init__(self, model: Any, states: HiddenStates, n_contexts: int, batch_size: int = 8) -> None:
        self.model, self.hook_name, self.batch_size = model, states.hook_name, batch_size
        every = torch.linspace(0, len(states.contexts.tokens) - 1, n_contexts).long().unique()
        content = torch.zeros(states.contexts.tokens.numel(), dtype=torch.bool)
        content[states.content] = True
        self.tokens = states.contexts.tokens[every]
        self.content = content.view_as(states.contexts.tokens)[every]
        self.scored = self.content[:, :-1] & (self.tokens[:, 1:] != PADDING)
        if not self.scored.any():
            raise ValueError("no held-out token has a next one to predict; use a larger context_size or longer text")

    def __call__(self, sae: SAE[Any]) -> LanguageModelLoss:
        """For a dictionary that takes raw hidden states, at hook_z with the heads concatenated."""
        with_sae = self._loss(lambda x: sae(x.to(sae.device, sae.dtype)).to(x), "with the dictionary")
        recovered = (self.ablated - with_sae) / (self.ablated - self.clean)
        return LanguageModelLoss(int(self.scored.sum()), self.clean, with_sae, self.ablated, recovered)

    @cached_property
    def clean(self) -> float:
        """Loss of the model as it is."""
        return self._loss(lambda x: x, "of the model")

    @cached_property
    def ablated(self) -> float:
        """Loss with zeros instead of the hidden states."""
        return self._loss(torch.zeros_like, "without the hidden states")

    @torch.no_grad()
    def _loss(self, replacement: Callable[[Tensor], Tensor], name: str) -> float:
        total = 0.0
        batches = [part.split(self.batch_size) for part in (self.tokens, self.content, self.scored)]
        for tokens, content, scored in tqdm(zip(*batches, strict=True), f"loss {name}", len(batches[0]), unit="batch"):

            def splice(activations: Tensor, hook: Any, content: Tensor = content) -> Tensor:  # noqa: ARG001
                flat = activations.flatten(2)
                new = torch.where(content[..., None].to(flat.device), replacement(flat), flat)
                return new.view_as(activations)

            losses = self.model.run_with_hooks(
                tokens.clamp(min=0).to(self.model.cfg.device),
                return_type="loss",
                loss_per_token=True,
                prepend_bos=False,
                fwd_hooks=[(self.hook_name, splice)],
            )
            total += losses.float().cpu()[scored].sum().item()
        return total / int(self.scored.sum())


@dataclass(frozen=True)
class TokenInContext:
    """A token that a feature fires on, with its neighbours."""

    before: str
    token: str
    after: str
    activation: float
    """Feature activation; for a BAE the pre-activation, which orders tokens whose bits are all the same."""


@dataclass(frozen=True)
class FeatureExamples:
    """A feature and the tokens on which it is strongest, strongest first."""

    feature: int
    firing_rate: float
    examples: list[TokenInContext]


@torch.no_grad()
def feature_examples(
    sae: SAE[Any],
    states: HiddenStates,
    tokenizer: Any,
    firing_rates: list[float],
    n_features: int = 12,
    n_examples: int = 8,
    window: int = 12,
    seed: int = 0,
) -> list[FeatureExamples]:
    """The strongest tokens, one per context, of a random sample of the features that fire on at least 8 tokens.

    `window` is the number of tokens shown on either side.
    """
    rate = torch.tensor(firing_rates)
    candidates = (rate * len(states.content) > INSTANCES_TO_COUNT - 0.5).nonzero().flatten()
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    features = candidates[order[:n_features]].sort().values
    graded = sae.to_graded_sae() if isinstance(sae, BAE) else sae
    activations = torch.cat(
        [graded.encode(x.to(sae.device, sae.dtype))[:, features].float().cpu() for x in states.batches(2048)]
    )
    return [
        FeatureExamples(
            int(feature),
            firing_rates[int(feature)],
            [
                _token_in_context(states, tokenizer, int(states.content[row]), activations[row, column].item(), window)
                for row in _strongest_per_context(states, activations[:, column], n_examples)
            ],
        )
        for column, feature in enumerate(features)
    ]


def _strongest_per_context(states: HiddenStates, activation: Float[Tensor, " n"], n: int) -> list[int]:
    context_size = states.contexts.tokens.shape[1]
    rows: dict[int, int] = {}
    for row in activation.argsort(descending=True).tolist():
        if len(rows) == n or activation[row] <= 0:
            break
        rows.setdefault(int(states.content[row]) // context_size, row)
    return list(rows.values())


def _token_in_context(
    states: HiddenStates, tokenizer: Any, index: int, activation: float, window: int
) -> TokenInContext:
    context, position = divmod(index, states.contexts.tokens.shape[1])
    tokens = states.contexts.tokens[context]
    tokens = tokens[tokens != PADDING].tolist()
    before = tokenizer.decode(tokens[max(0, position - window) : position], skip_special_tokens=True)
    after = tokenizer.decode(tokens[position + 1 : position + 1 + window], skip_special_tokens=True)
    return TokenInContext(before, tokenizer.decode([tokens[position]]), after, activation)
