import json
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch

from bae_lens.cli import entropy as commands_entropy
from bae_lens.cli import main as cli
from bae_lens.cli.dynamics import default_layers
from bae_lens.cli.entropy import Entropy
from bae_lens.entropy import dynamics as dynamics_module
from bae_lens.entropy.fit import FitSettings, fit_bae
from bae_lens.entropy.results import EntropyDynamics
from bae_lens.entropy.synthetic import random_directions

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
        (("--vectors", "missing.npy"), "there is no file missing.npy"),
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


@pytest.fixture
def dynamics(command, tiny_model_folder, tiny_dataset, tmp_path):
    """Runs `bae-lens dynamics` on the tiny model."""
    text = tmp_path / "words.jsonl"
    text.write_text("\n".join(json.dumps({"text": row}) for row in tiny_dataset["text"][:400]))

    def run(*arguments):
        where = ("--model", tiny_model_folder, "--dataset", text, "--output", tmp_path / "run", "--max-position", 8)
        return command("dynamics", *where, "--steps", 10, "--d-sae", 16, *arguments)

    return run


def test_dynamics_writes_table_json_and_figure(dynamics, tmp_path):
    printed = dynamics("--windows", 400)
    assert "| distinct tokens |" in printed
    assert "| log2 of them |" in printed
    assert "blocks.1.hook_resid_post" in printed
    assert printed.count("| joint bits at EV ") == printed.count("| bits at price 0.01, all windows |") == 2
    result = json.loads((tmp_path / "run" / "dynamics.json").read_text())
    assert result["positions"] == [1, 2, 4, 8]
    assert len(EntropyDynamics.from_dict(result).cells) == 40
    assert (tmp_path / "run" / "dynamics.html").stat().st_size > 1_000_000
    assert (tmp_path / "run" / "dynamics.png").exists()
    stages = json.loads((tmp_path / "run" / "stages.json").read_text())
    assert [stage["name"] for stage in stages] == ["model and windows", "activations", "entropies"]


def test_dynamics_at_one_explained_variance(dynamics, tmp_path):
    prices = ("--entropy-coefficients", 0.01, 3)
    printed = dynamics("--windows", 60, "--batch-size", 16, "--explained-variance", 0.2, *prices)
    assert printed.count("| bits at EV 0.2 |") == 2
    assert "where it is not. 60 windows" in printed
    result = json.loads((tmp_path / "run" / "dynamics.json").read_text())
    views = EntropyDynamics.from_dict(result).views(0.2)
    assert result["views"] == json.loads(json.dumps([asdict(view) for view in views]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-position", 64), "below the model's context of 64, got 64"),
        (("--max-position", 0), "max_position must be at least 1, got 0"),
        (("--windows", 300), "a batch of 256 windows, and 2 of other documents held out, but 300 windows"),
        (("--explained-variance", 0.5, "--entropy-coefficients", 1), "give several --entropy-coefficients, got 1.0"),
        (("--explained-variance", 0.5, "--entropy-coefficients", 1, 1), "give several --entropy-coefficients"),
        (("--explained-variance", 1.5, "--entropy-coefficients", 1, 2), "must lie between 0 and 1, got 1.5"),
        (("--entropy-coefficients", "nan"), "must be finite and at least 0"),
        (("--d-sae", 0), "d_sae must be at least 1, got 0"),
    ],
)
def test_impossible_dynamics_are_refused_before_the_model_runs(dynamics, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(dynamics_module, "collect", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(SystemExit) as stop:
        dynamics(*arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_default_layers_are_spread():
    assert default_layers(30) == [5, 10, 15, 20]
    assert default_layers(2) == [0, 1]


def test_benchmark_compares_penalties_on_and_off_and_draws_them(tmp_path, monkeypatch):
    monkeypatch.setattr(commands_entropy, "SMALL_RANKS", (2,))
    monkeypatch.setattr(commands_entropy, "SMALL_WIDTHS", (8,))
    monkeypatch.setattr(commands_entropy, "SMALL_VECTORS", 2500)

    printed = Entropy(benchmark=True, output=tmp_path / "recovery.json").run()

    found = json.loads((tmp_path / "recovery.json").read_text())
    assert found["on"][0]["bits"] == pytest.approx(2, rel=0.01)
    assert found["off"][0]["bits"] > 4
    assert printed.count("| on |") == printed.count("| off |") == 1
    assert "penalties off" in (tmp_path / "recovery.html").read_text()
