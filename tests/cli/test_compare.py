import re
import sys
from pathlib import Path

import pytest

from bae_lens.cli import compare as command_module
from bae_lens.cli import main as cli
from bae_lens.cli.compare import Compare
from bae_lens.comparison.dictionaries import DictionarySpec

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PAPER = BENCHMARKS / "paper"


@pytest.fixture
def plan(monkeypatch, capsys, tmp_path):
    """Runs `bae-lens compare --plan` and returns what it printed."""

    def run(*arguments: str) -> str:
        for name in ("load_model", "load_text", "compare"):
            monkeypatch.setattr(f"bae_lens.cli.experiment.{name}", lambda *_, **__: pytest.fail("something ran"))
        command = ["bae-lens", "compare", *map(str, arguments), "--plan", "--output", str(tmp_path / "run")]
        monkeypatch.setattr(sys, "argv", command)
        cli.main()
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("path", sorted(PAPER.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_papers_experiments_are_read_from_their_files(path):
    command = Compare.defaults([str(path)])
    assert command.hook_name == f"blocks.{path.stem.rsplit('_', 1)[1]}.hook_resid_post"
    assert command.training.training_tokens == 200 * command.contexts.cached_tokens
    assert (command.training.steps, command.expansion) == (2_574_218, 4)
    specs = {name: spec for name, spec in command.dictionaries.items() if isinstance(spec, DictionarySpec)}
    assert [spec.architecture for spec in specs.values()] == [
        "bae",
        "standard",
        "topk",
        "gated",
        "transcoder",
    ]
    assert specs["BAE"].preset == "authors"


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_benchmarks_comparisons_tune_all_dictionaries_alike(path):
    command = Compare.defaults([str(path)])
    assert (command.l0, command.seeds) == (32, (0, 1, 2))
    specs = [spec for spec in command.dictionaries.values() if isinstance(spec, DictionarySpec)]
    assert [len({str(trial) for trial in spec.trials}) for spec in specs] == [3] * len(command.dictionaries)


def test_a_file_names_several_hooks(tmp_path):
    path, shallow = tmp_path / "c.yaml", "blocks.{0,5}.hook_mlp_out"
    for content in (f"hook_name: {shallow}", f"hook_name:\n- {shallow}", f'hook_name: ["{shallow}"]'):
        path.write_text(content)
        assert Compare.defaults([str(path)]).hook_names == ["blocks.0.hook_mlp_out", "blocks.5.hook_mlp_out"]
    path.write_text("hook_name: 3")
    with pytest.raises(ValueError, match=r"hook_name.*, got 3"):
        Compare.defaults([str(path)])


@pytest.mark.slow
def test_the_papers_experiment_fits_a_gpu(plan):
    files = (PAPER / "llama_3.2_1b_layer_11.yaml", "--model", PAPER / "llama_3.2_1b.json")
    printed = plan(*files, "--gpu-memory", "80", "--disk", "500")
    assert "6,663,168 tokens through 12 layers" in printed
    assert printed.count("1 x 2,574,218 steps of 512, 8,192 features") == 5
    assert "it fits\ntimes are taken on the GPU itself" in printed


def test_what_does_not_fit_is_not_timed(plan, tiny_model_folder, monkeypatch):
    monkeypatch.setattr(command_module, "time_dictionary", lambda *_: pytest.fail("it was timed"))
    printed = plan("--model", tiny_model_folder, "--hook-name", "blocks.1.hook_resid_post", "--disk", "0.01")
    assert re.search(r"does not fit: .* of disk are needed and 0.01 GB are free; cache at most", printed)


def test_what_fits_is_timed(plan, tiny_model_folder):
    printed = plan("--model", tiny_model_folder, "--hook-name", "blocks.1.hook_resid_post", "--architectures", "bae")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    times = {row[0]: row[-1] for row in rows[2:]}
    assert rows[0][-1] == "time"
    assert (times["choose contexts"], times["measure BAE"]) == ("-", "-")
    assert all(re.fullmatch(r"[\d.]+ (s|min|h)", times[name]) for name in ("activations", "train BAE", "in all"))
    assert printed.rstrip().endswith(
        "-: not timed; the rest is what this machine took for a few steps, times their number"
    )


def test_plan_refuses_what_it_cannot_count(plan, capsys):
    for flags, message in (
        (["--device-map", "auto"], "--plan counts on one device, got the device map auto"),
        (["--architectures", "--pretrained", "Mine", "folder"], "all dictionaries are pretrained"),
    ):
        with pytest.raises(SystemExit):
            plan(*flags)
        assert message in capsys.readouterr().err


def test_plan_counts_all_hooks_and_times_those_that_are_alike_once(plan, tiny_model_folder, monkeypatch):
    timed = []
    time_dictionary = command_module.time_dictionary
    monkeypatch.setattr(command_module, "time_dictionary", lambda *a: timed.append(a) or time_dictionary(*a))
    hooks = ("--hook-name", "blocks.{0,1}.hook_resid_post", "blocks.1.mlp.hook_post")
    printed = plan("--model", tiny_model_folder, *hooks, "--architectures", "bae", "--no-every-help")
    steps = "1 x 1,024 steps of 512"
    assert f"{steps}, 64 features at 2 of 3 hooks; {steps}, 128 features at 1 of 3 hooks" in printed
    assert len(timed) == 2
    with pytest.raises(ValueError, match=r"no hook 'blocks.2.hook_mlp_out': its layers are 0 to 1"):
        Compare(hook_name="blocks.{0..2}.hook_mlp_out", model=str(tiny_model_folder)).planned()
    with pytest.raises(ValueError, match="several hooks must each be in a layer"):
        Compare(hook_name=("hook_embed", "blocks.0.hook_mlp_out"), model=str(tiny_model_folder)).planned()
