from copy import deepcopy
from typing import Any

import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)

from bae_lens import (
    Recipe,
    TrainingBAEConfig,
    TrainingBinaryTopKConfig,
    TrainingBinaryTopKTranscoderConfig,
    TrainingBinaryTranscoderConfig,
    TrainingTopKTranscoderConfig,
    TrainingTranscoderConfig,
)
from bae_lens.saes.loading import load_dictionary
from bae_lens.saes.saelens_compat import get_sae_training_class
from bae_lens.saes.skip import skip_output
from bae_lens.saes.standardization import PairStandardization, Standardization
from bae_lens.saes.starting import inherited, start_at

SHAPE: dict[str, Any] = {"d_in": 8, "d_sae": 24, "dtype": "float64"}
CONFIGS: dict[str, Any] = {
    "bae": TrainingBAEConfig(**SHAPE, standardize_activations=False),
    "binary_topk": TrainingBinaryTopKConfig(**SHAPE, k=4, standardize_activations=False),
    "standard": StandardTrainingSAEConfig(**SHAPE),
    "standard with b_dec": StandardTrainingSAEConfig(**SHAPE, apply_b_dec_to_input=True),
    "standard without": StandardTrainingSAEConfig(**SHAPE, apply_b_dec_to_input=False),
    "topk": TopKTrainingSAEConfig(**SHAPE, k=4),
    "topk, norms as they are": TopKTrainingSAEConfig(**SHAPE, k=4, rescale_acts_by_decoder_norm=False),
    "gated": GatedTrainingSAEConfig(**SHAPE, apply_b_dec_to_input=False),
    "jumprelu": JumpReLUTrainingSAEConfig(**SHAPE, jumprelu_init_threshold=0.1),
    "transcoder": TrainingTranscoderConfig(**SHAPE, d_out=6),
    "transcoder with skip": TrainingTranscoderConfig(**SHAPE, d_out=6, skip=True),
    "topk_transcoder": TrainingTopKTranscoderConfig(**SHAPE, d_out=6, k=4, skip=True),
    "binary_topk_transcoder": TrainingBinaryTopKTranscoderConfig(
        **SHAPE, d_out=6, k=4, skip=True, standardize_activations=False
    ),
    "binary_transcoder": TrainingBinaryTranscoderConfig(**SHAPE, d_out=6, skip=True, standardize_activations=False),
}


def standardizations(cfg, seed):
    """Of what is read and of what is written, far from zero and of another scale."""
    generator = torch.Generator().manual_seed(seed)
    means = (50 * torch.randn(d, generator=generator).double() for d in (cfg.d_in, getattr(cfg, "d_out", cfg.d_in)))
    sides = [Standardization(mean, scale) for mean, scale in zip(means, (0.05, 0.3), strict=True)]
    return PairStandardization(*sides) if hasattr(cfg, "d_out") else sides[0]


def saved(cfg, folder) -> Any:
    """A dictionary with weights of all kinds, as training saves it, for raw activations."""
    sae: Any = get_sae_training_class(cfg.architecture())[0](deepcopy(cfg))  # which saving changes
    for name, parameter in sae.named_parameters():
        parameter.data += 0.3 * torch.rand_like(parameter) if name == "threshold" else 0.3 * torch.randn_like(parameter)
    if hasattr(sae, "prior"):
        sae.prior.data.uniform_()
        sae.bit_price.data.fill_(0.25)
    standardizations(cfg, 1).fold_into(sae)
    sae.save_inference_model(folder)
    return load_dictionary(folder)


