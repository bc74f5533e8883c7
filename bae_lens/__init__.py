"""Binary autoencoders (arXiv 2509.20997) for SAELens and TransformerLens.

Importing this registers the architecture `"bae"` and trainable transcoders with SAELens.
"""

from typing import TYPE_CHECKING, Any

from bae_lens.activations.position_cache import Windows, random_windows
from bae_lens.comparison.experiment import Contender, Experiment
from bae_lens.comparison.results import Comparison
from bae_lens.comparison.run import compare
from bae_lens.compression.codec import CompressionReport, compress, decompress, read_code
from bae_lens.entropy.dynamics import DynamicsSettings, EntropyDynamics, entropy_dynamics
from bae_lens.entropy.estimate import EntropyEstimate, estimate_entropy
from bae_lens.entropy.fit import FitSettings, fit_bae
from bae_lens.entropy.synthetic import random_directions
from bae_lens.evaluation.evals import run_evals
from bae_lens.evaluation.steering import LogitEffects, edit, logit_effects
from bae_lens.functional.binarize import step
from bae_lens.functional.covariance import covariance_penalty
from bae_lens.functional.losses import marginal_entropy
from bae_lens.functional.packing import pack_code, unpack_code
from bae_lens.saes import (
    BAE,
    BAEConfig,
    BinaryTranscoder,
    BinaryTranscoderConfig,
    TopKTranscoder,
    TopKTranscoderConfig,
    TrainingBAE,
    TrainingBAEConfig,
    TrainingBinaryTranscoder,
    TrainingBinaryTranscoderConfig,
    TrainingTopKTranscoder,
    TrainingTopKTranscoderConfig,
    TrainingTranscoder,
    TrainingTranscoderConfig,
    load_authors_checkpoint,
)
from bae_lens.training.recipe import Recipe, TrainingSettings
from bae_lens.training.transcoder_runner import TranscoderTrainingRunner

if TYPE_CHECKING:
    from bae_lens.comsem import ComSem, ComSemReport

__version__ = "0.1.0"

__all__ = [
    "BAE",
    "BAEConfig",
    "BinaryTranscoder",
    "BinaryTranscoderConfig",
    "ComSem",
    "ComSemReport",
    "Comparison",
    "CompressionReport",
    "Contender",
    "DynamicsSettings",
    "EntropyDynamics",
    "EntropyEstimate",
    "Experiment",
    "FitSettings",
    "LogitEffects",
    "Recipe",
    "TopKTranscoder",
    "TopKTranscoderConfig",
    "TrainingBAE",
    "TrainingBAEConfig",
    "TrainingBinaryTranscoder",
    "TrainingBinaryTranscoderConfig",
    "TrainingSettings",
    "TrainingTopKTranscoder",
    "TrainingTopKTranscoderConfig",
    "TrainingTranscoder",
    "TrainingTranscoderConfig",
    "TranscoderTrainingRunner",
    "Windows",
    "compare",
    "compress",
    "covariance_penalty",
    "decompress",
    "edit",
    "entropy_dynamics",
    "estimate_entropy",
    "fit_bae",
    "load_authors_checkpoint",
    "logit_effects",
    "marginal_entropy",
    "pack_code",
    "random_directions",
    "random_windows",
    "read_code",
    "run_evals",
    "step",
    "unpack_code",
]


def __getattr__(name: str) -> Any:
    """Loads ComSem, with the judges' libraries, when it is first asked for."""
    if name in ("ComSem", "ComSemReport"):
        from bae_lens import comsem

        return getattr(comsem, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
