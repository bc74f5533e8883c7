"""SAELens' `run_evals`, right for transcoders and with what a binary code needs, on a live model."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import asdict, replace
from typing import Any

import torch
from sae_lens import SAE, ActivationsStore
from sae_lens import run_evals as saelens_run_evals
from torch import Tensor

from bae_lens.activations.forward import stop_layer
from bae_lens.activations.models import resolve_hook
from bae_lens.evaluation.hooking import Captured, resolved_hooks
from bae_lens.evaluation.metrics import CodeCounter, activated_features, firing_rates, rate_histogram
from bae_lens.saes.binary_code import is_binary
from bae_lens.saes.saelens_compat import ActivationScaler, EvalConfig, get_special_token_ids, heads_concatenated
from bae_lens.saes.skip import skip_output
from bae_lens.saes.transcoder import hooks_of


def run_evals(
    sae: SAE[Any],
    activation_store: ActivationsStore,
    model: Any,
    activation_scaler: ActivationScaler,
    eval_config: EvalConfig | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    exclude_special_tokens: Iterable[int] | bool = True,
    verbose: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """SAELens' `run_evals`, by the same arguments, for dictionaries of every kind, transcoders included.

    SAELens' own puts a transcoder's output back at the hook it reads from. Here it goes to its output hook, and every
    metric compares it with the activations there.

    Beside SAELens' groups the metrics have a group `"code"`: `CodeMetrics` except for the rates. Feature-wise metrics
    gain `firing_rate`, (d_sae,), and `firing_rate_histogram`, features by log10 of their rate between -5 and 0 in steps
    of 1/4, rarer ones in the first. All are left out if `n_eval_sparsity_variance_batches` is 0.
    Both are counted on the tokens of SAELens' sparsity metrics. A BAE's strength is relative to its firing rates on
    these tokens; its prior is left as it is. Weight-based metrics, which compare encoder with decoder, are left out for
    a transcoder.
    Raises ValueError as SAELens' does, for a transcoder with an activation scaler in force, and for one that reads
    after it writes.
    """
    eval_config = eval_config or EvalConfig()
    excluded: list[int] = []
    if exclude_special_tokens is not False:
        every = exclude_special_tokens is True
        excluded = list(get_special_token_ids(model.tokenizer) if every else exclude_special_tokens)
    shared = {"model_kwargs": model_kwargs or {}, "exclude_special_tokens": excluded or False}
    store: Any = _Recording(activation_store)
    per_token: Any = _PerToken(model)
    with heads_concatenated(sae), _at_output(sae, model, activation_scaler) as view:
        config = eval_config if view is sae else replace(eval_config, compute_featurewise_weight_based_metrics=False)
        metrics, feature_metrics = saelens_run_evals(
            view, store, per_token, activation_scaler, config, verbose=verbose, **shared
        )
    n, size = eval_config.n_eval_sparsity_variance_batches, eval_config.batch_size_prompts
    for_predictions = eval_config.compute_kl or eval_config.compute_ce_loss
    batches = store.batches[eval_config.n_eval_reconstruction_batches if for_predictions else 0 :]
    batches += [store.get_batch_tokens(size or store.store_batch_size_prompts) for _ in range(n - len(batches))]
    if n == 0:
        return metrics, feature_metrics
    code = _code_metrics(sae, model, batches, excluded, activation_scaler, model_kwargs or {})
    rates = code.pop("firing_rates")
    by_rate = {"firing_rate": rates, "firing_rate_histogram": rate_histogram(rates)}
    return {**metrics, "code": code}, {**feature_metrics, **by_rate}


@torch.no_grad()
def _code_metrics(
    sae: SAE[Any],
    model: Any,
    batches: list[Tensor],
    excluded: list[int],
    scaler: ActivationScaler,
    model_kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    hook_name = resolved_hooks(model, sae)[0]

    def codes() -> Iterator[Tensor]:
        for tokens in batches:
            _, cache = model.run_with_cache(
                tokens,
                names_filter=[hook_name],
                stop_at_layer=stop_layer([hook_name]),
                prepend_bos=False,
                **model_kwargs,
            )
            head = sae.cfg.metadata.hook_head_index
            x = cache[hook_name].flatten(2) if head is None else cache[hook_name][:, :, head]
            content = ~torch.isin(tokens, torch.tensor(excluded, device=tokens.device))
            feature_acts = sae.encode(scaler.scale(x[content.to(x.device)]).to(sae.device))
            yield feature_acts.to_dense() if feature_acts.is_sparse else feature_acts

    counter, prior = CodeCounter(sae), None
    with heads_concatenated(sae):
        if is_binary(sae):
            prior = firing_rates(codes())
        for feature_acts in codes():
            counter.add(feature_acts, activated_features(sae, feature_acts, prior))
    return asdict(counter.metrics())


@contextmanager
def _at_output(sae: SAE[Any], model: Any, scaler: ActivationScaler) -> Iterator[Any]:
    """The dictionary as SAELens' evals can take it: at its output hook, given the input of the same forward pass."""
    hook_name, hook_name_out = hooks_of(sae)
    if hook_name == hook_name_out:
        yield sae
        return
    if scaler.scaling_factor is not None or scaler.whitening is not None:
        raise ValueError("a transcoder's input and output have different scales; fold the activation scaler first")
    view = _AtOutput(sae, hook_name_out)
    hook_point = model.hook_dict[resolve_hook(model, hook_name)]
    before = list(hook_point.fwd_hooks)
    hook_point.add_hook(view.read.capture, is_permanent=True)
    try:
        yield view
    finally:
        for hook in [hook for hook in hook_point.fwd_hooks if hook not in before]:
            hook.hook.remove()
            hook_point.fwd_hooks.remove(hook)


