"""Where activations come from, and what can be said of dictionaries there beyond their own measures."""

from collections.abc import Mapping
from typing import Any

from sae_lens import SAE

from bae_lens.activations.cache import CachedActivations
from bae_lens.activations.streaming import StreamedActivations
from bae_lens.activations.vectors import Vectors, VectorSplit
from bae_lens.comparison.experiment import Experiment
from bae_lens.comparison.results import Corpus, corpus_of
from bae_lens.evaluation.features import FeatureDashboard, feature_dashboards, vector_dashboards
from bae_lens.evaluation.model_loss import LanguageModelLoss, LossMeter


class ModelOrigin:
    """A language model: what it loses with a dictionary in place, and the tokens on which features fire."""

    split: VectorSplit | None = None
    predicts = True

    def __init__(self, model: Any, splits: dict[str, dict[str, CachedActivations]], experiment: Experiment) -> None:
        self.model = model
        test = splits["test"][experiment.hook_name]
        self.loss_meter = LossMeter(model, test, experiment.contexts.loss_contexts)
        self.metadata = {
            "model_name": experiment.model,
            "model_class_name": type(model).__name__,
            "dataset_path": experiment.dataset,
            "context_size": experiment.contexts.context_size,
            "prepend_bos": model.tokenizer.bos_token_id is not None,
            "exclude_special_tokens": test.special_tokens,
        }

    def losses(self, saes: Mapping[str, SAE[Any]]) -> dict[str, LanguageModelLoss]:
        """Of the model with each dictionary."""
        return self.loss_meter(saes)

    def dashboards(self, sae: SAE[Any], states: CachedActivations, firing_rates: list[float]) -> list[FeatureDashboard]:
        """Features with the tokens that drive them, in `states`."""
        return feature_dashboards(sae, states, self.model, firing_rates)

    def corpus(self, states: CachedActivations | StreamedActivations) -> Corpus:
        """What was cached, or streamed so far, with tokens as text."""
        return corpus_of(states, lambda token: self.model.tokenizer.decode([token]))


class VectorOrigin:
    """Vectors of files or arrays: the rows on which features fire."""

    predicts = False

    def __init__(self, vectors: Vectors, experiment: Experiment) -> None:
        self.vectors, self.split = vectors, vectors.split_by()
        self.metadata = {"dataset_path": experiment.dataset}

    def losses(self, saes: Mapping[str, SAE[Any]]) -> dict[str, LanguageModelLoss]:
        """Raises NotImplementedError: nothing is predicted from these vectors."""
        raise NotImplementedError(f"{', '.join(saes)} cannot be put into a model: there is none")

    def dashboards(self, sae: SAE[Any], states: CachedActivations, firing_rates: list[float]) -> list[FeatureDashboard]:
        """Features with the vectors that drive them, in `states`."""
        return vector_dashboards(sae, states, self.vectors, firing_rates)

    def corpus(self, states: CachedActivations | StreamedActivations) -> Corpus:
        """What was cached, with rows by number."""
        return corpus_of(states, self.vectors.row_name)
