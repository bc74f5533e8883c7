import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, HookedSAETransformer, StandardTrainingSAEConfig
from transformers import PreTrainedTokenizerFast

from bae_lens.comparison import Comparison, Recipe, Stopwatch, claim_folder, compare, describe
from bae_lens.harvest import ContextSettings, HiddenStates, choose_contexts, harvest
from bae_lens.report import write_report
from bae_lens.training import TrainingSettings

HOOK = "blocks.0.hook_resid_post"
SETTINGS = {"model": "tiny", "text": "words", "hook_name": HOOK, "training": {"training_tokens": 640}}


@pytest.fixture
def states(
    tiny_model: HookedSAETransformer, tiny_tokenizer: PreTrainedTokenizerFast, tiny_dataset: Dataset, tmp_path: Path
) -> list[HiddenStates]:
    settings = ContextSettings(context_size=16, harvest_tokens=600, held_out_tokens=300)
    contexts = choose_contexts(tiny_tokenizer, tiny_dataset, settings)
    return [harvest(tiny_model, part, HOOK, tmp_path / f"states{i}") for i, part in enumerate(contexts)]


def run(model: Any, states: list[HiddenStates], folder: Path, bae_config: Any) -> Comparison:
    recipes = {
        "BAE": Recipe(bae_config(), lr=4e-3),
        "ReLU": Recipe(StandardTrainingSAEConfig(d_in=16, d_sae=64, l1_coefficient=1), lr=1e-3),
    }
    settings = TrainingSettings(training_tokens=640, batch_size=32)
    return compare(model, states[0], states[1], recipes, settings, folder, SETTINGS, Stopwatch())


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
    hostile = replace(comparison, settings={**SETTINGS, "text": "<script>alert(1)</script>"})
    html = write_report(hostile, tmp_path).read_text()
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "src=" not in html.split("</script>")[-1]
    assert not any(tag in html for tag in ('<script src="', '<link rel="stylesheet"', "@import"))
    assert html.count("Plotly.newPlot(") == 3
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


def test_folder_belongs_to_one_run(tmp_path):
    folder = tmp_path / "run"
    claim_folder(folder, {"seed": 0, "model": "a"})
    claim_folder(folder, {"seed": 0, "model": "a"})
    with pytest.raises(ValueError, match=r"holds another run \(seed: 0 there, 1 now\); choose another folder"):
        claim_folder(folder, {"seed": 1, "model": "a"})


def test_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds files of something else"):
        claim_folder(tmp_path, {})


def test_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"is not writable: check .*file, or choose"):
        claim_folder(tmp_path / "file" / "run", {})
