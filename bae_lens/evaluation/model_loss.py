"""What a language model loses when dictionaries stand in for its activations: cross entropy and KL divergence."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss
from tqdm.auto import tqdm

from bae_lens.activations.cache import CachedActivations
from bae_lens.activations.contexts import PADDING
from bae_lens.activations.forward import start_layer
from bae_lens.distributed.connection import is_main_process
from bae_lens.distributed.exchange import gather_rows, shard
from bae_lens.evaluation.hooking import Captured, replaced, resolved_hooks

TOKENS_PER_PASS = 1024  # of the model, or a single context: its logits are the largest thing here
LOGITS_AT_A_TIME = 2**20  # of which probabilities are made, few enough to stay in a CPU's cache

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
    recovered_error: float | None = None
    """Standard error of `recovered`, over contexts; None for a single one."""

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
    trained on, keep theirs. Layers below all hooks are run once. Memory is that of the logits of two passes, each of
    about a thousand tokens or of one context. Raises ValueError if there is nothing to predict.
    """

    def __init__(self, model: Any, activations: CachedActivations, n_contexts: int) -> None:
        self.model = model
        self.batch_size = max(1, TOKENS_PER_PASS // activations.contexts.tokens.shape[1])  # contexts
        every = torch.linspace(0, len(activations.contexts.tokens) - 1, n_contexts).long().unique()
        content = torch.zeros(activations.contexts.tokens.numel(), dtype=torch.bool)
        content[activations.content] = True
        self.tokens = activations.contexts.tokens[every]
        self.content = content.view_as(activations.contexts.tokens)[every]
        self.scored = self.content[:, :-1] & (self.tokens[:, 1:] != PADDING)
        if not self.scored.any():
            raise ValueError("no held-out token has a next one to predict; use a larger context_size or longer text")

    @torch.no_grad()
    def __call__(self, saes: Mapping[str, SAE[Any]]) -> dict[str, LanguageModelLoss]:
        """The loss with each dictionary, all of them against the same clean predictions, which are made once.

        Several processes share the contexts. Dictionaries take raw activations. Raises ValueError for hooks that the
        model does not have, and for a transcoder that reads after it writes.
        """
        hooks = {name: resolved_hooks(self.model, sae) for name, sae in saes.items()}
        layer = start_layer(self.model, [hook_name for pair in hooks.values() for hook_name in pair])
        nothing = torch.zeros(0, 2, dtype=torch.float64)
        clean = [nothing]
        ablated = {hook_name_out: [nothing] for _, hook_name_out in hooks.values()}
        spliced = {name: [nothing] for name in saes}
        batches = [part.split(self.batch_size) for part in (self.tokens, self.content, self.scored)]
        own = shard(torch.arange(len(batches[0]))).tolist()
        for batch in tqdm(own, "loss with each dictionary", unit="batch", disable=not is_main_process()):
            tokens, content, scored = (part[batch] for part in batches)
            start, logits = self._clean_pass(tokens, layer)
            targets = _Targets.of(logits, tokens, scored)
            clean.append(targets.losses(logits))
            del logits
            for hook_name, losses in ablated.items():
                losses.append(targets.losses(self._predictions(start, _zeros(hook_name, content))))
            for name, losses in spliced.items():
                losses.append(targets.losses(self._predictions(start, self._stand_in(saes[name], content))))
        n_tokens, of_clean = int(self.scored.sum()), gather_rows(torch.cat(clean))
        of_ablated = {hook_name_out: gather_rows(torch.cat(parts)) for hook_name_out, parts in ablated.items()}
        of_spliced = {name: gather_rows(torch.cat(parts)) for name, parts in spliced.items()}
        return {
            name: _language_model_loss(n_tokens, of_clean, of_spliced[name], of_ablated[hook_name_out])
            for name, (_, hook_name_out) in hooks.items()
        }

    def _clean_pass(
        self, tokens: Int[Tensor, "n position"], layer: int | None
    ) -> tuple["_Start", Float[Tensor, "n position d_vocab"]]:
        """From where passes that differ from `layer` on can begin, and the predictions of the model as it is."""
        whole = _Start(tokens.clamp(min=0).to(self.model.cfg.device), None)
        if layer is None:
            return whole, self._predictions(whole, [])
        states: list[Tensor] = []
        hook_name = f"blocks.{layer}.hook_resid_pre"
        logits = self._predictions(whole, [(hook_name, lambda activations, hook: states.append(activations))])  # noqa: ARG005
        return _Start(states[0], layer), logits

    def _predictions(self, start: "_Start", hooks: Hooks) -> Float[Tensor, "n position d_vocab"]:
        """Logits of the next token. Raises ValueError if a hook was not reached, as none is that SAELens took over."""
        reached = set()

        def noted(hook_name: str, function: Any) -> tuple[str, Any]:
            def hooked(activations: Tensor, hook: Any) -> Tensor | None:
                reached.add(hook_name)
                return function(activations, hook)

            return hook_name, hooked

        logits = self.model.run_with_hooks(
            start.input,
            return_type="logits",
            prepend_bos=False,
            fwd_hooks=[noted(*hook) for hook in hooks],
            **({} if start.layer is None else {"start_at_layer": start.layer}),
        )
        for hook_name, _ in hooks:
            if hook_name not in reached:
                raise ValueError(
                    f"nothing can be put at {hook_name}, whose hook the model does not reach: load the model anew if "
                    "a dictionary was attached there before"
                )
        return logits

    def _stand_in(self, sae: SAE[Any], content: Bool[Tensor, "n position"]) -> Hooks:
        """Hooks that put a dictionary's output in the place of the activations at its output hook."""
        read = Captured(sae)

        def stand_in(activations: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            return replaced(activations, sae(read.take()), content)

        hook_name, hook_name_out = resolved_hooks(self.model, sae)
        return [(hook_name, read.capture), (hook_name_out, stand_in)]


def _zeros(hook_name: str, content: Bool[Tensor, "n position"]) -> Hooks:
    return [(hook_name, lambda activations, hook: replaced(activations, torch.zeros_like(activations), content))]  # noqa: ARG005


def _language_model_loss(
    n_tokens: int,
    clean: Float[Tensor, "n 2"],
    with_sae: Float[Tensor, "n 2"],
    ablated: Float[Tensor, "n 2"],
) -> LanguageModelLoss:
    """Of losses summed over each context."""
    (clean_loss, _), (loss, kl), (ablated_loss, ablated_kl) = (
        (part.sum(0) / n_tokens).tolist() for part in (clean, with_sae, ablated)
    )
    measured = LanguageModelLoss(n_tokens, clean_loss, loss, ablated_loss, kl, ablated_kl)
    return replace(measured, recovered_error=ratio_error((ablated - with_sae)[:, 0], (ablated - clean)[:, 0]))


def ratio_error(numerator: Float[Tensor, " n"], denominator: Float[Tensor, " n"]) -> float | None:
    """Standard error of `numerator.sum() / denominator.sum()` over independent pairs, to first order.

    None for fewer than two pairs or a denominator of 0.
    """
    n, total = len(numerator), denominator.sum()
    if n < 2 or total == 0:
        return None
    residual = numerator - numerator.sum() / total * denominator
    return (residual.square().sum() * n / (n - 1)).sqrt().item() / abs(total.item())


class _Start(NamedTuple):
    """Where a pass of the model begins."""

    input: Tensor
    """Tokens, or what enters a layer."""
    layer: int | None
    """Which; None for tokens."""


@dataclass(frozen=True)
class _Targets:
    """What predictions are held against, at the scored positions of a batch."""

    n_contexts: int
    context: Int[Tensor, " scored"]
    position: Int[Tensor, " scored"]
    following: Int[Tensor, " scored"]
    log_probabilities: Float[Tensor, "scored d_vocab"]
    """Of the model as it is."""

    @classmethod
    def of(
        cls,
        logits: Float[Tensor, "n position d_vocab"],
        tokens: Int[Tensor, "n position"],
        scored: Bool[Tensor, "n position-1"],
    ) -> "_Targets":
        context, position = scored.nonzero().unbind(1)
        following = tokens[context, position + 1].to(logits.device)
        log_probabilities = torch.empty(len(context), logits.shape[-1], device=logits.device)
        for rows in _parts(len(context), logits):
            log_probabilities[rows] = logits[context[rows], position[rows]].float().log_softmax(-1)
        return cls(len(tokens), context, position, following, log_probabilities)

    def losses(self, logits: Float[Tensor, "n position d_vocab"]) -> Float[Tensor, "n 2"]:
        """Cross entropy of the next tokens and KL divergence from the model as it is, in nats, summed by context."""
        total = torch.zeros(self.n_contexts, 2, dtype=torch.float64)
        for rows in _parts(len(self.context), logits):
            context, log_q = self.context[rows], self.log_probabilities[rows]
            log_p = logits[context, self.position[rows]].float().log_softmax(-1)
            cross_entropy = nll_loss(log_p, self.following[rows], reduction="none")
            divergence = kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
            total.index_add_(0, context, torch.stack([cross_entropy, divergence], dim=-1).double().cpu())
        return total


def _parts(n: int, logits: Float[Tensor, "n position d_vocab"]) -> tuple[Int[Tensor, " part"], ...]:
    """The numbers below `n`, so many at a time as have `LOGITS_AT_A_TIME` logits."""
    return torch.arange(n).split(max(1, LOGITS_AT_A_TIME // logits.shape[-1]))