def output(sae, x):
    return sae.decode(sae.encode(x)) + skip_output(sae, x)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_output_is_that_of_the_saved_dictionary(name, seed, tmp_path):
    """With the standardization with which it was saved, and with another."""
    cfg = CONFIGS[name]
    before = saved(cfg, tmp_path)
    now = standardizations(cfg, seed)
    source, target = (now.source, now.target) if isinstance(now, PairStandardization) else (now, now)
    if name.startswith("topk"):
        cfg = type(cfg)(**{**SHAPE, **inherited(before)})
    sae = get_sae_training_class(cfg.architecture())[0](cfg)
    start_at(sae, before, now)
    z = torch.randn(400, 8, dtype=torch.float64)
    x = z / source.scale + source.mean
    if seed == 2:
        x = x + 10  # what the dictionary knows nothing of
        z = source(x)
    expected = target(output(before, x))
    assert (before.encode(x) != 0).any(0).sum() >= 6
    assert expected.var() > 1e-3
    torch.testing.assert_close(output(sae, z), expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(sae.encode(z) != 0, before.encode(x) != 0)


def test_real_values_have_rows_of_norm_1_and_a_bit_its_price(tmp_path):
    for name in ("gated", "transcoder with skip", "jumprelu"):
        before = saved(CONFIGS[name], tmp_path / name)
        sae = get_sae_training_class(CONFIGS[name].architecture())[0](CONFIGS[name])
        start_at(sae, before, standardizations(CONFIGS[name], 1))
        assert sae.W_dec.norm(dim=-1).mean().item() == pytest.approx(1)
    cfg = TrainingBAEConfig(**SHAPE, target_l0=3.0, entropy_coefficient=0.5, standardize_activations=False)
    before = saved(cfg, tmp_path / "bae")
    sae: Any = get_sae_training_class("bae")[0](cfg)
    start_at(sae, before, standardizations(cfg, 1))
    assert torch.equal(sae.prior, before.prior)
    assert sae.bit_price.item() == pytest.approx(0.25, rel=1e-6)
    assert sae.entropy_multiplier.item() == pytest.approx(0.5, rel=1e-6)


def test_what_does_not_fit_is_refused(tmp_path):
    relu = saved(CONFIGS["standard"], tmp_path / "relu")
    skipping = saved(CONFIGS["transcoder with skip"], tmp_path / "skip")
    uneven = saved(CONFIGS["topk, norms as they are"], tmp_path / "uneven")
    below = saved(CONFIGS["jumprelu"], tmp_path / "below")
    below.threshold.data[3] = -0.1
    batch_top_k = BatchTopKTrainingSAEConfig(**SHAPE, k=4.0)
    batch = saved(batch_top_k, tmp_path / "batch")
    with_b_dec = saved(CONFIGS["standard with b_dec"], tmp_path / "b_dec")
    normalizing = saved(CONFIGS["standard"], tmp_path / "normalizing")
    normalizing.cfg.normalize_activations = "layer_norm"
    temporal = saved(CONFIGS["standard"], tmp_path / "temporal")
    temporal.cfg.__class__ = type("Other", (type(temporal.cfg),), {"architecture": classmethod(lambda _: "temporal")})
    other = {**SHAPE, "d_sae": 32}
    cases = {
        "is a standard, which is trained as standard, and the .* asked for is gated": (CONFIGS["gated"], relu),
        "from has d_sae 24, and asked for is 32": (StandardTrainingSAEConfig(**other), relu),
        "from has d_in 8, and asked for is 9": (StandardTrainingSAEConfig(**{**SHAPE, "d_in": 9}), relu),
        "from has apply_b_dec_to_input True, and asked for is False": (CONFIGS["standard without"], with_b_dec),
        "from has skip True, and asked for is False": (CONFIGS["transcoder"], skipping),
        "from has rescale_acts_by_decoder_norm False, and asked for is True": (CONFIGS["topk"], uneven),
        "has thresholds below 0": (CONFIGS["jumprelu"], below),
        "is a jumprelu, which is trained as jumprelu, and the .* asked for is batchtopk": (batch_top_k, batch),
        r"normalizes its input \(layer_norm\)": (CONFIGS["standard"], normalizing),
        "no training starts from a temporal, but from one of bae, binary_topk": (CONFIGS["standard"], temporal),
    }  # fmt: skip
    for message, (cfg, start) in cases.items():
        with pytest.raises(ValueError, match=message):
            Recipe(cfg, 1e-3, start)
