import json
import re
import subprocess
import sys

import pytest
from sae_lens import SAE

from bae_lens import BAE, cli


@pytest.fixture
def words(tmp_path, tiny_dataset):
    path = tmp_path / "words.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in tiny_dataset["text"][:400]))
    return path


@pytest.fixture
def train(monkeypatch, tiny_model_folder, words, tmp_path):
    """Runs `bae-lens train` on the tiny model with small sizes; further arguments come last."""

    def run(*arguments):
        sizes = "--harvest-tokens 600 --held-out-tokens 120 --context-size 16 --training-tokens 640 --batch-size 32"
        command = ["bae-lens", "train", "--model", str(tiny_model_folder), "--text", str(words), *sizes.split()]
        command += ["--hook-name", "blocks.0.hook_resid_post", "--output", str(tmp_path / "run"), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        cli.main()

    return run


def test_train_writes_report_result_and_dictionary(train, tmp_path, capsys):
    train("--config", "target_l0", "8")
    assert "| bae |" in capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["dictionaries"][0]["architecture"] == "bae"
    assert (tmp_path / "run" / "report.html").stat().st_size > 1_000_000
    bae = SAE.load_from_disk(tmp_path / "run" / "dictionaries" / "bae")
    assert isinstance(bae, BAE)
    assert bae.cfg.to_dict()["metadata"]["training_architecture_details"]["target_l0"] == 8


def test_train_takes_any_architecture_and_its_fields(train, tmp_path):
    train("--architecture", "topk", "--config", "k", "4")
    assert SAE.load_from_disk(tmp_path / "run" / "dictionaries" / "topk").cfg.k == 4


def test_paper_preset_is_trained_with_its_own_learning_rate(train, tmp_path):
    train("--preset", "paper")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["dictionaries"][0]["lr"] == 5e-4


def test_second_run_reuses_everything(train, tmp_path, monkeypatch):
    train()
    first = json.loads((tmp_path / "run" / "result.json").read_text())
    monkeypatch.setattr("bae_lens.harvest._harvest_missing", lambda *_: pytest.fail("harvested again"))
    monkeypatch.setattr("bae_lens.training._Run", lambda *_: pytest.fail("trained again"))
    train()
    second = json.loads((tmp_path / "run" / "result.json").read_text())
    assert second["dictionaries"] == first["dictionaries"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hook-name", "blocks.0.resid"], "the model has no hook 'blocks.0.resid'"),
        (["--architecture", "bea"], "architecture must be one of"),
        (["--config", "k", "3"], "TrainingBAEConfig has no field 'k'; its fields are"),
        (["--config", "entropy_coefficient", "-1"], "entropy_coefficient must be at least 0 and finite, got -1"),
        (["--expansion", "0"], "d_sae must be at least 1, got 0"),
        (
            ["--batch-size", "512", "--training-tokens", "1024", "--harvest-tokens", "30"],
            "a batch of 512 needs as many",
        ),
        (["--text", "missing.jsonl"], "found no text at missing.jsonl"),
    ],
)
def test_users_error_ends_with_one_line(train, capsys, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as stop:
        train(*arguments)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "run" / "dictionaries").exists()


def test_mistyped_hook_does_not_take_the_folder(train, tmp_path):
    with pytest.raises(SystemExit):
        train("--hook-name", "blocks.0.resid")
    assert not (tmp_path / "run").exists()


def test_settings_out_of_range_are_refused_before_anything_is_loaded(train, capsys, monkeypatch):
    monkeypatch.setattr("bae_lens.cli.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit):
        train("--batch-size", "1")
    assert "batch_size must be at least 2, got 1" in re.sub(r"[│\s]+", " ", capsys.readouterr().err)


def test_interruption_says_how_to_go_on(train, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("bae_lens.cli.compare", interrupt)
    with pytest.raises(SystemExit) as stop:
        train()
    assert stop.value.code == "interrupted; the same command goes on from here"


def test_demo_compares_four_dictionaries_with_the_same_rate():
    recipes = cli.Demo(l0=16).recipes(d_in=8)
    assert list(recipes) == ["BAE", "ReLU", "Top-k", "Gated"]
    assert {recipe.cfg.d_sae for recipe in recipes.values()} == {32}
    assert recipes["BAE"].cfg.to_dict()["target_l0"] == 16
    assert recipes["Top-k"].cfg.to_dict()["k"] == 16


def test_module_runs_as_the_command():
    help_text = subprocess.run([sys.executable, "-m", "bae_lens", "--help"], capture_output=True, text=True, check=True)
    assert "demo" in help_text.stdout
    assert "train" in help_text.stdout
