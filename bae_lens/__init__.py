"""Binary autoencoders (arXiv 2509.20997) for SAELens and TransformerLens. Importing this registers `"bae"`."""

from typing import TYPE_CHECKING, Any

from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from bae_lens.bae import BAE, BAEConfig
from bae_lens.binarize import step
from bae_lens.covariance import covariance_penalty
from bae_lens.losses import marginal_entropy
from bae_lens.reference import load_reference_checkpoint
from bae_lens.training_bae import TrainingBAE, TrainingBAEConfig

if TYPE_CHECKING:
    from bae_lens.comsem import ComSem, ComSemReport

__version__ = "0.1.0"

__all__ = [
    "BAE",
    "BAEConfig",
    "ComSem",
    "ComSemReport",
    "TrainingBAE",
    "TrainingBAEConfig",
    "covariance_penalty",
    "load_reference_checkpoint",
    "marginal_entropy",
    "step",
]

# Assigned, not registered through register_sae_class, which raises when a notebook imports the package again.
SAE_CLASS_REGISTRY["bae"] = (BAE, BAEConfig)
SAE_TRAINING_CLASS_REGISTRY["bae"] = (TrainingBAE, TrainingBAEConfig)


def __getattr__(name: str) -> Any:
    """Loads ComSem, with the judges' libraries, when it is first asked for."""
    if name in ("ComSem", "ComSemReport"):
        from bae_lens import comsem

        return getattr(comsem, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
