import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE, Transcoder
from transformers import LlamaForCausalLM

import bae_lens
from bae_lens import BAE, extras
from bae_lens.activations import precision
from bae_lens.cli import main as cli
from bae_lens.cli.demo import Demo
from bae_lens.cli.scored import scored_run
from bae_lens.cli.train import Train
from bae_lens.cli.upload import dictionaries_in
from bae_lens.saes.transcoder import hooks_of


@pytest.fixture
def words(tmp_path, tiny_dataset):
    path = tmp_path / "words.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in tiny_dataset["text"][:400]))
    return path


@pytest.fixture
def train(monkeypatch, tiny_model_folder, words, tmp_path):
    """Runs `bae-lens train` on the tiny model with small sizes; further arguments come last."""

    def run(*arguments):
        sizes = "--cached-tokens 600 --held-out-tokens 120 --context-size 16 --training-tokens 640 --batch-size 32"
        command = ["bae-lens", "train", "--model", str(tiny_model_folder), "--dataset", str(words), *sizes.split()]
        command += ["--hook-name", "blocks.0.hook_resid_post", "--output", str(tmp_path / "run"), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        cli.main()

    return run


def test_train_writes_report_result_and_dictionary(train, tmp_path, capsys):
    train("--set", "target_l0", "8")
    out = capsys.readouterr().out
    assert "\nbae  " in out
    run = tmp_path / "run"
    assert out.endswith(f"results and dictionaries are in {run}; the report to open is {run / 'report.html'}\n")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["dictionaries"][0]["architecture"] == "bae"
    assert (tmp_path / "run" / "report.html").stat().st_size > 1_000_000
    bae = SAE.load_from_disk(tmp_path / "run" / "dictionaries" / "bae")
    assert isinstance(bae, BAE)
    assert bae.cfg.to_dict()["metadata"]["training_architecture_details"]["target_l0"] == 8
    card = (tmp_path / "run" / "dictionaries" / "bae" / "README.md").read_text(encoding="utf-8")
    metrics = json.loads((tmp_path / "run" / "dictionaries" / "bae" / "metrics.json").read_text())
    assert f"\n| explained variance | {metrics['explained_variance']:.3f} | " in card
    assert "](explained_variance_by_bits.png)" in card
    assert (tmp_path / "run" / "dictionaries" / "bae" / "explained_variance_by_bits.png").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_train_in_half_precision(train, tmp_path, dtype):
    train("--model-dtype", dtype, "--cache-dtype", dtype, "--autocast")
    run = tmp_path / "run"
    array = np.load(run / "activations" / "train" / "blocks.0.hook_resid_post" / "activations.npy", mmap_mode="r")
    assert array.itemsize == 2
    result = json.loads((run / "result.json").read_text())
    assert result["experiment"]["model_dtype"] == result["experiment"]["cache_dtype"] == dtype
    assert result["dictionaries"][0]["runs"][0]["metrics"]["explained_variance"] > 0.1


def test_a_dtype_that_the_device_cannot_do_is_refused_in_a_sentence(train, monkeypatch, capsys):
    monkeypatch.setattr(precision, "torch_dtype", lambda name: torch.quint8 if name == "float16" else torch.float32)
    with pytest.raises(SystemExit) as end:
        train("--model-dtype", "float16")
    assert end.value.code == 2
    assert re.search(
        r"error: the device cpu cannot compute in float16: .*; choose another dtype\n", capsys.readouterr().err
    )


def test_train_goes_on_without_the_text(train, words, tmp_path):
    train("--set", "target_l0", "8")
    first = (tmp_path / "run" / "dictionaries" / "bae" / "sae_weights.safetensors").read_bytes()
    words.unlink()
    shutil.rmtree(tmp_path / "run" / "dictionaries")
    train("--set", "target_l0", "8")
    assert (tmp_path / "run" / "dictionaries" / "bae" / "sae_weights.safetensors").read_bytes() == first


def test_train_runs_on_a_bridge_and_resolves_its_aliases(train, tmp_path, monkeypatch):
    def refuse(_folder):
        raise NotImplementedError

    monkeypatch.setattr("bae_lens.saes.saelens_compat.convert_hf_model_config", refuse)
    train()
    bae = SAE.load_from_disk(tmp_path / "run" / "dictionaries" / "bae")
    assert bae.cfg.metadata.hook_name == "blocks.0.hook_out"
    assert bae.cfg.metadata.model_class_name == "SAETransformerBridge"


def test_train_on_a_model_by_a_device_map_is_that_on_a_bridge(train, tmp_path, capsys):
    train("--device-map", '{"": "cpu"}')
    with pytest.raises(SystemExit):
        train("--device-map", '{"": "cpu"}', "--model-device", "cpu", "--output", str(tmp_path / "other"))
    assert (
        "a model runs on one device or by a device map, got both; leave out cpu or the map" in capsys.readouterr().err
    )
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["dictionaries"][0]["runs"][0]["metrics"]["explained_variance"] > 0.1


def test_train_takes_other_architectures_and_its_fields(train, tmp_path):
    train("--architecture", "topk", "--set", "k", "4")
    assert SAE.load_from_disk(tmp_path / "run" / "dictionaries" / "topk").cfg.k == 4


def test_train_takes_words_of_yaml_and_of_python(train, tmp_path):
    for word in ("true", "True"):
        output = tmp_path / word
        where = ("--hook-name", "blocks.0.mlp.hook_in", "--output", str(output))
        train("--architecture", "topk_transcoder", "--set", "k", "4", "skip", word, *where)
        assert SAE.load_from_disk(output / "dictionaries" / "topk_transcoder").cfg.skip is True


def test_paper_preset_is_trained_with_its_own_learning_rate(train, tmp_path):
    train("--preset", "paper")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["dictionaries"][0]["recipe"]["lr"] == 5e-4


def test_model_that_was_replaced_in_its_folder_is_another_one(train, tiny_model_folder, tmp_path, capsys):
    folder = tmp_path / "latest"
    shutil.copytree(tiny_model_folder, folder)
    train("--model", str(folder))
    model: Any = LlamaForCausalLM.from_pretrained(folder)
    model.model.layers[0].mlp.down_proj.weight.data.mul_(1.01)
    model.save_pretrained(folder)
    with pytest.raises(SystemExit) as stop:
        train("--model", str(folder))
    assert stop.value.code == 2
    assert "holds something else (model_weights: " in capsys.readouterr().err.splitlines()[-1]


def test_dynamics_of_a_model_that_was_replaced_are_not_those_of_the_first(
    monkeypatch, tiny_model_folder, words, tmp_path, capsys
):
    folder = tmp_path / "latest"
    shutil.copytree(tiny_model_folder, folder)
    sizes = [
        "--max-position",
        "2",
        "--windows",
        "40",
        "--windows-per-document",
        "1",
        "--steps",
        "4",
        "--batch-size",
        "8",
        "--layers",
        "0",
    ]
    command = ["dynamics", "--output", str(tmp_path / "o"), "--model", str(folder), "--dataset", str(words), *sizes]
    monkeypatch.setattr(sys, "argv", ["bae-lens", *command])
    cli.main()
    model: Any = LlamaForCausalLM.from_pretrained(folder)
    model.model.layers[0].mlp.down_proj.weight.data.mul_(1.01)
    model.save_pretrained(folder)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "holds something else (model_weights: " in capsys.readouterr().err.splitlines()[-1]


def test_run_names_its_local_model_and_text_by_absolute_paths(train, tiny_model_folder, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    train("--model", "model", "--dataset", words.name)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run["model"], run["dataset"]) == (str(tmp_path / "model"), str(words))
    monkeypatch.chdir(tiny_model_folder)
    train("--model", str(tmp_path / "model"))  # the same run, from elsewhere


@pytest.mark.skipif(not Path("/dev/shm").exists() or os.geteuid() != 0, reason="mounts a small disk")
def test_full_disk_ends_with_one_line(train, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], check=False).returncode:
        pytest.skip("cannot mount")
    try:
        with pytest.raises(SystemExit) as stop:
            train("--output", str(disk / "run"), "--cached-tokens", "1500")
    finally:
        subprocess.run(["umount", disk], check=True)
    assert stop.value.code == 2
    assert "No space left on device: " in capsys.readouterr().err.splitlines()[-1]


