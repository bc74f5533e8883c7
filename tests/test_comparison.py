import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, StandardTrainingSAEConfig

from bae_lens.comparison import Comparison, Experiment, Stopwatch, check_folder, claim_folder, compare, describe
from bae_lens.harvest import HiddenStates
from bae_lens.report import write_report
from bae_lens.training import Recipe, TrainingSettings

HOOK = "blocks.0.hook_resid_post"
EXPERIMENT = Experiment("tiny", "words", HOOK, training=TrainingSettings(training_tokens=640, batch_size=32))

pytestmark = pytest.mark.usefixtures("one_thread")


class LinkCollector(HTMLParser):
    """Everything that a page would load, and its figures."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str | None] = []
        self.figures: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        self.links += [value for name, value in attrs if name in ("src", "href")]
        self.figures += [value for name, value in attrs if name == "class" and value == "plotly-graph-div"]


def recipes(bae_config: Any) -> dict[str, Recipe]:
    return {
        "BAE": Recipe(bae_config(), lr=4e-3),
        "ReLU": Recipe(StandardTrainingSAEConfig(d_in=16, d_sae=64, l1_coefficient=1), lr=1e-3),
    }


def run(model: Any, states: tuple[HiddenStates, HiddenStates], folder: Path, bae_config: Any) -> Comparison:
    return compare(model, *states, recipes(bae_config), EXPERIMENT, folder, Stopwatch(folder))


def test_dictionaries_are_compared_on_the_same_batches_and_saved(tiny_model, states, bae_config, tmp_path, monkeypatch):
    from sae_lens.training.sae_trainer import SAETrainer

    step, seen = SAETrainer.step, {}

    def recorded(self, batch):
        seen.setdefault(self.sae.cfg.architecture(), []).append(batch)
        return step(self, batch)

    monkeypatch.setattr(SAETrainer, "step", recorded)
    comparison = run(tiny_model, states, tmp_path, bae_config)
    assert torch.equal(torch.cat(seen["bae"]), torch.cat(seen["standard"]))
    assert len(seen["bae"]) == 20
    assert [d.name for d in comparison.dictionaries] == ["BAE", "ReLU"]
    assert [d.architecture for d in comparison.dictionaries] == ["bae", "standard"]
    assert [stage.name for stage in comparison.stages] == [
        "train BAE",
        "evaluate BAE",
        "train ReLU",
        "evaluate ReLU",
    ]
    assert comparison.test.tokens == comparison.dictionaries[0].metrics.n_tokens == len(states[1].content)
    for name in ("BAE", "ReLU"):
        sae = SAE.load_from_disk(tmp_path / "dictionaries" / name)
        _, cache = tiny_model.run_with_cache_with_saes(states[1].contexts.tokens[:1], saes=[sae])
        assert cache[f"{HOOK}.hook_sae_acts_post"].shape == (1, 16, 64)


def test_result_survives_json_and_makes_a_table(tiny_model, states, bae_config, tmp_path):
    comparison = run(tiny_model, states, tmp_path, bae_config)
    content = json.loads(comparison.save(tmp_path).read_text())
    assert Comparison.from_dict(content) == comparison
    heading, _, first, _ = comparison.table().splitlines()
    assert heading.startswith("| dictionary | explained variance | CE recovered | L0 |")
    assert first.startswith(f"| BAE | {comparison.dictionaries[0].metrics.explained_variance:.3f} |")


def test_report_is_one_page_that_needs_no_network(tiny_model, states, bae_config, tmp_path):
    comparison = run(tiny_model, states, tmp_path, bae_config)
    hostile = replace(comparison, experiment=replace(EXPERIMENT, text="<script>alert(1)</script>"))
    html = write_report(hostile, tmp_path).read_text()
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html
    page = LinkCollector()
    page.feed(html)
    assert page.links == ["data:,"]
    assert len(page.figures) == 4
    example = comparison.dictionaries[0].features[0].examples[0]
    assert f">{example.token}</mark>" in html
    assert f"<td>{comparison.dictionaries[1].metrics.support_bits:.0f}</td>" in html


def test_massive_tokens_are_reported(states, tiny_tokenizer):
    train = states[0]
    train.norms[2, 5] = 100 * train.norms.median()
    corpus = describe(train, tiny_tokenizer)
    assert corpus.massive_tokens == 1
    assert corpus.massive_examples == [tiny_tokenizer.decode([train.contexts.tokens[2, 5]])]
    assert corpus.largest_norm == pytest.approx(100, rel=0.05)
    assert corpus.tokens == 599
    assert corpus.special_tokens == corpus.contexts == 50  # one BOS each


def test_stages_add_up_over_runs(tmp_path):
    for _ in range(2):
        Stopwatch(tmp_path).add("train", 2.0)
    with pytest.raises(KeyboardInterrupt), Stopwatch(tmp_path).stage("evaluate"):
        raise KeyboardInterrupt
    stages = Stopwatch(tmp_path).stages
    assert stages["train"].seconds == 4
    assert 0 < stages["evaluate"].seconds < 1
    assert 0.01 < stages["train"].peak_memory_gib < 100


def test_second_comparison_measures_nothing_again(tiny_model, states, bae_config, tmp_path, monkeypatch):
    first = run(tiny_model, states, tmp_path, bae_config)
    monkeypatch.setattr("bae_lens.comparison.evaluate_dictionary", lambda *_: pytest.fail("measured again"))
    assert run(tiny_model, states, tmp_path, bae_config).dictionaries == first.dictionaries


def test_folder_belongs_to_one_run(tmp_path, bae_config):
    folder = tmp_path / "run"
    claim_folder(folder, EXPERIMENT, recipes(bae_config))
    claim_folder(folder, EXPERIMENT, recipes(bae_config))
    with pytest.raises(ValueError, match=r"holds another run \(seed: 0 there, 1 now\); choose another folder"):
        claim_folder(folder, replace(EXPERIMENT, seed=1), recipes(bae_config))
    with pytest.raises(ValueError, match=r"recipes.BAE.d_sae: 64 there, 32 now"):
        claim_folder(folder, EXPERIMENT, recipes(lambda: bae_config(d_sae=32)))


def test_claim_that_was_killed_can_be_made_again(tmp_path, bae_config):
    for name in (".lock", "run.json.partial"):
        (tmp_path / name).write_text("")
    claim_folder(tmp_path, EXPERIMENT, recipes(bae_config))


def test_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds files of something else"):
        check_folder(tmp_path)


def test_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"is not writable: check .*file, or choose"):
        check_folder(tmp_path / "file" / "run")
    monkeypatch.setattr("os.access", lambda *_: False)  # what permissions do to anybody but root
    with pytest.raises(ValueError, match="is not writable"):
        check_folder(tmp_path / "run")
