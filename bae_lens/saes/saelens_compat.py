"""The one place that knows what SAELens and TransformerLens do not export, and what they forget.

The names below may move with any of their releases; all others that the package uses are exported by them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sae_lens.config import HfDataset, SAETrainerConfig
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME, SAE_WEIGHTS_FILENAME, TRAINER_STATE_FILENAME
from sae_lens.evals import EvalConfig
from sae_lens.load_model import load_model
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopK
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.training.types import MultiHookDataProvider
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name, get_special_token_ids
from transformer_lens.hook_points import HookPoint
from transformer_lens.loading_from_pretrained import (
    convert_hf_model_config,
    get_official_model_name,
    get_pretrained_state_dict,
)

__all__ = [
    "ACTIVATION_SCALER_CFG_FILENAME",  # the files of a checkpoint
    "SAE_CLASS_REGISTRY",  # registering an architecture twice raises, as a notebook that imports again would
    "SAE_TRAINING_CLASS_REGISTRY",
    "SAE_WEIGHTS_FILENAME",
    "TRAINER_STATE_FILENAME",
    "ActivationScaler",  # an argument of SAELens' evaluation
    "EvalConfig",  # an argument of SAELens' evaluation
    "HfDataset",  # the type of a runner's dataset
    "HookPoint",  # the type of a hook's second argument
    "MultiHookDataProvider",  # the type of a runner's data
    "PrefetchingIterator",  # what a runner wraps its data in, and what has to be closed
    "SAETrainerConfig",  # the settings of a trainer that is driven step by step
    "TopK",  # the activation function of a Top-k SAE
    "TrainCoefficientConfig",  # the types of a training step
    "TrainStepInput",
    "TrainStepOutput",
    "convert_hf_model_config",  # a local folder as a HookedTransformer, whether or not it lists the model
    "extract_stop_at_layer_from_tlens_hook_name",  # the layer before which a forward pass can stop
    "get_official_model_name",  # whether TransformerLens lists a model
    "get_pretrained_saes_directory",  # the releases that have a name of their own
    "get_pretrained_state_dict",
    "get_sae_training_class",  # the class of a training config
    "get_special_token_ids",  # the tokens that SAELens leaves out
    "heads_concatenated",
    "load_model",  # the model of a runner that was given none
]


@contextmanager
def heads_concatenated(sae: Any) -> Iterator[None]:
    """A dictionary that takes and gives heads side by side, (..., heads * d_head), for as long as the block runs.

    At hook_z the activations of an attention layer's heads lie on an axis of their own. Makes no difference to a
    dictionary that takes them side by side anyway, or that is none of SAELens'.
    """
    if not getattr(sae, "hook_z_reshaping_mode", False):
        yield
        return
    d_head = getattr(sae, "d_head", None)  # which SAELens forgets, and learns from the next activations only
    sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        sae.turn_on_forward_pass_hook_z_reshaping()
        sae.d_head = d_head
