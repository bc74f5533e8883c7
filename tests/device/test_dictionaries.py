"""Every architecture on the shadow device: coding, training, saving, measuring, compressing."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from torch.testing import assert_close

from bae_lens import (
    BAE,
    BAEConfig,
    BinaryTopK,
    BinaryTopKConfig,
    BinaryTopKTranscoder,
    BinaryTopKTranscoderConfig,
    BinaryTranscoder,
    BinaryTranscoderConfig,
    FitSettings,
    TopKTranscoder,
    TopKTranscoderConfig,
    TrainingBAE,
    TrainingBAEConfig,
    TrainingBinaryTopK,
    TrainingBinaryTopKConfig,
    TrainingBinaryTopKTranscoder,
    TrainingBinaryTopKTranscoderConfig,
    TrainingBinaryTranscoder,
    TrainingBinaryTranscoderConfig,
    TrainingTopKTranscoder,
    TrainingTopKTranscoderConfig,
    TrainingTranscoder,
    TrainingTranscoderConfig,
    compress,
    decompress,
    estimate_entropy,
    evaluate_dictionary,
    fit_baes,
    load_authors_checkpoint,
    read_code,
)
from bae_lens.evaluation.best_code import BestCode
from bae_lens.saes.loading import load_bae
from bae_lens.saes.saelens_compat import TrainStepInput
from bae_lens.saes.standardization import PairStandardization, Standardization, standardization_of

D, D_OUT, D_SAE = 16, 12, 48
SHAPE: dict[str, Any] = {"d_in": D, "d_sae": D_SAE}
INFERENCE = {
    "bae": lambda: BAE(BAEConfig(**SHAPE)),
    "binary_topk": lambda: BinaryTopK(BinaryTopKConfig(**SHAPE, k=6)),
    "binary_topk_transcoder": lambda: BinaryTopKTranscoder(BinaryTopKTranscoderConfig(**SHAPE, d_out=D_OUT, k=6)),
    "binary_transcoder": lambda: BinaryTranscoder(BinaryTranscoderConfig(**SHAPE, d_out=D_OUT)),
    "topk_transcoder": lambda: TopKTranscoder(TopKTranscoderConfig(**SHAPE, d_out=D_OUT, k=6)),
}
OPTIMIZED: dict[str, Any] = {"max_flips": 4, "optimized_start_step": 2, "entropy_start_step": 1}
TRAINING = {
    "bae": lambda: TrainingBAE(TrainingBAEConfig(**SHAPE, covariance_coefficient=1e-2, target_bits=9.0, **OPTIMIZED)),
    "bae, sampled": lambda: TrainingBAE(
        TrainingBAEConfig(**SHAPE, covariance_coefficient=1e-2, covariance_sample=9, reconstruction="l2_norm")
    ),
    "binary_topk": lambda: TrainingBinaryTopK(TrainingBinaryTopKConfig(**SHAPE, k=6)),
    "binary_topk_transcoder": lambda: TrainingBinaryTopKTranscoder(
        TrainingBinaryTopKTranscoderConfig(**SHAPE, d_out=D_OUT, k=6)
    ),
    "binary_transcoder": lambda: TrainingBinaryTranscoder(
        TrainingBinaryTranscoderConfig(**SHAPE, d_out=D_OUT, target_l0=9.0)
    ),
    "topk_transcoder": lambda: TrainingTopKTranscoder(TrainingTopKTranscoderConfig(**SHAPE, d_out=D_OUT, k=6)),
    "transcoder": lambda: TrainingTranscoder(TrainingTranscoderConfig(**SHAPE, d_out=D_OUT, l1_coefficient=0.1)),
}


def vectors(n: int = 96, d: int = D) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(1)) + 3


def drawn(sae: Any) -> Any:
    generator = torch.Generator().manual_seed(2)
    for weights in sae.parameters():
        weights.data.normal_(generator=generator)
    if isinstance(sae, BAE):
        sae.b_enc.data -= 8
        sae.prior.copy_(torch.rand(D_SAE, generator=generator) / 3 + 0.01)
        sae.bit_price.fill_(0.5)
    return sae


def on_both(sae: Any, device: str) -> list[Any]:
    return [sae, deepcopy(sae).to(device)]


def assert_alike(found: Any, expected: Any) -> None:
    assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("kind", INFERENCE)
def test_codes_outputs_and_their_gradients(kind, shadow):
    results = []
    for sae in on_both(drawn(INFERENCE[kind]()), shadow):
        x = vectors().to(sae.device).requires_grad_()
        feature_acts, sae_out = sae.encode(x), sae(x)
        sae_out.sin().sum().backward()
        results.append([feature_acts, sae_out, x.grad, *(weights.grad for weights in sae.parameters())])
        assert {part.device.type for part in results[-1] if part is not None} == {sae.device.type}
    for expected, found in zip(*results, strict=True):
        if expected is not None:
            assert_alike(found, expected)


def test_what_a_bae_says_of_vectors(shadow):
    results = []
    for sae in on_both(drawn(INFERENCE["bae"]()), shadow):
        x = vectors().to(sae.device)
        results.append(
            [
                sae.encode_optimized(x),
                sae.encode_optimized(x[:2], 3),
                sae.encode_packed(x),
                sae.activation_strength(sae.encode(x)),
                sae.activated_features(x),
                sae.to_graded_sae().encode(x),
                sae.estimate_prior([x.cpu(), x.cpu()]),
                sae.fold_polarity(),
                sae(x),
            ]
        )
    for expected, found in zip(*results, strict=True):
        assert_alike(found, expected)


@pytest.mark.parametrize("kind", TRAINING)
def test_training_steps_what_they_leave_and_what_is_saved(kind, shadow, tmp_path):
    states, outputs = [], []
    torch.manual_seed(0)
    for sae in on_both(TRAINING[kind](), shadow):
        d = D + D_OUT if kind.endswith("transcoder") else D
        batches = vectors(128, d).to(sae.device).split(32)
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2, fused=True)
        coefficients = {
            name: float(getattr(coefficient, "value", coefficient))
            for name, coefficient in sae.get_coefficients().items()
        }
        for step, batch in enumerate(batches):
            dead = torch.zeros(D_SAE, dtype=torch.bool, device=sae.device)
            dead[:5] = True
            output = sae.training_forward_pass(TrainStepInput(batch, coefficients, dead, step, False))
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        outputs.append({"loss": output.loss, "sae_out": output.sae_out, **output.losses})
        states.append({name: value.cpu() for name, value in sae.state_dict().items()})
        folder = tmp_path / sae.device.type
        sae.save_inference_model(folder)
        loaded = SAE.load_from_disk(folder, str(sae.device))
        assert {value.device.type for value in loaded.state_dict().values()} == {sae.device.type}
        outputs[-1]["loaded"] = loaded(batches[0][:, :D])
        if hasattr(sae, "to_inference"):
            outputs[-1]["inference"] = sae.to_inference()(batches[0][:, :D])
    assert states[0].keys() == states[1].keys()
    for name, expected in [*states[0].items(), *outputs[0].items()]:
        assert_alike({**states[1], **outputs[1]}[name], expected)


def test_standardizations_are_found_and_folded(shadow):
    standardization, there = (standardization_of(vectors().to(device)) for device in ("cpu", shadow))
    assert torch.equal(there.mean, standardization.mean)
    assert there.scale == standardization.scale
    out = Standardization(torch.ones(D_OUT, dtype=torch.float64), 2.0)
    results = []
    for sae, transcoder in zip(
        on_both(drawn(INFERENCE["bae"]()), shadow),
        on_both(drawn(INFERENCE["binary_transcoder"]()), shadow),
        strict=True,
    ):
        x = vectors().to(sae.device)
        standardization.fold_into(sae)
        PairStandardization(standardization, out).fold_into(transcoder)
        results.append([sae(x), transcoder(x), sae.bit_price, transcoder.bit_price, standardization(x)])
    for expected, found in zip(*results, strict=True):
        assert_alike(found, expected)


@pytest.mark.parametrize("there", [True, False], ids=["vectors there", "vectors on the CPU"])
@pytest.mark.parametrize("kind", ["bae", "topk", "binary_transcoder"])
def test_metrics(kind, there, shadow):
    sae = TopKSAE(TopKSAEConfig(**SHAPE, k=6, device="cpu")) if kind == "topk" else INFERENCE[kind]()
    x, y = vectors(), vectors(d=D_OUT) if kind == "binary_transcoder" else vectors()
    cpu, other = on_both(drawn(sae), shadow)
    expected = evaluate_dictionary(cpu, x, y, batch_size=40)
    found = evaluate_dictionary(other, *((x.to(shadow), y.to(shadow)) if there else (x, y)), batch_size=40)
    assert found.explained_variance == pytest.approx(expected.explained_variance, rel=1e-5)
    assert found.optimized
    assert expected.optimized
    assert found.optimized.explained_variance == pytest.approx(expected.optimized.explained_variance, rel=1e-5)
    assert found.code == expected.code
    assert found.value_curve == [pytest.approx(point, rel=1e-4) for point in expected.value_curve]


def test_the_price_that_a_best_code_finds(shadow):
    found = []
    for sae in on_both(drawn(INFERENCE["bae"]()), shadow):
        sae.bit_price.fill_(torch.nan)
        found.append(BestCode(sae)(sae.encode(vectors().to(sae.device)), vectors()))
    assert_alike(found[1], found[0])


def test_entropies_are_fitted_and_estimated(shadow):
    x = torch.stack([vectors(256, 8), vectors(256, 8).flip(0)])
    settings = FitSettings(steps=24, batch_size=64)
    results = []
    for device in ("cpu", shadow):
        baes = fit_baes(x.to(device), 16, 0, [0.3, 0.1], settings)
        assert {bae.device.type for bae in baes} == {device}
        estimates = [
            estimate_entropy(bae, there, clusters=torch.arange(256).to(device) // 4)
            for bae, there in zip(baes, x.to(device), strict=True)
        ]
        results.append([[e.corrected_bits, e.joint_bits_bound, e.explained_variance, *e.interval] for e in estimates])
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-3)
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-3)


def test_codes_in_files(shadow, tmp_path):
    sae = drawn(INFERENCE["bae"]())
    cpu, there = on_both(sae, shadow)
    compress(cpu, vectors(), tmp_path / "cpu.bae")
    report = compress(there, vectors().to(shadow), tmp_path / "there.bae")
    assert (tmp_path / "cpu.bae").read_bytes() == (tmp_path / "there.bae").read_bytes()
    assert report.n_vectors == 96
    assert_alike(decompress(tmp_path / "there.bae", there), decompress(tmp_path / "cpu.bae", cpu))
    assert torch.equal(read_code(tmp_path / "there.bae", sae=there), cpu.encode(vectors()))


def test_dictionaries_are_loaded_onto_it(shadow, tmp_path, golden):
    drawn(INFERENCE["bae"]()).save_model(tmp_path)
    assert load_bae(tmp_path, shadow)(vectors().to(shadow)).device.type == shadow
    checkpoint = next(golden.rglob("*.pt"))
    theirs, ours = (load_authors_checkpoint(checkpoint, device=device) for device in (shadow, "cpu"))
    x = vectors(d=ours.cfg.d_in)
    assert_alike(theirs(x.to(shadow)), ours(x))