def test_second_run_reuses_everything(train, tmp_path, monkeypatch):
    train()
    first = json.loads((tmp_path / "run" / "result.json").read_text())
    monkeypatch.setattr("bae_lens.activations.cache_writer._cache_missing", lambda *_: pytest.fail("cached again"))
    monkeypatch.setattr("bae_lens.training.trainer._Run", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr("bae_lens.comparison.comparing.evaluate_dictionary", lambda *_: pytest.fail("measured again"))
    train()
    second = json.loads((tmp_path / "run" / "result.json").read_text())
    assert second["dictionaries"] == first["dictionaries"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hook-name", "blocks.0.resid"], "the model has no hook 'blocks.0.resid'"),
        (["--architecture", "bea"], "architecture must be one of"),
        (["--set", "k", "3"], "TrainingBAEConfig takes apply_b_dec_to_input, "),
        (["--set", "entropy_coefficient", "-1"], "entropy_coefficient must be at least 0 and finite, got -1"),
        (["--expansion", "0"], "d_sae must be at least 1, got 0"),
        (["--set", "d_in", "17"], "but no 'd_in'"),
        (["--set", "target_l0", "eight"], "bae: target_l0: Input should be a valid number, got 'eight'"),
        (["--set", "target_l0", "8", "entropy_coefficient", "0"], "must then be positive, got 0"),
        (["--set", "normalize_activations", "layer_norm"], "the activations are standardized already"),
        (
            ["--set", "apply_encoder_bias", "no"],
            "apply_encoder_bias: Input should be a valid boolean, got 'no'",
        ),
        (["--architecture", "topk", "--set", "k", "65"], "topk cannot be made with"),
        (["--architecture", "topk", "--set", "k", "abc"], "topk: k: Input should be a valid integer, got 'abc'"),
        (["--device", "cuda:99"], "device 'cuda:99' is not available"),
        (["--lr", "0"], "lr must be positive and finite, got 0.0"),
        (["--context-size", "65"], "context_size must be at most the model's 64, got 65"),
        (["--cached-tokens", "31"], "cached_tokens must be at least a batch (32), got 31"),
        (["--text-column", "body"], "has no column 'body' of strings; choose its text column among text"),
        (
            ["--architecture", "transcoder", "--hook-name-out", "blocks.0.nowhere"],
            "the model has no hook 'blocks.0.nowhere'",
        ),
        (
            ["--hook-name-out", "blocks.0.hook_mlp_out"],
            "only transcoders take hook_name and hook_name_out, and bae is none",
        ),
        (["--dataset", "missing.jsonl"], "found no text at missing.jsonl"),
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
    monkeypatch.setattr("bae_lens.cli.experiment.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit):
        train("--batch-size", "1")
    assert "batch_size must be at least 2, got 1" in re.sub(r"[│\s]+", " ", capsys.readouterr().err)


@pytest.mark.slow
def test_killed_and_interrupted_runs_go_on_where_they_were(tiny_model_folder, words, tmp_path):
    sizes = "--cached-tokens 2000 --held-out-tokens 120 --context-size 16 --training-tokens 640000 --batch-size 32"
    command = [sys.executable, "-m", "bae_lens", "train", "--model", str(tiny_model_folder), "--dataset", str(words)]
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
    assert "activations" not in err
    (checkpoint,) = (tmp_path / "run" / "checkpoints" / "bae").iterdir()
    assert int(checkpoint.name) > 0


def test_train_takes_a_transcoder_that_writes_elsewhere(train, tmp_path, capsys):
    hooks = ("blocks.0.mlp.hook_in", "blocks.1.mlp.hook_post")
    train(
        "--architecture", "transcoder", "--hook-name", hooks[0], "--hook-name-out", hooks[1], "--set", "lp_norm", "2.0"
    )
    sae = SAE.load_from_disk(tmp_path / "run" / "dictionaries" / "transcoder")
    assert type(sae) is Transcoder
    assert hooks_of(sae) == hooks
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.d_out) == (16, 64, 32)
    assert "\ntranscoder writes at blocks.1.mlp.hook_post: " in capsys.readouterr().out


@pytest.mark.parametrize("architecture", ["topk_transcoder", "binary_transcoder"])
def test_transcoder_writes_at_the_output_of_its_layers_mlp_by_default(train, tmp_path, architecture):
    arguments = ("--set", "k", "4") if architecture == "topk_transcoder" else ()
    train("--architecture", architecture, "--hook-name", "blocks.1.mlp.hook_in", *arguments)
    sae = SAE.load_from_disk(tmp_path / "run" / "dictionaries" / architecture)
    assert hooks_of(sae) == ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")


@pytest.fixture
def main(monkeypatch, tiny_model_folder, words, tmp_path):
    """Runs `bae-lens compare` with small sizes; arguments come first."""

    def run(*arguments):
        sizes = "--cached-tokens 600 --held-out-tokens 120 --tuning-tokens 120 --context-size 16"
        command = ["bae-lens", "compare", *arguments, "--model", str(tiny_model_folder), "--dataset", str(words)]
        command += [*sizes.split(), "--hook-name", "blocks.0.hook_resid_post", "--output", str(tmp_path / "run")]
        monkeypatch.setattr(sys, "argv", command)
        cli.main()

    return run


TRAINING = ("--training-tokens", "320", "--batch-size", "32")


def test_compare_runs_end_to_end_from_flags(main, tmp_path, capsys):
    arguments = ("--architectures", "bae", "topk", "transcoder", "--l0", "4", "--trials", "2", "--seeds", "0", "1")
    main(*arguments, *TRAINING)
    out = capsys.readouterr().out
    assert [line.split("  ")[0] for line in out.splitlines()[3:6]] == ["BAE", "Top-k", "Transcoder"]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [(len(d["trials"]), [run["seed"] for run in d["runs"]]) for d in result["dictionaries"]] == [(2, [0, 1])] * 3
    assert (result["experiment"]["l0"], result["experiment"]["seeds"]) == (4.0, [0, 1])
    assert [d["hook_name_out"] for d in result["dictionaries"]][1:] == [
        "blocks.0.hook_resid_post",
        "blocks.0.hook_mlp_out",
    ]
    assert len(list((tmp_path / "run" / "saebench").iterdir())) == 6
    assert (tmp_path / "run" / "report.html").exists()
    names = [stage["name"] for stage in result["stages"]]
    assert {"load model and text", "activations", "train BAE", "tune BAE", "measure BAE"} <= set(names)


def test_compare_reads_a_file_that_flags_override(main, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text("""
seeds: [7]
expansion: 2
l0: 5
contexts: {context_size: 24, contexts_per_document: 3}
training: {training_tokens: 640, batch_size: 32}
dictionaries:
  two: {architecture: topk, config: {k: 2}}
  three: {architecture: topk, config: {k: 3}, lr: 0.01}
""")
    main(str(path), "--training-tokens", "320")
    assert "\ntwo  " in capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    experiment = result["experiment"]
    assert (experiment["seeds"], experiment["l0"]) == ([7], 5.0)
    assert experiment["training"]["training_tokens"] == 320  # the flag, not the file
    assert experiment["training"]["batch_size"] == 32
    assert (experiment["contexts"]["context_size"], experiment["contexts"]["contexts_per_document"]) == (16, 3)
    assert [(d["name"], d["d_sae"], d["recipe"]["k"], d["recipe"]["lr"]) for d in result["dictionaries"]] == [
        ("two", 32, 2, 1e-3),
        ("three", 32, 3, 0.01),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sedes: [1]", "contexts, dataset, dataset_split, device, device_map, documents, every_help, expansion"),
        ("output: here", "dictionaries at the top, got {'output': 'here'}"),
        ("training: {batch: 3}", "takes autocast, batch_size, compile, lr_decay, training_tokens here"),
        ("expansion: four", "expansion: Input should be a valid integer, got 'four'"),
        ("expansion: 4.5", "expansion: Input should be a valid integer, got 4.5"),
        ("training: {batch_size: 1}", "batch_size must be at least 2, got 1"),
        ("training: {lr_decay: much}", "lr_decay: Input should be a valid number, got 'much'"),
        ("trials: true", "trials: Input should be a valid integer, got True"),
        ("dataset: 3", "dataset: Input should be a valid string, got 3"),
        ("dictionaries: {a: {architecture: bae}, a: {architecture: topk}}", "'a' comes twice"),
        ("architectures: [bae, nonsense]", "'nonsense' has no default settings; it must be one of bae"),
        ("trials: 0", "trials must be at least 1, got 0"),
        ("seeds: []", "seeds must be different, at least one, got []"),
        ("seeds: [1, 1]", "seeds must be different, at least one, got [1, 1]"),
        (
            "dictionaries: {a: {architecture: bae}, b: {architecture: topk, trials: [{k: 2}, {k: 3}]}}",
            "the same number of trials, at least one, got a: 1, b: 2",
        ),
        ("dictionaries: {a: {architecture: bae, config: {nonsense: 1}}}", "but no 'nonsense'"),
        (
            "dictionaries: {a: {architecture: bae, hook_name_out: x}}",
            "only transcoders take hook_name and hook_name_out",
        ),
    ],
)
def test_file_that_cannot_be_ends_with_one_line(main, tmp_path, capsys, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(str(tmp_path / "config.yaml"))
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("seeds", "seeds: 3"),
        ("seeds", "seeds: [a]"),
        ("architectures", "architectures: bae"),
        ("contexts", "contexts: 5"),
        ("lr_decay", "training: {lr_decay: [1]}"),
        ("dictionaries", "dictionaries: [bae]"),
    ],
)
def test_wrong_type_in_a_file_is_named(main, tmp_path, capsys, key, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(str(tmp_path / "config.yaml"), *TRAINING)
    assert stop.value.code == 2
    assert key in capsys.readouterr().err.splitlines()[-1]


def test_file_that_is_missing_ends_with_one_line(main, capsys):
    with pytest.raises(SystemExit) as stop:
        main("missing.yaml")
    assert stop.value.code == 2
    assert "No such file or directory: 'missing.yaml'" in capsys.readouterr().err


def test_folder_of_another_comparison_is_refused_with_the_difference(main, capsys):
    main("--architectures", "topk", "--l0", "4", *TRAINING)
    with pytest.raises(SystemExit) as stop:
        main("--architectures", "topk", "--l0", "4", "--training-tokens", "640", "--batch-size", "32")
    assert stop.value.code == 2
    assert "holds something else (training.training_tokens: 320 there, 640 now)" in capsys.readouterr().err


def test_interruption_says_how_to_go_on(main, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("bae_lens.comparison.comparing.train_dictionary", interrupted)
    with pytest.raises(SystemExit) as stop:
        main("--architectures", "topk", "--l0", "4", *TRAINING)
    assert stop.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; the same command goes on from here"


def test_interrupted_compression_says_that_it_starts_over(monkeypatch, capsys, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("bae_lens.cli.compress.load_bae", interrupted)
    paths = ["--vectors", "states.npy", "--dictionary", "bae", "--output", str(tmp_path / "states.bae")]
    monkeypatch.setattr(sys, "argv", ["bae-lens", "compress", *paths])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; the same command starts over"


def test_demo_has_a_larger_budget_in_full_and_flags_go_before_it():
    assert Demo.defaults([]) == Demo()
    full = Demo.defaults(["--full"])
    assert full.contexts.cached_tokens == 2 * Demo().contexts.cached_tokens
    assert full.training.training_tokens == 2 * Demo().training.training_tokens
    given = cli._command("demo", ["--full", "--training-tokens", "1024"])
    assert (given.full, given.training.training_tokens, given.contexts) == (True, 1024, full.contexts)
    assert sum(full.expected_seconds().values()) > 1.8 * sum(Demo().expected_seconds().values())


def test_demo_compares_five_dictionaries(tiny_model):
    contenders = Demo(l0=16).contenders(tiny_model, "blocks.1.hook_resid_post")
    assert list(contenders) == ["BAE", "ReLU", "Top-k", "Gated", "Top-k transcoder"]
    recipes = {name: contender.trials[0].to_dict() for name, contender in contenders.items()}
    assert {recipe["d_sae"] for recipe in recipes.values()} == {64}
    assert recipes["BAE"]["target_l0"] == 16
    assert recipes["Top-k"]["k"] == 16
    rates = [recipe["lr"] for recipe in recipes.values()]
    longer = Demo(full=True).contenders(tiny_model, "blocks.1.hook_resid_post")
    assert rates == [6e-3, 2e-3, 2e-3, 2e-3, 2e-3]
    assert [contender.trials[0].lr for contender in longer.values()] == [6e-3, 1e-3, 1e-3, 1e-3, 1e-3]
    transcoder = contenders["Top-k transcoder"]
    assert (transcoder.hook_name, transcoder.hook_name_out) == ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")


def test_module_runs_as_the_command_and_imports_none_to_list_them():
    script = "import runpy, sys; sys.argv[1:] = ['--help']; runpy.run_module('bae_lens', run_name='__main__')"
    run = subprocess.run([sys.executable, "-X", "importtime", "-c", script], capture_output=True, text=True, check=True)
    for command in cli.COMMANDS:
        assert re.search(rf"^  {command} +\w", run.stdout, re.MULTILINE)
    imported = {line.split("|")[-1].strip() for line in run.stderr.splitlines()}
    assert not imported & {"torch", "tyro", "sae_lens", "numpy"}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_has_its_own_help(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", ["bae-lens", name, "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert f"usage: bae-lens {name}" in capsys.readouterr().out


def test_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bae-lens", "--version"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"bae-lens {bae_lens.__version__}\n"


@pytest.mark.parametrize(
    ("shortage", "told"),
    [
        (
            lambda: _raise(
                torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 is full. Try")
            ),
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 is full;",
        ),
        (lambda: torch.empty(10**14), "got DefaultCPUAllocator: can't allocate memory: you tried to allocate 4"),
        (lambda: np.empty(10**14), "Unable to allocate 728. TiB for an array with shape (100000000000000,) and "),
        (lambda: _raise(MemoryError()), "MemoryError;"),
    ],
)
def test_too_little_memory_is_told_in_a_sentence(monkeypatch, capsys, shortage, told):
    _give_command(monkeypatch, shortage)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("error: what is at work must fit in memory, got ")
    assert told in message
    assert message.endswith("choose a smaller batch, dictionary or model, a narrower dtype, or more devices")


def test_an_error_that_is_not_the_users_is_shown_whole(monkeypatch):
    _give_command(monkeypatch, lambda: _raise(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


def _give_command(monkeypatch, run):
    monkeypatch.setattr(cli, "_command", lambda *_: SimpleNamespace(run=run))
    monkeypatch.setattr(sys, "argv", ["bae-lens", "train"])


def _raise(error):
    raise error


def test_unknown_command_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bae-lens", "trian"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


def test_missing_extra_ends_with_one_line(monkeypatch, capsys):
    for module in [name for name in sys.modules if name.startswith(("bae_lens.compression", "bae_lens.cli.compress"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "constriction", None)
    monkeypatch.setattr(sys, "argv", ["bae-lens", "compress", "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    expected = 'error: this needs constriction; pip install "bae-lens[compression]" brings it\n'
    assert capsys.readouterr().err == expected


def test_a_run_without_the_report_s_libraries_is_whole_but_for_the_report(train, tmp_path, monkeypatch, capsys):
    find_spec = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda package: None if package == "plotly" else find_spec(package))
    train()
    assert 'after pip install "bae-lens[report]" the same command adds a report' in capsys.readouterr().out
    assert (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "run" / "report.html").exists()


HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")


def test_train_at_several_hooks_gives_each_a_run_of_its_own(train, tmp_path, capsys):
    hooks = ("blocks.0.hook_resid_mid", "blocks.1.hook_resid_mid")
    train("--hook-name", "blocks.{0,1}.hook_resid_mid", "--architecture", "topk_transcoder", "--set", "k", "4")
    out, run = capsys.readouterr().out, tmp_path / "run"
    assert out.count("topk_transcoder  ") == 2
    assert out.endswith(f"results over layers are in {run}; the report to open is {run / 'report.html'}\n")
    result = bae_lens.HookComparisons.from_dict(json.loads((run / "result.json").read_text()))
    assert result.hook_names == list(hooks)
    assert [row.hook_name_out for row in result.rows] == ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]
    assert (run / "report.html").exists()
    for hook in hooks:
        home = run / "hooks" / hook
        assert (home / "report.html").exists()
        assert hooks_of(SAE.load_from_disk(home / "dictionaries" / "topk_transcoder"))[0] == hook
        assert (home / "dictionaries" / "topk_transcoder" / "README.md").exists()
        assert list(scored_run(home, (), None).dictionaries) == ["topk_transcoder"]
    assert list(dictionaries_in(run)) == [f"{hook}/topk_transcoder" for hook in hooks]
    with pytest.raises(
        ValueError,
        match=f"of one hook are needed, and .*run has those of 2 in .*hooks; choose one of .* such as {hooks[0]}",
    ):
        scored_run(run, (), None)
    with pytest.raises(SystemExit):
        train()
    assert "holds a run at several hooks, but this is one at one" in capsys.readouterr().err


@pytest.mark.parametrize(("n_processes", "shared"), [(2, False), (3, True)])
def test_train_shares_steps_where_there_are_fewer_hooks_than_processes(monkeypatch, tmp_path, n_processes, shared):
    asked = []
    monkeypatch.setattr("bae_lens.cli.train.n_launched", lambda: n_processes)
    monkeypatch.setattr("bae_lens.cli.train.summary_at_hooks", lambda *_, **options: asked.append(options) or "")
    Train(output=tmp_path / "run", hook_name=HOOKS, device="cpu").run()
    assert [options["share_steps"] for options in asked] == [shared]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hook-name"], "name where in the model activations are taken with --hook-name, or files"),
        (["--hook-name", *HOOKS, HOOKS[0]], f"hooks must be different, got {HOOKS[0]} twice"),
        (["--hook-name", "hook_embed", HOOKS[0]], "several hooks must each be in a layer, as blocks.0.hook_resid_pre"),
        (["--hook-name", "blocks.{1..5}.hook_mlp_out"], "no hook 'blocks.2.hook_mlp_out'; near ones: "),
        (["--hook-name", HOOKS[0], "blocks.0.mlp.hook_post", "--set", "d_sae", "64"], "widths are 16 at blocks.0.h"),
        (
            ["--hook-name", *HOOKS, "--architecture", "transcoder", "--hook-name-out", "blocks.1.hook_mlp_out"],
            "takes the MLP in the layer of each, but transcoder names blocks.1.hook_mlp_out; leave",
        ),
    ],
)
def test_hooks_that_cannot_be_end_with_one_line(train, capsys, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as stop:
        train(*arguments)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "run").exists()
