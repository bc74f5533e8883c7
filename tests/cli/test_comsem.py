import json
import re
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from bae_lens.activations.contexts import held_out_documents
from bae_lens.activations.fingerprint import model_fingerprint
from bae_lens.activations.sources import load_text
from bae_lens.cli import main as cli
from bae_lens.cli.comsem import Comsem
from bae_lens.cli.scored import Scored, Text, scored_run
from bae_lens.comsem import ComSem
from bae_lens.comsem.judges.client import ChatClient
from bae_lens.comsem.judges.judge import Verdict
from bae_lens.comsem.judges.language_model import LanguageModelJudge
from bae_lens.comsem.judges.offline import OfflineJudge
from bae_lens.comsem.judges.spending import Price
from bae_lens.comsem.score import Setting
from bae_lens.saes.loading import load_bae


class LetterJudge(OfflineJudge):
    """In the place of embeddings: tokens are alike if they share letters; of parts of speech it knows none."""

    def __init__(self) -> None:
        super().__init__(
            lambda texts: torch.nn.functional.normalize(torch.stack([letters(text) for text in texts])),
            lambda texts: [(text, text, "") for text in texts],
        )


def letters(text: str) -> torch.Tensor:
    return torch.bincount(torch.tensor([ord(letter) % 64 for letter in text]), minlength=64).float()


@pytest.fixture
def run_folder(monkeypatch, tiny_model_folder, tiny_dataset, tmp_path):
    words = tmp_path / "words.jsonl"
    words.write_text("\n".join(json.dumps({"text": text + "."}) for text in tiny_dataset["text"][:400]))
    sizes = "--cached-tokens 600 --held-out-tokens 120 --context-size 16 --training-tokens 640 --batch-size 32"
    train = ["bae-lens", "train", "--model", str(tiny_model_folder), "--dataset", str(words), *sizes.split()]
    train += ["--hook-name", "blocks.0.hook_resid_post", "--output", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", train)
    cli.main()
    return tmp_path / "run"


@pytest.fixture
def comsem(monkeypatch, run_folder):
    def run(*arguments):
        monkeypatch.setattr("bae_lens.cli.comsem.OfflineJudge", LetterJudge)
        monkeypatch.setattr(sys, "argv", ["bae-lens", "comsem", str(run_folder), "--n-tokens", "600", *arguments])
        cli.main()

    return run


def test_a_run_of_a_model_in_half_precision_is_scored_with_it(run_folder, tmp_path, monkeypatch, capsys):
    train = ["train", "--model", json.loads((run_folder / "run.json").read_text())["model"], "--context-size", "16"]
    train += [
        "--dataset",
        str(tmp_path / "words.jsonl"),
        "--hook-name",
        "blocks.0.hook_resid_post",
        "--batch-size",
        "32",
    ]
    train += ["--cached-tokens", "600", "--held-out-tokens", "120", "--training-tokens", "640"]
    half = tmp_path / "half"
    monkeypatch.setattr("bae_lens.cli.comsem.OfflineJudge", LetterJudge)
    monkeypatch.setattr(sys, "argv", ["bae-lens", *train, "--output", str(half), "--model-dtype", "bfloat16"])
    cli.main()
    judged = ["--offline-judge", "--accept-failing-judge", "--max-features", "2", "--n-tokens", "600"]
    monkeypatch.setattr(sys, "argv", ["bae-lens", "comsem", str(half), *judged])
    cli.main()
    assert "| bae† |" in capsys.readouterr().out


def test_a_run_is_scored_on_its_held_out_documents(comsem, run_folder, capsys, monkeypatch):
    seen = []
    from bae_lens.comsem.collect import corpus

    cut = corpus._cut
    monkeypatch.setattr(
        corpus, "_cut", lambda document, text, *rest: (seen.append(text), cut(document, text, *rest))[1]
    )
    comsem("--offline-judge", "--accept-failing-judge", "--max-features", "5")
    out = capsys.readouterr().out
    assert "| bae† |" in out
    assert "report and scores are in" in out
    run = json.loads((run_folder / "run.json").read_text())
    documents = list(load_text(run["dataset"]).shuffle(seed=run["seed"])["text"])
    assert seen
    assert set(seen) <= set(documents[::10])
    assert not set(seen) & {text for number, text in enumerate(documents) if number % 10}
    result = json.loads((run_folder / "comsem" / "comsem.json").read_text())
    assert len(result["dictionaries"][0]["features"]) == 5
    for file in ("comsem.html", "saebench/bae.json", "neuronpedia/bae.jsonl"):
        assert (run_folder / "comsem" / file).exists()
    rows = json.loads((run_folder / "result.json").read_text())["comsem"]["rows"]
    assert (rows[0]["name"], rows[0]["scored"]) == ("bae", 5)
    assert "Table 1: do the features mean something?" in (run_folder / "report.html").read_text()


def test_other_folders_and_dictionaries_may_be_chosen(comsem, tmp_path):
    options = ("--offline-judge", "--accept-failing-judge", "--max-features", "2", "--dictionaries", "bae")
    comsem(*options, "--output", str(tmp_path / "there"))
    assert (tmp_path / "there" / "comsem.html").exists()


def test_dry_run_asks_nothing_and_tells_the_cost(comsem, run_folder, capsys):
    comsem("--dry-run", "--price-input", "0.4", "--price-output", "1.6", "--max-features", "3")
    out = capsys.readouterr().out
    assert "calls to be made and 0 cached" in out
    assert "cost about 0.0" in out
    assert not (run_folder / "comsem" / "comsem.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dictionaries", "relu"], "has no finished dictionary 'relu'; finished ones: bae"),
        (["--price-input", "1"], "price_input and price_output go together"),
        (["--budget", "1"], "a budget of money needs the price"),
        (["--local-judge", "--offline-judge"], "choose one of local_judge and offline_judge"),
        (["--offline-judge", "--explainer", "m"], "explainer is a model on a server; leave it out"),
        ([], "needs a key: set the environment variable OPENAI_API_KEY"),
        (["--offline-judge"], "which is near chance"),
        (["--base-url", "here"], "base_url must be an address"),
    ],
)
def test_users_error_ends_with_one_line_and_leaves_nothing(comsem, run_folder, capsys, monkeypatch, arguments, message):
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
    assert not (run_folder / "comsem").exists()


