import json
import sys

import numpy as np
import pytest

from bae_lens.activations import windows as windows_module
from bae_lens.cli import dynamics as command_module
from bae_lens.cli import main as cli
from bae_lens.entropy import dynamics as dynamics_module

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def dynamics(monkeypatch, capsys, tiny_model_folder, tiny_dataset, tmp_path):
    """Runs `bae-lens dynamics` on the tiny model, and returns what it prints, or with a status the error."""
    text = tmp_path / "words.jsonl"
    text.write_text("\n".join(json.dumps({"text": row}) for row in tiny_dataset["text"][:100]))

    def run(*arguments, status=None):
        given = ("--output", tmp_path / "run", "--model", tiny_model_folder, *arguments)
        given = given if "--prompts" in arguments else (*given, "--dataset", text)
        monkeypatch.setattr(sys, "argv", ["bae-lens", "dynamics", *map(str, given)])
        if status is None:
            cli.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == status
        return capsys.readouterr().err.splitlines()[-1]

    return run


SMALL = ("--max-position", 4, "--batch-size", 16, "--steps", 4)


@pytest.fixture
def prompts(tmp_path):
    """A file of 60 prompts of three demonstrations of different lengths, in two groups."""
    rng = np.random.default_rng(0)

    def write(change=lambda row, _: row):
        rows = []
        for number in range(60):
            words = [" ".join(f"w{word}" for word in rng.integers(0, 50, rng.integers(2, 5))) for _ in range(3)]
            text = "".join(f"{part} w59 " for part in words)
            rows.append(change({"text": text, "group": ("correct", "shuffled")[number % 2]}, number))
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return path

    return write


def test_resume_tokenizes_nothing_again(dynamics, monkeypatch, tmp_path):
    first = dynamics(*SMALL, "--windows", 60)
    assert np.load(tmp_path / "run" / "windows" / "tokens.npy").dtype == np.int32
    monkeypatch.setattr(windows_module, "_cut", lambda *_: pytest.fail("tokenized again"))
    assert dynamics(*SMALL, "--windows", 60) == first


def test_refused_run_may_begin_again_with_other_windows(dynamics):
    assert "need" in dynamics(*SMALL, "--windows", 15, status=2)
    dynamics(*SMALL, "--windows", 60)
    assert "holds something else (windows: " in dynamics(*SMALL, "--windows", 50, status=2)
    dynamics(*SMALL, "--windows", 60)


def test_states_in_half_precision(dynamics, tmp_path):
    dynamics(*SMALL, "--windows", 60, "--states-dtype", "bfloat16")
    assert np.load(tmp_path / "run" / "activations" / "activations.npy", mmap_mode="r").itemsize == 2


def test_paper_begins_where_documents_do_and_looks_at_all_layers(dynamics, tiny_tokenizer, tiny_dataset, tmp_path):
    dynamics(*SMALL, "--windows", 60, "--preset", "paper")
    tokens = np.load(tmp_path / "run" / "windows" / "tokens.npy")
    texts = {tuple(tiny_tokenizer(text)["input_ids"][:4]) for text in tiny_dataset["text"][:100]}
    assert {tuple(row[1:]) for row in tokens.tolist()} <= texts
    result = json.loads((tmp_path / "run" / "dynamics.json").read_text())
    assert result["hook_names"] == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    assert (result["d_sae"], result["dictionaries"]) == (64, "per position")
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert settings["fit"]["covariance_coefficient"] == pytest.approx(16e-7)
    assert (settings["fit"]["steps"], settings["fit"]["batch_size"], settings["fit"]["lr"]) == (4, 16, 5e-4)


def test_plan_runs_nothing(dynamics, monkeypatch, tmp_path):
    for name in ("load_model", "load_text", "entropy_dynamics"):
        monkeypatch.setattr(command_module, name, lambda *_, **__: pytest.fail("something ran"))
    printed = dynamics("--plan", "--preset", "paper", "--gpu-memory", 80, "--disk", 500)
    assert not (tmp_path / "run").exists()
    assert "268,697,600 tokens through 2 layers" in printed
    assert "22 BAEs of 102,400 steps" in printed
    assert printed.rstrip().endswith("it fits")
    printed = dynamics("--plan", "--preset", "paper", "--gpu-memory", 80, "--disk", 0.1)
    assert "does not fit: " in printed
    assert "of disk are needed and 0.1 GB are free; ask for at most" in printed


