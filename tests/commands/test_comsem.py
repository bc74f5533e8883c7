import json
import sys

import pytest
import torch

from bae_lens import cli
from bae_lens.comsem.embedding_judge import EmbeddingJudge
from bae_lens.comsem.instances import Verdict


class LetterJudge(EmbeddingJudge):
    """In the place of embeddings: tokens are alike if they share letters."""

    def __init__(self) -> None:
        super().__init__(lambda texts: torch.nn.functional.normalize(torch.stack([letters(text) for text in texts])))


def letters(text: str) -> torch.Tensor:
    return torch.bincount(torch.tensor([ord(letter) % 64 for letter in text]), minlength=64).float()


@pytest.fixture
def run_folder(monkeypatch, tiny_model_folder, tiny_dataset, tmp_path):
    words = tmp_path / "words.jsonl"
    words.write_text("\n".join(json.dumps({"text": text + "."}) for text in tiny_dataset["text"][:400]))
    sizes = "--harvest-tokens 600 --held-out-tokens 120 --context-size 16 --training-tokens 640 --batch-size 32"
    train = ["bae-lens", "train", "--model", str(tiny_model_folder), "--text", str(words), *sizes.split()]
    train += ["--hook-name", "blocks.0.hook_resid_post", "--output", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", train)
    cli.main()
    return tmp_path / "run"


@pytest.fixture
def comsem(monkeypatch, run_folder):
    def run(*arguments):
        monkeypatch.setattr("bae_lens.commands.comsem.EmbeddingJudge", LetterJudge)
        monkeypatch.setattr(sys, "argv", ["bae-lens", "comsem", str(run_folder), "--tokens", "600", *arguments])
        cli.main()

    return run


def test_a_run_is_scored_on_its_held_out_documents(comsem, run_folder, capsys, monkeypatch):
    seen = []
    from bae_lens.comsem import corpus

    cut = corpus._cut
    monkeypatch.setattr(corpus, "_cut", lambda document, *rest: (seen.append(document), cut(document, *rest))[1])
    comsem("--embedding-judge", "--accept-failing-judge", "--max-features", "5")
    out = capsys.readouterr().out
    assert "| bae† |" in out
    assert "report and scores are in" in out
    assert seen
    assert all(document % 10 == 0 for document in seen)
    result = json.loads((run_folder / "comsem" / "comsem.json").read_text())
    assert len(result["dictionaries"][0]["features"]) == 5
    for file in ("comsem.html", "saebench/bae.json", "neuronpedia/bae.jsonl"):
        assert (run_folder / "comsem" / file).exists()


def test_other_folders_and_dictionaries_may_be_chosen(comsem, tmp_path):
    options = ("--embedding-judge", "--accept-failing-judge", "--max-features", "2", "--dictionaries", "bae")
    comsem(*options, "--output", str(tmp_path / "there"))
    assert (tmp_path / "there" / "comsem.html").exists()


def test_dry_run_asks_nothing_and_tells_the_cost(comsem, run_folder, capsys):
    comsem("--dry-run", "--price-input", "0.4", "--price-output", "1.6", "--max-features", "3")
    out = capsys.readouterr().out
    assert "calls would be made and 0 are cached" in out
    assert "cost about 0.0" in out
    assert not (run_folder / "comsem" / "comsem.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dictionaries", "relu"], "has no finished dictionary 'relu'; finished ones: bae"),
        (["--price-input", "1"], "price_input and price_output go together"),
        (["--budget", "1"], "a budget of money needs the price"),
        (["--local-judge", "--embedding-judge"], "choose one of local_judge and embedding_judge"),
        ([], "needs a key: set the environment variable OPENAI_API_KEY"),
        (["--embedding-judge"], "which is near chance"),
        (["--base-url", "here"], "base_url must be an address"),
    ],
)
def test_users_error_ends_with_one_line(comsem, capsys, monkeypatch, arguments, message):
    async def yes(_, __, instances, ___):
        return [Verdict(True)] * len(instances)

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(LetterJudge, "judge", yes)
    with pytest.raises(SystemExit) as stop:
        comsem(*arguments)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_a_folder_that_is_no_run_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["bae-lens", "comsem", str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "holds no run.json; choose what bae-lens demo or train wrote" in capsys.readouterr().err
