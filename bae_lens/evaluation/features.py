"""Features to look at: the tokens or vectors that drive them, what they resemble, and what they make a model say."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from torch.nn.functional import normalize

from bae_lens.activations.cache import CachedActivations
from bae_lens.activations.contexts import PADDING
from bae_lens.activations.vectors import Vectors
from bae_lens.evaluation.logit_path import direct_logits, writes_to_residual_stream
from bae_lens.functional.strength import INSTANCES_TO_COUNT
from bae_lens.saes.bae import BAE
from bae_lens.saes.transcoder import hooks_of

NEIGHBORS = 5
TOP_TOKENS = 8


@dataclass(frozen=True)
class TokenInContext:
    """A token that a feature fires on, with its neighbors."""

    before: str
    """Text before the token."""
    token: str
    after: str
    """Text after it."""
    activation: float
    """Feature activation; for a BAE the pre-activation, which orders tokens whose bits are all the same."""


@dataclass(frozen=True)
class Neighbor:
    """Another feature that writes in nearly the same direction."""

    feature: int
    cosine: float
    """Of the decoder rows."""


@dataclass(frozen=True)
class FeatureDashboard:
    """A feature, the tokens on which it is strongest, strongest first, and where it points."""

    feature: int
    firing_rate: float
    """Share of tokens on which it fires."""
    examples: list[TokenInContext]
    """Strongest first, one per context."""
    neighbors: list[Neighbor]
    """Those of largest cosine first."""
    top_tokens: list[str]
    """Tokens whose logits the feature's decoder row raises most (`direct_logits`); empty where the row is no direction
    of the residual stream."""


def feature_dashboards(
    sae: SAE[Any],
    activations: CachedActivations,
    model: Any,
    firing_rates: list[float],
    n_features: int = 100,
    n_examples: int = 8,
    window: int = 12,
    seed: int = 0,
) -> list[FeatureDashboard]:
    """Dashboards of a random sample of the features that fire on at least 8 tokens, with examples from `activations`.

    Examples are the strongest tokens, one per context, with `window` tokens shown on either side. `activations` are
    those at the dictionary's input hook.
    """
    context = activations.content // activations.contexts.tokens.shape[1]

    def shown(row: int, activation: float) -> TokenInContext:
        return _token_in_context(activations, model.tokenizer, row, activation, window)

    return _dashboards(
        sae,
        activations,
        firing_rates,
        (n_features, n_examples, seed),
        context,
        shown,
        lambda directions: _top_tokens(directions, model, hooks_of(sae)[1]),
    )


def vector_dashboards(
    sae: SAE[Any],
    activations: CachedActivations,
    vectors: Vectors,
    firing_rates: list[float],
    n_features: int = 100,
    n_examples: int = 8,
    seed: int = 0,
) -> list[FeatureDashboard]:
    """The same of a dictionary of vectors, with examples from those in `activations`: their labels and rows.

    Examples are the strongest vectors, if documents were named one of each.
    """
    document = activations.contexts.document if vectors.has_documents else activations.contexts.tokens.flatten()

    def shown(row: int, activation: float) -> TokenInContext:
        own = int(activations.contexts.tokens[row])
        name, label = vectors.row_name(own), vectors.label(own)
        return TokenInContext("", name if label is None else label, "" if label is None else f" ({name})", activation)

    return _dashboards(
        sae,
        activations,
        firing_rates,
        (n_features, n_examples, seed),
        document[activations.content],
        shown,
        lambda directions: [[] for _ in directions],
    )


@torch.no_grad()
def _dashboards(
    sae: SAE[Any],
    activations: CachedActivations,
    firing_rates: list[float],
    sample: tuple[int, int, int],
    unit: Int[Tensor, " n_content"],
    shown: Callable[[int, float], TokenInContext],
    top_tokens: Callable[[Float[Tensor, "n d_out"]], list[list[str]]],
) -> list[FeatureDashboard]:
    """`sample` is how many features, how many examples of each, one per `unit`, and the seed of the choice."""
    n_features, n_examples, seed = sample
    rate = torch.tensor(firing_rates)
    candidates = (rate * len(activations.content) > INSTANCES_TO_COUNT - 0.5).nonzero().flatten()
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    features = candidates[order[:n_features]].sort().values
    graded = sae.to_graded_sae() if isinstance(sae, BAE) else sae
    strengths = torch.cat(
        [graded.encode(x.to(sae.device, sae.dtype))[:, features].float().cpu() for x in activations.batches(2048)]
    )
    neighbors = _neighbors(sae.W_dec, features.to(sae.device))
    tokens = top_tokens(sae.W_dec[features.to(sae.device)])
    return [
        FeatureDashboard(
            int(feature),
            firing_rates[int(feature)],
            [
                shown(int(activations.content[row]), strengths[row, column].item())
                for row in _strongest(strengths[:, column], unit, n_examples)
            ],
            neighbors[column],
            tokens[column],
        )
        for column, feature in enumerate(features)
    ]


def _neighbors(W_dec: Float[Tensor, "d_sae d_out"], features: Int[Tensor, " n"]) -> list[list[Neighbor]]:
    directions = normalize(W_dec.float(), dim=-1)
    cosines = directions[features] @ directions.T
    cosines[torch.arange(len(features)), features] = -torch.inf
    top = cosines.topk(min(NEIGHBORS, len(W_dec) - 1), dim=-1)
    return [
        [Neighbor(int(index), cosine.item()) for index, cosine in zip(indices, values, strict=True)]
        for indices, values in zip(top.indices.cpu(), top.values.cpu(), strict=True)
    ]


def _top_tokens(directions: Float[Tensor, "n d_out"], model: Any, hook_name_out: str) -> list[list[str]]:
    if getattr(model, "W_U", None) is None or not writes_to_residual_stream(model, hook_name_out):
        return [[] for _ in directions]
    top = direct_logits(model, directions).topk(TOP_TOKENS).indices
    return [[model.tokenizer.decode([token]) for token in row] for row in top.tolist()]


def _strongest(activation: Float[Tensor, " n"], unit: Int[Tensor, " n"], n: int) -> list[int]:
    """The strongest rows that fire, strongest first, one per unit."""
    rows: dict[int, int] = {}
    for row in activation.argsort(descending=True).tolist():
        if len(rows) == n or activation[row] <= 0:
            break
        rows.setdefault(int(unit[row]), row)
    return list(rows.values())


def _token_in_context(
    activations: CachedActivations, tokenizer: Any, index: int, activation: float, window: int
) -> TokenInContext:
    context, position = divmod(index, activations.contexts.tokens.shape[1])
    tokens = activations.contexts.tokens[context]
    tokens = tokens[tokens != PADDING].tolist()
    before = tokenizer.decode(tokens[max(0, position - window) : position], skip_special_tokens=True)
    after = tokenizer.decode(tokens[position + 1 : position + 1 + window], skip_special_tokens=True)
    return TokenInContext(before, tokenizer.decode([tokens[position]]), after, activation)
