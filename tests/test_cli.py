import json
import os
import re
import signal
import subprocess
import sys
import time

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


def test_train_runs_on_a_bridge_and_resolves_its_aliases(train, tmp_path, monkeypatch):
    def refuse(_folder):
        raise NotImplementedError

    monkeypatch.setattr("transformer_lens.loading_from_pretrained.convert_hf_model_config", refuse)
    train()
    bae = SAE.load_from_disk(tmp_path / "run" / "dictionaries" / "bae")
    assert bae.cfg.metadata.hook_name == "blocks.0.hook_out"
    assert bae.cfg.metadata.model_class_name == "SAETransformerBridge"


def test_train_takes_other_architectures_and_its_fields(train, tmp_path):
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
    monkeypatch.setattr("bae_lens.comparison.evaluate_dictionary", lambda *_: pytest.fail("measured again"))
    train()
    second = json.loads((tmp_path / "run" / "result.json").read_text())
    assert second["dictionaries"] == first["dictionaries"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hook-name", "blocks.0.resid"], "the model has no hook 'blocks.0.resid'"),
        (["--architecture", "bea"], "architecture must be one of"),
        (["--config", "k", "3"], "TrainingBAEConfig takes d_sae, dtype"),
        (["--config", "entropy_coefficient", "-1"], "entropy_coefficient must be at least 0 and finite, got -1"),
        (["--expansion", "0"], "d_sae must be at least 1, got 0"),
        (["--config", "d_in", "17"], "but no 'd_in'"),
        (["--config", "target_l0", "eight"], "bae cannot be made with {'target_l0': 'eight'}"),
        (["--config", "target_l0", "8", "entropy_coefficient", "0"], "must then be positive, got 0"),
        (["--config", "normalize_activations", "layer_norm"], "the hidden states are standardised already"),
        (["--config", "apply_encoder_bias", "false"], "cannot be made with"),
        (["--architecture", "topk", "--config", "k", "65"], "topk cannot be made with"),
        (["--architecture", "topk", "--config", "k", "abc"], "cannot be made with"),
        (["--device", "cuda:99"], "device 'cuda:99' is not available"),
        (["--lr", "0"], "lr must be positive, got 0.0"),
        (["--context-size", "65"], "context_size must be at most the model's 64, got 65"),
        (["--harvest-tokens", "31"], "harvest_tokens must be at least a batch (32), got 31"),
        (["--text-column", "body"], "has no column 'body' of strings; choose its text column among text"),
        (["--text", "missing.jsonl"], "found no text at missing.jsonl"),
    ],
)
def test_users_error_ends_with_one_line(train, capsys, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as stop:
        train(*arguments)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "run").exists()


def test_settings_out_of_range_are_refused_before_anything_is_loaded(train, capsys, monkeypatch):
    monkeypatch.setattr("bae_lens.cli.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit):
        train("--batch-size", "1")
    assert "batch_size must be at least 2, got 1" in re.sub(r"[│\s]+", " ", capsys.readouterr().err)


def test_killed_and_interrupted_runs_go_on_where_they_were(tiny_model_folder, words, tmp_path):
    sizes = "--harvest-tokens 2000 --held-out-tokens 120 --context-size 16 --training-tokens 640000 --batch-size 32"
    command = [sys.executable, "-m", "bae_lens", "train", "--model", str(tiny_model_folder), "--text", str(words)]
    command += [*sizes.split(), "--hook-name", "blocks.0.hook_resid_post", "--output", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def stopped_by(number: signal.Signals) -> tuple[int, str]:
        """Stops the command when it says that it is training."""
        log = tmp_path / f"{number.name}.log"
        with log.open("w") as stderr, subprocess.Popen(command, stderr=stderr, env=environment) as process:
            while "training bae" not in log.read_text() and process.poll() is None:
                time.sleep(0.1)
            time.sleep(0.5)
            process.send_signal(number)
        return process.returncode, log.read_text()

    assert stopped_by(signal.SIGKILL)[0] == -signal.SIGKILL
    status, err = stopped_by(signal.SIGINT)
    assert (status, err.splitlines()[-1]) == (130, "interrupted; the same command goes on from here")
    assert "hidden states" not in err
    (checkpoint,) = (tmp_path / "run" / "checkpoints" / "bae").iterdir()
    assert int(checkpoint.name) > 0


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
