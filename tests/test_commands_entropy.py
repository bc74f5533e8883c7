import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bae_lens import cli
from bae_lens.commands.dynamics import default_layers
from bae_lens.commands.entropy import read_vectors
from bae_lens.fit import FitSettings, fit_bae
from bae_lens.synthetic import random_directions

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def vectors():
    return random_directions(400, 3, 8, torch.Generator().manual_seed(0)).vectors


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `bae-lens` and returns what it prints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bae-lens", *map(str, arguments)])
        cli.main()
        return capsys.readouterr().out

    return run


def test_vectors_of_every_kind_of_file(vectors, tmp_path):
    np.save(tmp_path / "x.npy", vectors.numpy().astype(np.float64))
    torch.save(vectors, tmp_path / "x.pt")
    save_file({"x": vectors.contiguous()}, tmp_path / "x.safetensors")
    for path in tmp_path.iterdir():
        torch.testing.assert_close(read_vectors(path), vectors)


class Exploding:
    def __reduce__(self):
        return (print, ("executed",))


def test_files_that_hold_anything_else_are_refused(vectors, tmp_path, capsys):
    torch.save([vectors], tmp_path / "list.pt")
    torch.save(Exploding(), tmp_path / "code.pt")
    np.save(tmp_path / "code.npy", np.array([Exploding()], dtype=object))
    np.save(tmp_path / "flat.npy", np.zeros(5))
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    save_file({"x": vectors.contiguous(), "y": vectors.clone()}, tmp_path / "two.safetensors")
    messages = {
        "list.pt": "got a list",
        "code.pt": "cannot be read",
        "code.npy": "cannot be read",
        "flat.npy": r"got shape \(5,\)",
        "broken.safetensors": "cannot be read",
        "two.safetensors": "2 arrays",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            read_vectors(tmp_path / name)
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"ends in \.npy, \.pt, \.safetensors"):
        read_vectors(tmp_path / "x.csv")
    with pytest.raises(FileNotFoundError):
        read_vectors(tmp_path / "missing.npy")


def test_entropy_with_a_saved_dictionary(command, vectors, tmp_path):
    np.save(tmp_path / "x.npy", vectors.numpy())
    fit_bae(vectors, 12, settings=FitSettings(steps=300, batch_size=64, lr=3e-2)).save_model(tmp_path / "bae")
    arguments = ("--vectors", tmp_path / "x.npy", "--dictionary", tmp_path / "bae", "--output", tmp_path / "out.json")
    text = command("entropy", *arguments)
    assert "over 400 vectors" in text
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["bits"] == pytest.approx(3.0, abs=0.05)


def test_entropy_fits_a_dictionary_and_measures_the_rest(command, vectors, tmp_path):
    np.save(tmp_path / "x.npy", vectors.numpy())
    text = command("entropy", "--vectors", tmp_path / "x.npy", "--steps", 20, "--batch-size", 32)
    assert "over 80 vectors" in text
    assert "of 32 features vary" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a file"),
        (("--vectors", "x.npy", "--batch-size", "1000"), "at least a batch of 1000 vectors, got 320"),
    ],
)
def test_errors_are_one_line(command, vectors, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", vectors.numpy())
    with pytest.raises(SystemExit) as stop:
        command("entropy", *arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.splitlines()[-1].startswith("error: ")
    assert message in error


def test_dynamics_writes_table_json_and_figure(command, tiny_model_folder, tiny_dataset, tmp_path):
    text = tmp_path / "words.jsonl"
    text.write_text("\n".join(json.dumps({"text": row}) for row in tiny_dataset["text"][:400]))
    arguments = ("--model", tiny_model_folder, "--text", text, "--output", tmp_path / "run", "--max-position", 8)
    printed = command("dynamics", *arguments, "--windows", 400, "--steps", 10, "--d-sae", 16)
    assert "| distinct tokens |" in printed
    assert "blocks.1.hook_resid_post" in printed
    result = json.loads((tmp_path / "run" / "dynamics.json").read_text())
    assert result["positions"] == [1, 2, 4, 8]
    assert (tmp_path / "run" / "dynamics.html").stat().st_size > 1_000_000


def test_dynamics_beyond_the_context_is_refused(command, tiny_model_folder, tmp_path, capsys):
    text = tmp_path / "words.txt"
    text.write_text("w1 w2 w3")
    with pytest.raises(SystemExit):
        command("dynamics", "--model", tiny_model_folder, "--text", text, "--output", tmp_path, "--max-position", 64)
    assert "below the model's context of 64, got 64" in capsys.readouterr().err


def test_default_layers_are_spread():
    assert default_layers(30) == [0, 5, 10, 15, 20, 25]
    assert default_layers(2) == [0, 1]