PRICES = {"price_input": 1.0, "price_output": 2.0}
EXPLAINER_PRICES = {"explainer_price_input": 3.0, "explainer_price_output": 4.0}


def test_judge_and_explainer_have_their_own_prices(tmp_path):
    def prices(**options):
        return Comsem((str(tmp_path),), judge_model="judge", **options)._prices()

    assert prices() == {}
    assert prices(**PRICES) == prices(explainer="judge", **PRICES) == {"judge": Price(1.0, 2.0)}
    both = {"judge": Price(1.0, 2.0), "other": Price(3.0, 4.0)}
    assert prices(explainer="other", **PRICES, **EXPLAINER_PRICES) == both
    for alone in (PRICES, EXPLAINER_PRICES):
        with pytest.raises(ValueError, match="judge and other have a price each"):
            prices(explainer="other", **alone)
    with pytest.raises(ValueError, match="an explainer other than the judge"):
        prices(**PRICES, **EXPLAINER_PRICES)
    with pytest.raises(ValueError, match="explainer_price_input and explainer_price_output go together"):
        prices(explainer="other", explainer_price_input=1.0)


def test_papers_setting_reads_the_same_documents_in_the_order_of_the_corpus():
    text = Dataset.from_dict({"text": [f"{number:02}" for number in range(50)]})
    robust, paper = ([row["text"] for row in held_out_documents(text, 3, order)] for order in (False, True))
    assert robust == text.shuffle(seed=3)["text"][::10]
    assert paper == sorted(robust) != robust
    assert len(list(held_out_documents(text.to_iterable_dataset(), 3, True))) == 5


def test_the_local_judge_is_known_by_its_model_and_not_by_its_port(comsem, monkeypatch, capsys):
    clients = []

    class Client(ChatClient):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            clients.append(self)

    @contextmanager
    def server(_):
        yield f"http://127.0.0.1:{9 + len(clients)}/v1"

    monkeypatch.setattr("bae_lens.cli.comsem.ChatClient", Client)
    monkeypatch.setattr("bae_lens.cli.comsem.local_server", server)
    for _ in range(2):
        comsem("--local-judge", "--dry-run", "--max-features", "1")
    assert "nothing was asked" in capsys.readouterr().out
    first, second = clients
    assert first.base_url != second.base_url
    assert first.label == second.label
    assert first.label.startswith("SmolLM2")


