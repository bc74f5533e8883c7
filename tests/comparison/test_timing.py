from typing import Any

import pytest
import torch
from sae_lens import (
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)
from transformers import LlamaConfig

from bae_lens import Recipe, TrainingBAEConfig, TrainingSettings, TrainingTranscoderConfig
from bae_lens.comparison.timing import _let_fire, time_dictionary, time_pass
from bae_lens.saes.saelens_compat import get_sae_training_class

SIZES: dict[str, Any] = {"d_in": 16, "d_sae": 256}
CONFIGS = [
    TrainingBAEConfig(**SIZES, target_l0=8.0, entropy_start_step=5),
    StandardTrainingSAEConfig(**SIZES, l1_coefficient=1.0),
    GatedTrainingSAEConfig(**SIZES, l1_coefficient=1.0),
    JumpReLUTrainingSAEConfig(**SIZES, l0_coefficient=1.0),
    TopKTrainingSAEConfig(**SIZES, k=8),
    TrainingTranscoderConfig(**SIZES, d_out=7, l1_coefficient=1.0),
]


@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: cfg.architecture())
def test_a_dictionary_is_timed_while_as_many_features_fire_as_after_training(cfg):
    sae = get_sae_training_class(cfg.architecture())[0](cfg)
    x = torch.randn(64, 16)
    _let_fire(sae, x, 8.0)
    assert (sae.encode(x) != 0).sum(-1).float().mean() == pytest.approx(8.0, rel=0.05)
    timing = time_dictionary(Recipe(cfg, 1e-3), TrainingSettings(training_tokens=320, batch_size=32), 8.0, "cpu")
    assert timing.step > 0
    assert timing.measured_token >= 0


def test_a_pass_is_timed_by_a_config_alone_and_leaves_nothing(tmp_path):
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=40,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=999,
    )
    config.architectures = ["LlamaForCausalLM"]
    timing = time_pass(config, 2, 16, tmp_path, "cpu", "float32", "float16")
    assert 0 <= timing.layer < 1  # of so small a model the difference of two times may be noise
    assert 0 <= timing.prediction < 1
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_cannot_be_converted_is_refused(tmp_path):
    with pytest.raises(ValueError, match="TransformerLens does not convert the config of this model"):
        time_pass(LlamaConfig(), 1, 16, tmp_path, "cpu", "float32", "float32")
