"""What a language model loses when dictionaries stand in for its activations: cross entropy and KL divergence."""

import math
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
from bae_lens.evaluation.hooking import Captured, replaced, resolved_hooks

TOKENS_PER_PASS = 1024  # of the model, or a single context: its logits are the largest thing here
LOGITS_AT_A_TIME = 2**24  # of which probabilities are made, apart from those that the model gives

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
        """Share of the cross entropy between `ablated` (0) and `clean` (1) that the dictionary recovers.

        NaN where zeros make no difference.
        """
        lost = self.ablated - self.clean
        return (self.ablated - self.with_sae) / lost if lost else math.nan

    @property
    def kl_recovered(self) -> float:
        """Share of the divergence that zeros cause which the dictionary avoids; NaN where they cause none."""
        return 1 - self.kl_with_sae / self.kl_ablated if self.kl_ablated else math.nan


class LossMeter:
    """Measures `LanguageModelLoss` on contexts spread evenly over cached ones.

    Only activations of content are replaced: special tokens, and those of outlier norm, which no dictionary was
    trained on, keep theirs. Memory is that of the logits of two passes, each of about a thousand tokens or of one
    context. Raises ValueError if there is nothing to predict.
    """

    def __init__(self, model: Any, states: CachedActivations, n_contexts: int) -> None:
        self.model = model
        self.batch_size = max(1, TOKENS_PER_PASS // states.contexts.tokens.shape[1])  # contexts
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

        Dictionaries take raw activations. Raises ValueError for hooks that the model does not have, and for a
        transcoder that reads after it writes.
        """
        hooks_out = {name: resolved_hooks(self.model, sae)[1] for name, sae in saes.items()}
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
                total += _losses(
                    self._predictions(tokens, self._stand_in(saes[name], content)), reference, tokens, scored
                )
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
        """Logits of the next token."""
        return self.model.run_with_hooks(
            tokens.clamp(min=0).to(self.model.cfg.device), return_type="logits", prepend_bos=False, fwd_hooks=hooks
        )

    def _stand_in(self, sae: SAE[Any], content: Bool[Tensor, "n position"]) -> Hooks:
        """Hooks that put a dictionary's output in the place of the activations at its output hook."""
        read = Captured(sae)

        def stand_in(activations: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            return replaced(activations, sae(read.take()), content)

        hook_name, hook_name_out = resolved_hooks(self.model, sae)
        return [(hook_name, read.capture), (hook_name_out, stand_in)]


def _zeros(hook_name: str, content: Bool[Tensor, "n position"]) -> Hooks:
    return [(hook_name, lambda activations, hook: replaced(activations, torch.zeros_like(activations), content))]  # noqa: ARG005


def _losses(
    predicted: Float[Tensor, "n position d_vocab"],
    reference: Float[Tensor, "n position d_vocab"],
    tokens: Int[Tensor, "n position"],
    scored: Bool[Tensor, "n position-1"],
) -> Float[Tensor, " 2"]:
    """Cross entropy of the next tokens and KL divergence from `reference`, in nats, summed over scored positions.

    Both are given by their logits.
    """
    total = torch.zeros(2, dtype=torch.float64)
    for rows in scored.nonzero().split(max(1, LOGITS_AT_A_TIME // predicted.shape[-1])):
        context, position = rows.unbind(1)
        following = tokens[context, position + 1].to(predicted.device)
        log_p, log_q = (logits[context, position].float().log_softmax(-1) for logits in (predicted, reference))
        cross_entropy = nll_loss(log_p, following, reduction="sum")
        divergence = kl_div(log_p, log_q, reduction="sum", log_target=True)
        total += torch.stack([cross_entropy, divergence]).double().cpu()
    return total