@pytest.fixture
def saved(run_folder):
    """A dictionary's folder, in no run."""
    return shutil.copytree(run_folder / "dictionaries" / "bae", run_folder.parent / "saved")


def with_metadata(folder, **metadata):
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"] |= metadata
    (folder / "cfg.json").write_text(json.dumps(config))


def test_dictionaries_are_scored_together_on_any_text(saved, run_folder, tmp_path, monkeypatch, capsys):
    again = load_bae(saved)
    monkeypatch.setattr("bae_lens.comsem.collect.dictionaries.SAE.from_pretrained", lambda *_: again)
    monkeypatch.setattr("bae_lens.cli.comsem.OfflineJudge", LetterJudge)
    arguments = [str(saved), "release/layer_0/bae", "--dataset", str(tmp_path / "words.jsonl"), "--n-tokens", "600"]
    arguments += ["--output", str(tmp_path / "out"), "--offline-judge", "--accept-failing-judge", "--max-features", "2"]
    monkeypatch.setattr(sys, "argv", ["bae-lens", "comsem", *arguments])
    cli.main()
    out = capsys.readouterr().out
    assert "| saved\u2020 |" in out
    assert "| release_layer_0_bae\u2020 |" in out
    assert (tmp_path / "out" / "saebench" / "release_layer_0_bae.json").exists()
    assert json.loads((run_folder / "result.json").read_text())["comsem"] is None


def test_a_dictionary_of_an_unknown_model_is_refused_until_the_model_is_named(saved, tiny_model_folder):
    with_metadata(saved, model_name=None)
    with pytest.raises(ValueError, match="saved does not say which model it reads; name it with --model"):
        Comsem((str(saved),))._scored()
    scored = Comsem((str(saved),), model=str(tiny_model_folder))._scored()
    assert scored.model == str(tiny_model_folder)
    assert scored.text.name == "sotu"


def test_dictionaries_of_different_models_are_scored_apart(saved, tmp_path):
    other = shutil.copytree(saved, tmp_path / "other")
    with_metadata(other, model_name="gpt2")
    with pytest.raises(ValueError, match="other reads gpt2; score them apart"):
        Comsem((str(saved), str(other)))._scored()
    with_metadata(other, model_from_pretrained_kwargs={"center_writing_weights": True})
    with pytest.raises(ValueError, match="read their model with different options; score them apart"):
        Comsem((str(saved), str(other)), model="gpt2")._scored()


def test_a_model_is_loaded_with_the_options_that_its_dictionaries_were_trained_with(saved, monkeypatch):
    asked = []
    with_metadata(saved, model_name="gpt2", model_from_pretrained_kwargs={"center_writing_weights": True})
    monkeypatch.setattr(
        "bae_lens.cli.scored.HookedSAETransformer.from_pretrained_no_processing",
        lambda name, **options: asked.append((name, options)),
    )
    Comsem((str(saved),))._scored().load_model("cpu")
    assert asked == [("gpt2", {"device": "cpu", "dtype": torch.float32, "center_writing_weights": True})]


def test_what_is_scored_has_to_be_clear(saved, run_folder):
    run, folder = str(run_folder), str(saved)
    cases: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
        ((run, folder), {}, "a run is scored by itself"),
        ((run,), {"model": "gpt2"}, "a run names its own"),
        ((folder,), {"dictionaries": ("bae",)}, "those of a run, got bae; give the folders that you mean"),
        ((folder, folder), {}, "two dictionaries are called saved"),
        (("nowhere",), {}, "a dictionary is a folder or RELEASE/SAE_ID"),
    ]
    for sources, options, message in cases:
        with pytest.raises(ValueError, match=message):
            Comsem(sources, **options)._scored()
    with pytest.raises(ValueError, match="name what to score"):
        Comsem(()).run()


