"""SAELens' multi-SAE runner for transcoders: a hook named `"INPUT=>OUTPUT"` streams the activations at both."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from sae_lens import TrainingSAE
from sae_lens.config import HfDataset
from sae_lens.evals import EvalConfig
from sae_lens.load_model import load_model
from sae_lens.multi_sae_training_runner import MultiSAEEvaluator, MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.training.types import MultiHookDataProvider
from torch import Tensor
from typing_extensions import override

from bae_lens.activations.forward import stop_layer
from bae_lens.activations.models import resolve_hook
from bae_lens.evaluation.evals import run_evals
from bae_lens.saes.transcoder import ARROW


class TranscoderTrainingRunner(MultiSAETrainingRunner):
    """SAELens' `MultiSAETrainingRunner`, in which transcoders and SAEs of any kind train in lockstep on one stream.

    `cfg.hook_names` of a transcoder is `"INPUT_HOOK=>OUTPUT_HOOK"`, such as
    `"blocks.5.mlp.hook_in=>blocks.5.hook_mlp_out"`. Checkpoints, resuming and saving are SAELens'. The evals that it
    runs during training, if it logs, are `bae_lens.run_evals`.
    Raises ValueError for hooks that the model does not have, before anything is trained.
    """

    def __init__(
        self,
        cfg: MultiSAETrainingRunnerConfig,
        override_dataset: HfDataset | None = None,
        override_model: Any = None,
        override_saes: dict[str, TrainingSAE[Any]] | None = None,
    ) -> None:
        hook_names = [part for name in cfg.hook_names_per_sae.values() for part in name.split(ARROW)]
        if override_model is None:
            override_model = load_model(
                cfg.model_class_name,
                cfg.model_name,
                device=str(cfg.llm_device),
                model_from_pretrained_kwargs=cfg.model_from_pretrained_kwargs,
                hook_names=hook_names,
            )
        for hook_name in hook_names:
            resolve_hook(override_model, hook_name)
        super().__init__(cfg, override_dataset, _PairedHooks(override_model), override_saes)  # pyright: ignore[reportArgumentType]
        self.evaluator = _Evaluator(**{**vars(self.evaluator), "model": override_model})


class _PairedHooks:
    """A model whose cache also answers to `"INPUT=>OUTPUT"`, with the activations at both hooks side by side."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def run_with_cache(
        self, *args: Any, names_filter: list[str], stop_at_layer: int | None = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        pairs = {name: [resolve_hook(self._model, part) for part in name.split(ARROW)] for name in names_filter}
        hook_names = list(dict.fromkeys(part for pair in pairs.values() for part in pair))
        if stop_at_layer is not None:
            stop_at_layer = stop_layer(hook_names)
        output, cache = self._model.run_with_cache(
            *args, names_filter=hook_names, stop_at_layer=stop_at_layer, **kwargs
        )
        return output, {name: torch.cat([cache[part] for part in pair], dim=-1) for name, pair in pairs.items()}


class _Evaluator(MultiSAEEvaluator):
    """SAELens' evaluator with evals that are right for transcoders."""

    @override
    def __call__(
        self,
        saes: dict[str, TrainingSAE[Any]],
        data_provider: MultiHookDataProvider,
        activation_scalers: dict[str, ActivationScaler],
        hook_names: dict[str, str],
    ) -> dict[str, Any]:
        excluded = self.activations_store.exclude_special_tokens
        eval_config = EvalConfig(
            batch_size_prompts=self.eval_batch_size_prompts,
            n_eval_reconstruction_batches=self.n_eval_batches,
            n_eval_sparsity_variance_batches=self.n_eval_batches,
            compute_ce_loss=True,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
        )
        prefetching = isinstance(data_provider, PrefetchingIterator)
        pause: AbstractContextManager[None] = data_provider.paused() if prefetching else nullcontext()
        results: dict[str, Any] = {}
        with pause:
            for name, sae in saes.items():
                metrics, _ = run_evals(
                    sae,
                    self.activations_store,
                    self.model,
                    activation_scalers[name],
                    eval_config,
                    self.model_kwargs,
                    excluded.tolist() if excluded is not None else False,
                )
                results |= {f"{name}/{group}": values for group, values in metrics.items()}
        if self.user_evaluator is not None:
            for name, sae in saes.items():
                stream = (batch[hook_names[name]] for batch in data_provider)
                for key, value in self.user_evaluator(sae, stream, activation_scalers[name]).items():
                    results[f"{name}/{key}"] = value
        return results
