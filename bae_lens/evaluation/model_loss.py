"""What a language model loses when dictionaries stand in for its activations: cross entropy and KL divergence."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss
from tqdm.auto import tqdm

from bae_lens.activations.cache import CachedActivations
from bae_lens.activations.contexts import PADDING
from bae_lens.saes.transcoder import hooks_of

Hooks = list[tuple[str, Callable[[Tensor, Any], Tensor | None]]]


@dataclass(frozen=True)
class LanguageModelLoss:
    """Of the model's predictions at tokens of content: cross entropy and divergence in nats per token."""

    n_tokens: int
    """Predictions that were scored."""
    clean: float
    """Cross entropy of the model as it is."""
    with_sae: float
    """Cross entropy with the dictionary's output instead of the activations at its output hook."""
    ablated: float
    """Cross entropy with zeros instead of them."""
    kl_with_sae: float
    """KL divergence from the clean predictions to those with the dictionary."""
    kl_ablated: float
    """KL divergence from the clean predictions to those with zeros."""

    @property
    def recovered(self) -> float:
        """Share of the cross entropy between `ablated` (0) and `clean` (1) that the dictionary recovers."""
        return (self.ablated - self.with_sae) / (self.ablated - self.clean)

    @property
    def kl_recovered(self) -> float:
        """Share of the divergence that zeros cause which the dictionary avoids."""
        return 1 - self.kl_with_sae / self.kl_ablated


class LossMeter:
    """Measures `LanguageModelLoss` on contexts spread evenly over cached ones.

    Only activations of content are replaced: special tokens, and those of outlier norm, which no dictionary was
    trained on, keep theirs. Raises ValueError if there is nothing to predict.
    """

    def __init__(self, model: Any, states: CachedActivations, n_contexts: int, batch_size: int = 8) -> None:
        self.model, self.batch_size = model, batch_size
        every = torch.linspace(0, len(states.contexts.tokens) - 1, n_contexts).long().unique()
        content = torch.zeros(states.contexts.tokens.numel(), dtype=torch.bool)
        content[states.content] = True
        self.tokens = states.contexts.tokens[every]
        self.content = content.view_as(states.contexts.tokens)[every]
        self.scored = self.content[:, :-1] & (self.tokens[:, 1:] != PADDING)
        if not self.scored.any():
            raise ValueError("no held-out token has a next one to predict; use a larger context_size or longer text")

    @torch.no_grad()
    def __call__(self, saes: Mapping[str, SAE[Any]]) -> dict[str, LanguageModelLoss]:
        """The loss with each dictionary, all of them against the same clean predictions, which are made once.

        Dictionaries take raw activations, at hook_z with the heads concatenated.
        """
        hooks_out = {name: hooks_of(sae)[1] for name, sae in saes.items()}
        clean = torch.zeros(2, dtype=torch.float64)
        ablated = {hook_name: clean.clone() for hook_name in hooks_out.values()}
        spliced = {name: clean.clone() for name in saes}
        batches = [part.split(self.batch_size) for part in (self.tokens, self.content, self.scored)]
        progress = tqdm(zip(*batches, strict=True), "loss with each dictionary", len(batches[0]), unit="batch")
        for tokens, content, scored in progress:
            reference = self._predictions(tokens, [])
            clean += _losses(reference, reference, tokens, scored)
            for hook_name, total in ablated.items():
                total += _losses(self._predictions(tokens, _zeros(hook_name, content)), reference, tokens, scored)
            for name, total in spliced.items():
                total += _losses(self._predictions(tokens, _stand_in(saes[name], content)), reference, tokens, scored)
        n = int(self.scored.sum())
        return {
            name: LanguageModelLoss(
                n_tokens=n,
                clean=clean[0].item() / n,
                with_sae=spliced[name][0].item() / n,
                ablated=ablated[hook_name][0].item() / n,
                kl_with_sae=spliced[name][1].item() / n,
                kl_ablated=ablated[hook_name][1].item() / n,
            )
            for name, hook_name in hooks_out.items()
        }

    def _predictions(self, tokens: Int[Tensor, "n position"], hooks: Hooks) -> Float[Tensor, "n position d_vocab"]:
        """Log-probabilities of the next token."""
        logits = self.model.run_with_hooks(
            tokens.clamp(min=0).to(self.model.cfg.device), return_type="logits", prepend_bos=False, fwd_hooks=hooks
        )
        return logits.float().log_softmax(-1)


def _zeros(hook_name: str, content: Bool[Tensor, "n position"]) -> Hooks:
    return [(hook_name, lambda activations, hook: _replaced(activations, torch.zeros_like(activations), content))]  # noqa: ARG005


def _stand_in(sae: SAE[Any], content: Bool[Tensor, "n position"]) -> Hooks:
    """Hooks that put a dictionary's output in the place of the activations at its output hook."""
    captured: list[Tensor] = []

    def capture(activations: Tensor, hook: Any) -> None:  # noqa: ARG001
        captured.append(activations.flatten(2))

    def splice(activations: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        sae_out = sae(captured.pop().to(sae.device, sae.dtype))
        return _replaced(activations, sae_out.to(activations).view_as(activations), content)

    hook_name, hook_name_out = hooks_of(sae)
    return [(hook_name, capture), (hook_name_out, splice)]


def _replaced(activations: Tensor, new: Tensor, content: Bool[Tensor, "n position"]) -> Tensor:
    where = content.to(activations.device).view(*content.shape, *[1] * (activations.ndim - 2))
    return torch.where(where, new, activations)


def _losses(
    predicted: Float[Tensor, "n position d_vocab"],
    reference: Float[Tensor, "n position d_vocab"],
    tokens: Int[Tensor, "n position"],
    scored: Bool[Tensor, "n position-1"],
) -> Float[Tensor, " 2"]:
    """Cross entropy of the next tokens and KL divergence from `reference`, in nats, summed over scored positions."""
    scored = scored.to(predicted.device)
    predicted, reference = predicted[:, :-1][scored], reference[:, :-1][scored]
    following = tokens[:, 1:].to(predicted.device)[scored]
    cross_entropy = nll_loss(predicted, following, reduction="sum")
    divergence = kl_div(predicted, reference, reduction="sum", log_target=True)
    return torch.stack([cross_entropy, divergence]).double().cpu()