def test_a_judge_file_must_be_a_model_as_llama_cpp_reads_it(comsem, tmp_path, capsys):
    wrong = tmp_path / "model.bin"
    for content, message in ((None, "there is no file"), (b"PK", "is none; convert it")):
        if content:
            wrong.write_bytes(content)
        with pytest.raises(SystemExit):
            comsem("--judge-file", str(wrong), "--dry-run")
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_authors_setting_takes_as_many_tokens_as_its_sentences_have(monkeypatch):
    made = []

    class Recorded(ComSem):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)
            raise ValueError("enough")

    monkeypatch.setattr("bae_lens.cli.comsem.ComSem", Recorded)
    expected: tuple[tuple[Setting, int | None, bool], ...] = (("authors", None, True), ("robust", 32_768, False))
    for setting, tokens, examples in expected:
        scored = Comsem(("run",), setting=setting)
        judge = LanguageModelJudge("m", ChatClient("http://127.0.0.1:1/v1"), worked_examples=examples)
        with pytest.raises(ValueError, match="enough"):
            scored._run(Scored({}, "m", Text("sotu"), 128), {"judge": judge}, Path("nowhere"))
        assert made[-1].corpus.tokens == tokens


def test_a_folder_that_is_no_run_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["bae-lens", "comsem", str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "holds no run.json; choose what demo, compare or train wrote" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../../elsewhere", "/tmp/x", ".hidden/x"])
def test_a_run_that_names_a_place_elsewhere_is_refused(comsem, run_folder, capsys, name):
    run = json.loads((run_folder / "run.json").read_text())
    (run_folder / "run.json").write_text(json.dumps({**run, "recipes": {name: run["recipes"]["bae"]}}))
    with pytest.raises(SystemExit) as stop:
        comsem("--offline-judge")
    assert stop.value.code == 2
    assert "which is no name of a folder in it" in capsys.readouterr().err


def test_a_run_of_another_version_is_refused_with_a_sentence(comsem, run_folder, capsys):
    run = json.loads((run_folder / "run.json").read_text())
    run["text"] = run.pop("dataset")
    (run_folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(SystemExit) as stop:
        comsem("--offline-judge")
    assert stop.value.code == 2
    assert "of this version of bae_lens (dataset: Field required" in capsys.readouterr().err


def test_a_run_that_was_moved_is_scored_from_anywhere(comsem, run_folder, tmp_path, monkeypatch, capsys):
    options = ("--offline-judge", "--accept-failing-judge", "--max-features", "2")
    comsem(*options)
    there = capsys.readouterr().out.splitlines()[:3]
    moved = tmp_path / "another" / "place"
    moved.parent.mkdir()
    run_folder.rename(moved)
    shutil.rmtree(moved / "comsem")
    monkeypatch.chdir(moved.parent)
    monkeypatch.setattr(sys, "argv", ["bae-lens", "comsem", "place", "--n-tokens", "600", *options])
    cli.main()
    assert capsys.readouterr().out.splitlines()[:3] == there


def test_a_text_or_model_that_is_gone_is_named(comsem, run_folder, tmp_path, capsys):
    (tmp_path / "words.jsonl").unlink()
    with pytest.raises(SystemExit):
        comsem("--offline-judge")
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: {run_folder / 'run.json'} names {tmp_path / 'words.jsonl'}, which is not there")


def test_run_of_a_model_that_was_replaced_is_not_scored(comsem, run_folder, capsys):
    path = run_folder / "run.json"
    earlier = path.read_text()
    path.write_text(json.dumps({**json.loads(earlier), "model_weights": "others"}))
    with pytest.raises(SystemExit) as stop:
        comsem("--offline-judge", "--accept-failing-judge", "--max-features", "5", "--dry-run")
    path.write_text(earlier)
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: a run is read with the model that it was made with, but {run_folder} had /")
    assert re.search(
        "with weights others, and they are [0-9a-f]{16} now; bring that model back, or give folders", message
    )


def test_a_run_is_read_with_its_model_in_another_form(run_folder):
    path, on_cpu = run_folder / "run.json", {"": "cpu"}
    run = json.loads(path.read_text())
    bridge = scored_run(run_folder, (), None).load_model("cpu", on_cpu)
    assert model_fingerprint(bridge) != run["model_weights"]
    path.write_text(json.dumps({**run, "model_weights": model_fingerprint(bridge)}))
    assert model_fingerprint(scored_run(run_folder, (), None).load_model("cpu")) == run["model_weights"]
