"""Every command with `--device shadow`, beside the same with the CPU."""

import json
import sys

import numpy as np
import pytest

from bae_lens.cli import main as cli
from bae_lens.cli.main import COMMANDS
from tests.cli.test_comsem import LetterJudge

SIZES = "--cached-tokens 600 --held-out-tokens 300 --context-size 16 --training-tokens 640 --batch-size 32"
THE_SAME_AS_COMPARE = {"demo"}  # with the embedded model
COMPUTING_NOTHING = {"upload", "export", "agreement", "dashboard"}


@pytest.fixture
def run(tiny_model_folder, tiny_dataset, tmp_path, monkeypatch, capsys):
    """Runs a command, by default on the tiny model and its text, and returns what it says."""
    words = tmp_path / "words.jsonl"
    words.write_text("\n".join(json.dumps({"text": text + "."}) for text in tiny_dataset["text"][:400]))

    def run(command, *arguments):
        monkeypatch.setattr(sys, "argv", ["bae-lens", command, *map(str, arguments)])
        cli.main()
        return capsys.readouterr().out

    run.source = ["--model", tiny_model_folder, "--dataset", words]
    return run


@pytest.fixture
def trained(run, tmp_path, shadow):
    """Folders of a BAE that was trained on the CPU, and on the device."""
    for device in ("cpu", shadow):
        where = ["--output", tmp_path / device, "--device", device]
        run("train", *run.source, *SIZES.split(), "--hook-name", "blocks.0.hook_resid_post", *where)
    return {device: tmp_path / device for device in ("cpu", shadow)}


def explained(folder):
    result = json.loads((folder / "result.json").read_text())
    return [dictionary["runs"][0]["metrics"]["explained_variance"] for dictionary in result["dictionaries"]]


def test_train_comsem_compress_and_decompress(run, trained, tmp_path, shadow, monkeypatch):
    monkeypatch.setattr("bae_lens.cli.comsem.OfflineJudge", LetterJudge)
    said, arrays = {}, {}
    for device, folder in trained.items():
        judge = ["--offline-judge", "--accept-failing-judge", "--max-features", 3]
        run("comsem", folder, "--n-tokens", 600, *judge, "--output", tmp_path / f"{device}-comsem", "--device", device)
        here = ["--device", device]
        bae = ["--dictionary", trained["cpu"] / "dictionaries" / "bae"]
        vectors = ["--vectors", trained["cpu"] / "activations" / "test"]
        said[device] = run("compress", *vectors, *bae, "--output", tmp_path / f"{device}.bae", *here)
        run("decompress", "--file", tmp_path / f"{device}.bae", *bae, "--output", tmp_path / f"{device}.npy", *here)
        arrays[device] = np.load(tmp_path / f"{device}.npy")
    assert explained(trained[shadow]) == pytest.approx(explained(trained["cpu"]), rel=1e-3)
    assert said[shadow] == said["cpu"]
    np.testing.assert_allclose(arrays[shadow], arrays["cpu"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compare(run, tmp_path, shadow):
    architectures = ["--architectures", "bae", "topk", "gated", "binary_transcoder", "--l0", 6]
    for device in ("cpu", shadow):
        where = ["--output", tmp_path / device, "--device", device]
        run("compare", *run.source, *SIZES.split(), "--hook-name", "blocks.0.hook_resid_post", *architectures, *where)
    assert explained(tmp_path / shadow) == pytest.approx(explained(tmp_path / "cpu"), rel=1e-3)


@pytest.mark.parametrize("swapped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_model_on_another_device_than_its_dictionary(run, tmp_path, shadow, swapped):
    devices = [shadow, "cpu"] if swapped else ["cpu", shadow]
    where = ["--output", tmp_path / "two", "--device", devices[0], "--model-device", devices[1]]
    alone = ["--output", tmp_path / "one", "--device", "cpu"]
    for each in (where, alone):
        run("train", *run.source, *SIZES.split(), "--hook-name", "blocks.0.hook_resid_post", *each)
    assert explained(tmp_path / "two") == pytest.approx(explained(tmp_path / "one"), rel=1e-3)


def test_entropy(run, tmp_path, shadow):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32))
    bits = []
    for device in ("cpu", shadow):
        result = tmp_path / f"{device}.json"
        sizes = ["--d-sae", 16, "--steps", 20, "--batch-size", 64]
        run("entropy", "--vectors", tmp_path / "x.npy", *sizes, "--output", result, "--device", device)
        bits.append(json.loads(result.read_text())["bits"])
    assert bits[1] == pytest.approx(bits[0], rel=1e-3)


@pytest.mark.slow
def test_dynamics(run, tmp_path, shadow):
    bits = []
    for device in ("cpu", shadow):
        sizes = [
            "--layers",
            "0",
            "--max-position",
            "8",
            "--windows",
            "60",
            "--steps",
            "20",
            "--batch-size",
            "16",
            "--d-sae",
            "16",
        ]
        run("dynamics", *run.source, *sizes, "--output", tmp_path / device, "--device", device)
        result = json.loads((tmp_path / device / "dynamics.json").read_text())
        bits.append([cell["estimate"]["bits"] for cell in result["cells"]])
    assert bits[1] == pytest.approx(bits[0], rel=1e-3)


def test_no_command_is_missing_here():
    tested = {"train", "comsem", "compress", "decompress", "compare", "entropy", "dynamics"}
    assert tested | THE_SAME_AS_COMPARE | COMPUTING_NOTHING == COMMANDS.keys()
