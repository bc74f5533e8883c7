import sys

import numpy as np
import pytest

from bae_lens.cli import main as cli
from bae_lens.cli.scored import scored_run
from bae_lens.comparison.results import Comparison
from bae_lens.storage import read_json

SIZES = "--held-out-tokens 100 --training-tokens 320 --batch-size 32"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command on 1,000 vectors of 20 documents, and returns what it says."""
    x = np.random.default_rng(0).normal(size=(1_000, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "video.npy", np.arange(1_000) // 50)
    (tmp_path / "shots.txt").write_text("\n".join(f"shot {row}" for row in range(1_000)))

    def run(command, *arguments):
        monkeypatch.setattr(sys, "argv", ["bae-lens", command, *SIZES.split(), *map(str, arguments)])
        cli.main()
        return capsys.readouterr().out

    return run


def result(folder):
    return Comparison.from_dict(read_json(folder / "result.json"))


def test_train(run, tmp_path):
    about = ["--documents", tmp_path / "video.npy", "--labels", tmp_path / "shots.txt"]
    said = run("train", "--vectors", tmp_path / "x.npy", *about, "--output", tmp_path / "run")
    assert "1,000 vectors of width 8 were split by 20 documents" in said
    assert [line.split()[0] for line in said.splitlines()[3:4]] == ["bae"]
    trained = result(tmp_path / "run")
    assert trained.experiment.model is None
    assert trained.experiment.dataset == "x.npy"
    assert trained.dictionaries[0].features[0].examples[0].token.startswith("shot ")
    assert (tmp_path / "run" / "dictionaries" / "bae" / "README.md").exists()
    with pytest.raises(
        ValueError, match="run holds dictionaries of vectors, and this needs tokens of a language model"
    ):
        scored_run(tmp_path / "run", [], None)


def test_a_saved_dictionary_goes_on_and_stands_beside_others(run, tmp_path, capsys):
    of, bae = ["--vectors", tmp_path / "x.npy"], tmp_path / "first" / "dictionaries" / "bae"
    run("train", *of, "--output", tmp_path / "first")
    run("train", *of, "--start-from", bae, "--output", tmp_path / "further")
    assert "start_from" in result(tmp_path / "further").dictionaries[0].recipe
    said = run("compare", *of, "--architectures", "topk", "--l0", 4, "--no-every-help", "--pretrained", "Before", bae,
               "After", tmp_path / "further" / "dictionaries" / "bae", "--output", tmp_path / "beside")  # fmt: skip
    assert [line.split()[-1] for line in said.splitlines()[3:6]] == ["s", "pretrained", "pretrained"]
    known, found = (
        result(tmp_path / folder).dictionaries[index].runs[0].metrics.explained_variance
        for folder, index in (("further", 0), ("beside", 2))
    )
    assert found == known
    with pytest.raises(SystemExit, match="2"):
        run("train", *of, "--start-from", bae, "--architecture", "topk", "--output", tmp_path / "no")
    assert "is a bae, which is trained as bae, and the architecture asked for is topk" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run("train", *of, "--start-from", bae, "--expansion", 8, "--output", tmp_path / "no")
    assert "--start-from goes on with the width that is there, got --expansion 8" in capsys.readouterr().err


@pytest.mark.slow
def test_compare_from_a_file(run, tmp_path):
    (tmp_path / "of.yaml").write_text(
        f"vectors: [{tmp_path / 'x.npy'}, {tmp_path / 'x.npy'}]\nl0: 4\nevery_help: false\n"
    )
    said = run("compare", tmp_path / "of.yaml", "--output", tmp_path / "run")
    assert "2,000 vectors of width 8 were split by 100 blocks of 20 neighboring rows" in said
    assert [dictionary.name for dictionary in result(tmp_path / "run").dictionaries] == [
        "BAE",
        "ReLU",
        "Top-k",
        "Gated",
    ]
    assert result(tmp_path / "run").experiment.dataset == "x.npy and 1 more"


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("train", [], "--hook-name, or files with --vectors"),
        ("train", ["--documents", "video"], "of files of vectors, but without --vectors: --documents; name the files"),
        ("train", ["--vectors", "x.npy", "--hook-name", "blocks.0.mlp"], "got --hook-name too"),
        ("train", ["--vectors", "x.npy", "--keep-activations", "none"], "got --keep-activations too"),
        ("train", ["--hook-name", "blocks.{0,1}.hook_out", "--keep-activations", "own"], "streamed at one hook, got 2"),
        ("train", ["--hook-name", "blocks.0.hook_out", "--sample-tokens", 9], "that are streamed, got 9; leave it out"),
        ("compare", ["--vectors", "x.npy", "--model", "gpt2", "--context-size", 64], "got --model, --context-size too"),
        ("compare", ["--vectors", "x.npy", "--plan"], "--plan is for a language model's activations"),
        ("compare", ["--vectors", "x.npy", "--architectures", "transcoder"], "a transcoder reads at one hook"),
        ("train", ["--vectors", "nowhere.npy"], "there is no file nowhere.npy"),
        ("train", ["--vectors", "x.npy", "--documents", "video"], "a .npy file holds one array without a name"),
    ],
)  # fmt: skip
def test_flags_that_contradict(run, tmp_path, monkeypatch, capsys, command, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run(command, *flags, "--output", tmp_path / "run")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
