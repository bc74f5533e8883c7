from dataclasses import replace

import pytest
import torch
from sae_lens import TopKTrainingSAEConfig

from bae_lens import (
    Comparison,
    Contender,
    Experiment,
    Recipe,
    TrainingBAEConfig,
    TrainingSettings,
    TrainingTranscoderConfig,
    Vectors,
    compare_vectors,
    evaluate_dictionary,
)
from bae_lens.activations.cache import CachedActivations
from bae_lens.activations.contexts import ContextSettings
from bae_lens.activations.vectors import VECTORS_HOOK
from bae_lens.cli.experiment import summary
from bae_lens.report.card import write_cards
from bae_lens.report.page import write_report
from bae_lens.saes.loading import load_dictionary
from tests.comparison.test_run import timeless

EXPERIMENT = Experiment(
    None,
    "pictures",
    VECTORS_HOOK,
    contexts=ContextSettings(cached_tokens=600, held_out_tokens=100, tuning_tokens=80),
    training=TrainingSettings(training_tokens=320, batch_size=32),
    l0=4.0,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def vectors():
    """1,000 vectors around 20 places, 50 neighbors in each document."""
    x = torch.randn(20, 8)[torch.arange(1_000) % 20] + 0.1 * torch.randn(1_000, 8)
    labels = [f"place {row % 20}" for row in range(1_000)]
    return Vectors([x], documents=[row // 50 for row in range(1_000)], labels=labels)


def contenders(n_trials=1):
    cfg = TrainingBAEConfig(d_in=8, d_sae=32, encoder_bias_init=-0.5)
    top_k = TopKTrainingSAEConfig(d_in=8, d_sae=32, k=4)
    lrs = [1e-3 * 2**trial for trial in range(n_trials)]
    return {
        "BAE": Contender(tuple(Recipe(cfg, lr) for lr in lrs)),
        "Top-k": Contender(tuple(Recipe(top_k, lr) for lr in lrs)),
    }


def test_vectors_are_not_streamed(vectors, tmp_path):
    with pytest.raises(ValueError, match="no model computes them: keep_activations must be all, got 'none'"):
        compare_vectors(vectors, contenders(), replace(EXPERIMENT, keep_activations="none"), tmp_path)


def test_all_is_measured_that_needs_no_model(vectors, tmp_path):
    result = compare_vectors(vectors, contenders(2), replace(EXPERIMENT, seeds=(0, 1)), tmp_path)
    test = CachedActivations(tmp_path / "activations" / "test", VECTORS_HOOK)
    for dictionary in result.dictionaries:
        assert len(dictionary.trials) == 2
        assert dictionary.hook_name == dictionary.hook_name_out == VECTORS_HOOK
        for run in dictionary.runs:
            home = result.experiment.seed_folder(tmp_path, run.seed) / "dictionaries" / dictionary.name
            sae = load_dictionary(home)
            assert run.language_model is None
            assert run.metrics == evaluate_dictionary(sae, test.rows(test.content))
            assert run.metrics.optimized is not None
            assert sae.cfg.metadata.hook_name == VECTORS_HOOK
            assert sae.cfg.metadata.dataset_path == "pictures"
        assert dictionary.features
        for feature in dictionary.features:
            assert feature.top_tokens == []
            assert feature.examples
            documents = [int(example.after.split()[-1][:-1]) // 50 for example in feature.examples]
            assert len(set(documents)) == len(documents)  # one of each
            assert all(
                example.token == f"place {int(example.after.split()[-1][:-1]) % 20}" for example in feature.examples
            )
    assert result.pca
    assert result.gaussian_bound
    assert result.sign_coding
    assert (result.train.tokens, result.test.tokens) == (600, 100)
    assert "CE recovered" not in result.table()
    assert "explained variance" in result.table()
    assert not (tmp_path / "saebench").exists()
    assert Comparison.from_dict(result.to_dict()) == result


def test_a_second_start_does_nothing_again(vectors, tmp_path, monkeypatch):
    first = compare_vectors(vectors, contenders(), EXPERIMENT, tmp_path)
    for name in ("comparing.evaluate_dictionary", "origin.vector_dashboards", "baselines.pca_quantization"):
        monkeypatch.setattr(f"bae_lens.comparison.{name}", lambda *_: pytest.fail("done again"))
    monkeypatch.setattr("bae_lens.activations.vector_cache._copy", lambda *_: pytest.fail("copied again"))
    assert timeless(compare_vectors(vectors, contenders(), EXPERIMENT, tmp_path)) == timeless(first)
    others = Vectors([torch.cat(list(vectors))], documents=[row // 25 for row in range(1_000)])
    with pytest.raises(ValueError, match=r"holds something else \(documents: "):
        compare_vectors(others, contenders(), EXPERIMENT, tmp_path)
    renamed = Vectors([torch.cat(list(vectors))], documents=vectors.document.tolist(), labels=["x"] * len(vectors))
    with pytest.raises(ValueError, match=r"holds something else \(labels: "):
        compare_vectors(renamed, contenders(), EXPERIMENT, tmp_path)


def test_what_comes_out_speaks_of_vectors(vectors, tmp_path):
    result = compare_vectors(vectors, contenders(), EXPERIMENT, tmp_path)
    write_report(result, tmp_path)
    write_cards(result, tmp_path)
    split = "1,000 vectors of width 8 were split by 20 documents"
    assert split in summary(result, tmp_path)
    assert "CE" not in summary(result, tmp_path)
    page = (tmp_path / "report.html").read_text()
    shown = page[page.index("<body>") : page.index('<script type="application/json"')]
    assert split in page
    for absent in ("token", "CE recovered", "logits", "Logits", "contexts", "documents of", "None"):
        assert absent not in "".join(part.split("</script>")[-1] for part in shown.split("<script")), absent
    assert "place " in page
    card = (tmp_path / "dictionaries" / "BAE" / "README.md").read_text()
    assert "of the vectors in `pictures`, trained by bae_lens on 600 of them" in card
    assert split in card
    assert "token" not in card.replace("_tokens", "")


def test_what_cannot_be_is_refused(vectors, tmp_path):
    transcoder = Recipe(TrainingTranscoderConfig(d_in=8, d_sae=32, d_out=8), lr=1e-3)
    wide = Recipe(TrainingBAEConfig(d_in=9, d_sae=32), lr=1e-3)
    hungry = replace(EXPERIMENT, training=TrainingSettings(training_tokens=4_096, batch_size=512),
                     contexts=ContextSettings(cached_tokens=512))  # fmt: skip
    few = Vectors([torch.randn(640, 8)])
    nan, large = (torch.cat(list(vectors)) for _ in range(2))
    nan[500, 3], large[500, 3] = torch.nan, 1e6
    whole = replace(EXPERIMENT, contexts=ContextSettings(cached_tokens=1_000, held_out_tokens=1_000))
    cases = {
        "is a transcoder, which needs activations at two hooks": (
            vectors,
            {"T": Contender((transcoder,), "a", "b")},
            EXPERIMENT,
        ),
        "BAE has d_in 9, but the activations at vectors are 8 wide": (vectors, {"BAE": Contender((wide,))}, EXPERIMENT),
        "must be None, got 'gpt2'": (vectors, contenders(), replace(EXPERIMENT, model="gpt2")),
        "of 640 vectors 508 are for training, and a batch takes 512": (few, contenders(), hungry),
        "vectors must be finite, but row 500 holds NaN": (Vectors([nan]), contenders(), whole),
        "do not fit in float16": (Vectors([large]), contenders(), replace(whole, cache_dtype="float16")),
    }
    for message, (given, made, experiment) in cases.items():
        with pytest.raises(ValueError, match=message):
            compare_vectors(given, made, experiment, tmp_path / "run")
    assert not (tmp_path / "run").exists()
