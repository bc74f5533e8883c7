import re
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard

from bae_lens.comparison.results import TABLE
from bae_lens.report.card import PICTURE, card, write_cards
from bae_lens.report.page import write_report
from bae_lens.report.png import write_pictures


@pytest.fixture
def run_folder(comparison, tmp_path):
    """What a comparison leaves, without the dictionaries themselves."""
    for home in ("dictionaries", "seeds/1/dictionaries"):
        for dictionary in comparison.dictionaries:
            (tmp_path / home / dictionary.name).mkdir(parents=True)
    return tmp_path


def measured(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \| [^|]+ \|$", text, re.MULTILINE))


def test_every_dictionary_has_a_card_with_its_own_numbers(comparison, run_folder):
    write_pictures(comparison, run_folder)
    paths = write_cards(comparison, run_folder)

    assert len(set(paths)) == 6
    assert run_folder / "seeds" / "1" / "dictionaries" / "BAE" / "README.md" in paths
    for dictionary in comparison.dictionaries:
        for run, home in zip(dictionary.runs, (run_folder, run_folder / "seeds" / "1"), strict=True):
            text = (home / "dictionaries" / dictionary.name / "README.md").read_text(encoding="utf-8")
            measures = measured(text)
            assert set(TABLE) - measures.keys() == {"dictionary", "writes"}
            assert measures["explained variance"] == f"{run.metrics.explained_variance:.3f}"
            assert measures["CE recovered"] == f"{run.language_model.recovered:.3f}"
            assert measures["Feature Activated"] == "61 of 64"
            assert f"\nseed: {run.seed}\n" in text
            shown = (home / "dictionaries" / dictionary.name / PICTURE).read_bytes()
            assert shown == (run_folder / "pictures" / PICTURE).read_bytes()
            assert f"]({PICTURE})" in text


@pytest.mark.parametrize(
    ("architecture", "ours"),
    [("bae", True), ("topk_transcoder", True), ("transcoder", False), ("gated", False), ("batchtopk", False)],
)
def test_it_says_whether_loading_needs_this_package(comparison, architecture, ours):
    dictionary = replace(comparison.dictionaries[0], architecture=architecture)
    text = card(comparison, dictionary, dictionary.runs[0], False)
    assert ("import bae_lens" in text) is ours
    assert "from sae_lens import SAE" in text


def test_the_hub_can_read_it(comparison):
    read = ModelCard(card(comparison, comparison.dictionaries[1], comparison.dictionaries[1].runs[0], False))

    tags = ["bae", "sparse-autoencoder", "mechanistic-interpretability"]
    assert read.data.to_dict() == {"library_name": "saelens", "tags": tags}


def test_recipe_says_what_was_trained_and_on_what(comparison):
    dictionary = comparison.dictionaries[1]
    text = card(comparison, dictionary, dictionary.runs[0], with_picture=False)

    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    settings = yaml.safe_load(recipe)
    assert settings["lr"] == 0.1
    assert settings["training_tokens"] == 640
    assert settings["context_size"] == 128
    assert "trained by bae_lens on 600 tokens of `words`" in text
    assert "3 tokens of outlying norm and all special tokens were left out. The best of 3 settings" in text
    assert "at `blocks.0.hook_resid_post` of `tiny`" in text
    assert PICTURE not in text


def test_only_what_needs_it_imports_this_package(comparison):
    topk, bae, transcoder = (card(comparison, d, d.runs[0], False) for d in comparison.dictionaries)

    assert "import bae_lens" in bae
    assert "import bae_lens" not in topk
    assert "import bae_lens" not in transcoder
    assert "from `blocks.0.mlp.hook_in` to `blocks.0.hook_mlp_out`" in transcoder


def test_folders_of_this_machine_are_not_published(comparison, tmp_path):
    experiment = replace(
        comparison.experiment, model=str(tmp_path / "my-model"), dataset=str(tmp_path / "my-words.jsonl")
    )
    text = card(
        replace(comparison, experiment=experiment),
        comparison.dictionaries[0],
        comparison.dictionaries[0].runs[0],
        False,
    )

    assert "`my-model`" in text
    assert "`my-words.jsonl`" in text
    assert str(tmp_path) not in text


def test_it_says_that_activations_were_streamed_and_of_how_many_their_mean_is(comparison, tmp_path):
    streamed = replace(comparison, train=replace(comparison.train, sample_tokens=1234))
    said = "are those of a sample of 1,234 tokens"
    for result, says in ((comparison, False), (streamed, True)):
        assert (said in card(result, result.dictionaries[0], result.dictionaries[0].runs[0], False)) is says
        page = write_report(result, tmp_path).read_text(encoding="utf-8")
        assert (said in page) is says
