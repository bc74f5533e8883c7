"""Architectures in SAELens, each with its training twin: the binary autoencoder, its Top-k form and transcoders.

Importing this registers them, so that `SAE.load_from_disk` and SAELens' runners know their names.
"""

from bae_lens.saes.authors_checkpoint import load_authors_checkpoint
from bae_lens.saes.bae import BAE, BAEConfig
from bae_lens.saes.binary_code import BinaryCode, is_binary
from bae_lens.saes.binary_topk import (
    BinaryTopK,
    BinaryTopKConfig,
    BinaryTopKTranscoder,
    BinaryTopKTranscoderConfig,
    TrainingBinaryTopK,
    TrainingBinaryTopKConfig,
    TrainingBinaryTopKTranscoder,
    TrainingBinaryTopKTranscoderConfig,
)
from bae_lens.saes.saelens_compat import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from bae_lens.saes.training_bae import TrainingBAE
from bae_lens.saes.training_config import TrainingBAEConfig
from bae_lens.saes.training_transcoder import (
    TrainingBinaryTranscoder,
    TrainingBinaryTranscoderConfig,
    TrainingTopKTranscoder,
    TrainingTopKTranscoderConfig,
    TrainingTranscoder,
    TrainingTranscoderConfig,
)
from bae_lens.saes.transcoder import BinaryTranscoder, BinaryTranscoderConfig, TopKTranscoder, TopKTranscoderConfig

__all__ = [
    "BAE",
    "BAEConfig",
    "BinaryCode",
    "BinaryTopK",
    "BinaryTopKConfig",
    "BinaryTopKTranscoder",
    "BinaryTopKTranscoderConfig",
    "BinaryTranscoder",
    "BinaryTranscoderConfig",
    "TopKTranscoder",
    "TopKTranscoderConfig",
    "TrainingBAE",
    "TrainingBAEConfig",
    "TrainingBinaryTopK",
    "TrainingBinaryTopKConfig",
    "TrainingBinaryTopKTranscoder",
    "TrainingBinaryTopKTranscoderConfig",
    "TrainingBinaryTranscoder",
    "TrainingBinaryTranscoderConfig",
    "TrainingTopKTranscoder",
    "TrainingTopKTranscoderConfig",
    "TrainingTranscoder",
    "TrainingTranscoderConfig",
    "is_binary",
    "load_authors_checkpoint",
]

# Assigned, not registered through register_sae_class, which raises when a notebook imports the package again.
SAE_CLASS_REGISTRY["bae"] = (BAE, BAEConfig)
SAE_CLASS_REGISTRY["binary_topk"] = (BinaryTopK, BinaryTopKConfig)
SAE_CLASS_REGISTRY["binary_topk_transcoder"] = (BinaryTopKTranscoder, BinaryTopKTranscoderConfig)
SAE_CLASS_REGISTRY["binary_transcoder"] = (BinaryTranscoder, BinaryTranscoderConfig)
SAE_CLASS_REGISTRY["topk_transcoder"] = (TopKTranscoder, TopKTranscoderConfig)
SAE_TRAINING_CLASS_REGISTRY["bae"] = (TrainingBAE, TrainingBAEConfig)
SAE_TRAINING_CLASS_REGISTRY["binary_topk"] = (TrainingBinaryTopK, TrainingBinaryTopKConfig)
SAE_TRAINING_CLASS_REGISTRY["binary_topk_transcoder"] = (
    TrainingBinaryTopKTranscoder,
    TrainingBinaryTopKTranscoderConfig,
)
SAE_TRAINING_CLASS_REGISTRY["binary_transcoder"] = (TrainingBinaryTranscoder, TrainingBinaryTranscoderConfig)
SAE_TRAINING_CLASS_REGISTRY["topk_transcoder"] = (TrainingTopKTranscoder, TrainingTopKTranscoderConfig)
SAE_TRAINING_CLASS_REGISTRY["transcoder"] = (TrainingTranscoder, TrainingTranscoderConfig)