class _PerToken:
    """A model with one vector a token at its hooks, under any of their names.

    SAELens' evals concatenate heads where they know the hook's name, and those of a bridge they do not know.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    def run_with_cache(self, *args: Any, names_filter: list[str], **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        resolved = {hook_name: resolve_hook(self._model, hook_name) for hook_name in names_filter}
        output, cache = self._model.run_with_cache(*args, names_filter=list(resolved.values()), **kwargs)
        return output, {
            hook_name: cache[actual] if _known_to_have_heads(hook_name) else cache[actual].flatten(2)
            for hook_name, actual in resolved.items()
        }

    def run_with_hooks(self, *args: Any, fwd_hooks: list[tuple[str, Any]], **kwargs: Any) -> Any:
        hooks = [
            (resolve_hook(self._model, hook_name), _per_token(hook_name, function)) for hook_name, function in fwd_hooks
        ]
        return self._model.run_with_hooks(*args, fwd_hooks=hooks, **kwargs)


def _known_to_have_heads(hook_name: str) -> bool:
    return any(part in hook_name for part in ("hook_q", "hook_k", "hook_v", "hook_z"))


def _per_token(hook_name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if _known_to_have_heads(hook_name):
        return function
    return lambda activations, hook: function(activations.flatten(2), hook=hook).view_as(activations)


class _Recording:
    """An activation store that remembers the tokens it gave."""

    def __init__(self, store: ActivationsStore) -> None:
        self._store = store
        self.batches: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get_batch_tokens(self, batch_size: int) -> Tensor:
        self.batches.append(self._store.get_batch_tokens(batch_size))
        return self.batches[-1]


class _AtOutput:
    """A transcoder that encodes the input captured in the running forward pass, whatever it is handed."""

    def __init__(self, sae: SAE[Any], hook_name_out: str) -> None:
        self._sae, self.read = sae, Captured(sae)
        self.cfg = copy(sae.cfg)
        self.cfg.metadata = deepcopy(sae.cfg.metadata)
        self.cfg.metadata.hook_name = hook_name_out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sae, name)

    def encode(self, x: Tensor) -> Tensor:
        x = self.read.take()
        self._skipped = skip_output(self._sae, x)
        return self._sae.encode(x)

    def decode(self, feature_acts: Tensor) -> Tensor:
        return self._sae.decode(feature_acts) + self._skipped
