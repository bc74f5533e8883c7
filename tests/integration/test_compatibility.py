"""What an earlier version saved is read as it was, or refused with a sentence."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainStepInput

from bae_lens import Comparison, EntropyDynamics, TrainingBAE, TrainingBAEConfig, decompress, read_code
from bae_lens.comsem import ComSemReport

BEFORE = Path(__file__).parents[1] / "golden" / "before"
EXPECTED = json.loads((BEFORE / "expected.json").read_text())


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.from_numpy(np.load(BEFORE / "rows.npy"))


def sum_and_norm(values: torch.Tensor) -> list[float]:
    return [values.double().sum().item(), values.double().norm().item()]


@pytest.mark.parametrize("name", ["bae", "topk_transcoder", "binary_transcoder"])
def test_saved_dictionary_encodes_and_decodes_as_before(name, rows):
    sae, expected = SAE.load_from_disk(BEFORE / name), EXPECTED[name]
    metadata: Any = sae.cfg.metadata
    assert type(sae).__name__ == expected["class"]
    assert (metadata.hook_name, metadata.hook_name_out) == (expected["hook_name"], expected["hook_name_out"])
    code = sae.encode(rows)
    code = code.to_dense() if code.is_sparse else code
    for row, known in zip(code, expected["code of rows 0 to 2"], strict=False):
        active = dict(pair.split(":") for pair in known)
        assert row.nonzero().flatten().tolist() == [int(feature) for feature in active]
        assert row[row != 0].tolist() == pytest.approx([float(value) for value in active.values()], rel=1e-4)
    torch.testing.assert_close(sae.decode(code)[0], torch.tensor(expected["output of row 0"]), rtol=1e-5, atol=1e-5)
    if expected["prior"] is not None:
        torch.testing.assert_close(sae.prior, torch.tensor(expected["prior"]))


def test_compressed_file_is_read_and_decompressed_as_before():
    expected = EXPECTED["rows.bae"]
    code = read_code(BEFORE / "rows.bae")
    assert code.sum(1).tolist() == expected["features on by vector"]
    vectors = decompress(BEFORE / "rows.bae", SAE.load_from_disk(BEFORE / "bae"))
    assert len(vectors) == expected["n_vectors"]
    assert sum_and_norm(vectors) == pytest.approx(expected["vectors"], rel=1e-5)
    torch.testing.assert_close(vectors[40], torch.tensor(expected["vector 40"]), rtol=1e-5, atol=1e-5)


def test_checkpoint_goes_on_as_before(rows):
    folder, expected = BEFORE / "checkpoint_of_sae_lens", EXPECTED["checkpoint_of_sae_lens"]
    sae = TrainingBAE(TrainingBAEConfig.from_dict(json.loads((folder / "cfg.json").read_text())))
    sae.load_weights_from_checkpoint(folder)
    source = sae.standardization.source
    torch.testing.assert_close(source.mean, torch.tensor(expected["state"]["input_mean"]))
    assert float(source.scale) == pytest.approx(expected["state"]["input_scale"])
    known = expected["one step on rows 0 to 31"]
    coefficients: dict[str, Any] = {name: float(value) for name, value in sae.get_coefficients().items()}  # pyright: ignore[reportArgumentType]
    output = sae.training_forward_pass(TrainStepInput(rows, coefficients, None, 10, False))
    output.loss.backward()
    assert {name: loss.item() for name, loss in output.losses.items()} == pytest.approx(known["losses"], rel=1e-5)
    for name, gradient in known["gradients"].items():
        found: Any = sae.get_parameter(name).grad
        assert sum_and_norm(found) == pytest.approx(gradient, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "name"), [(Comparison, "result.json"), (ComSemReport, "comsem.json"), (EntropyDynamics, "dynamics.json")]
)
def test_result_is_refused_with_what_to_do(kind, name):
    with pytest.raises(ValueError, match=rf"is no {kind.__name__} of this version of bae_lens .*; make it again"):
        kind.from_dict(json.loads((BEFORE / name).read_text()))