def test_plan_counts_on_this_machine(dynamics, tmp_path):
    assert "| - |" in dynamics("--plan", "--device", "cpu")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 30, "hidden_size": 64}))
    assert "through 21 layers" in dynamics("--plan", "--model", config)
    assert "neither here nor to be had from the hub" in dynamics("--plan", "--model", "nobody/nothing", status=2)


def test_prompts_are_compared_by_demonstration(dynamics, prompts, tmp_path):
    arguments = ("--prompts", prompts(), "--marker", "w59", "--batch-size", 16, "--steps", 20)
    printed = dynamics(*arguments)
    assert "| demonstrations | 1 | 2 | 3 |" in printed
    rows = [line.split(" | ")[0] for line in printed.splitlines() if line.startswith("| blocks")]
    hooks = ["| blocks.0.hook_resid_post", "| blocks.1.hook_resid_post"]
    assert rows == [f"{hook}, {group}" for hook in hooks for group in ("correct", "shuffled")]
    result = json.loads((tmp_path / "run" / "demonstrations.json").read_text())
    assert list(result["groups"]) == ["correct", "shuffled"]
    assert result["groups"]["correct"]["positions"] == [1, 2, 3]
    assert result["groups"]["correct"]["distinct_tokens"] == [1, 1, 1]  # all end with the marker
    assert result["groups"]["correct"]["positions_count"] == "demonstrations"
    assert (tmp_path / "run" / "demonstrations.html").stat().st_size > 1_000_000
    assert (tmp_path / "run" / "demonstrations.png").exists()
    assert dynamics(*arguments) == printed


def test_prompts_without_groups_are_one(dynamics, prompts):
    path = prompts(lambda row, _: {"text": row["text"]})
    printed = dynamics("--prompts", path, "--marker", "w59", "--batch-size", 16, "--steps", 4)
    assert "| blocks.0.hook_resid_post, prompts |" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row, number: row if number != 3 else {"text": row["text"]}, "none does, but line 4 of"),
        (lambda row, number: row if number != 3 else {**row, "text": "w1"}, "the marker 'w59' must end each demon"),
        (lambda row, number: row if number != 3 else {**row, "text": "w1 w59"}, "equally many demonstrations, but"),
        (lambda row, number: row if number != 3 else {**row, "ends": [400, 500, 600]}, "must end within the text"),
    ],
)
def test_impossible_prompts_are_one_line(dynamics, prompts, change, message):
    error = dynamics("--prompts", prompts(change), "--marker", "w59", "--batch-size", 16, status=2)
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--marker", "x"), "a marker ends demonstrations in prompts, got 'x' without; add --prompts"),
        (("--plan", "--prompts", "x.jsonl"), "leave out --prompts or --plan"),
        (("--prompts", "missing.jsonl"), "missing.jsonl"),
        (
            ("--prompts", "x.jsonl", "--windows", 40),
            "looked at whole, at the end of each demonstration, got --windows 40; leave out --prompts or --windows",
        ),
        (("--prompts", "x.jsonl", "--max-position", 4), "got --max-position 4; leave out --prompts or --max-position"),
        (
            ("--preset", "paper", "--explained-variance", 0.4),
            "give several --entropy-coefficients, got the single one of --preset paper",
        ),
        (
            ("--preset", "paper", "--explained-variance", 0.4, "--entropy-coefficients", 0.1),
            "give several --entropy-coefficients, got 0.1",
        ),
        (("--windows", 0), "windows must be at least 1, got 0"),
        ((*SMALL, "--windows", 15), "training needs at least a batch of 16 windows"),
        (("--max-position", 32, "--windows", 20), "no document reaches position 32, the longest of 100 has 24 tokens"),
        (
            ("--max-position", 4, "--windows", 20, "--batch-size", 4, "--layers", 2),
            "layers must lie between 0 and 1, got 2; choose others",
        ),
    ],
)
def test_impossible_runs_are_one_line_and_leave_nothing(dynamics, monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr(dynamics_module, "collect", lambda *_, **__: pytest.fail("the model ran"))
    assert message in dynamics(*arguments, status=2)
    assert not (tmp_path / "run").exists()
