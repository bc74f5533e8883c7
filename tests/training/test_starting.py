from dataclasses import replace

import pytest
import torch
from sae_lens import TopKTrainingSAEConfig

from bae_lens import DictionarySpec, Recipe, TrainingBAEConfig, TrainingSettings, train_dictionary

SETTINGS = TrainingSettings(training_tokens=320, batch_size=32)
CONFIGS = {
    "bae": TrainingBAEConfig(d_in=16, d_sae=64, encoder_bias_init=-0.5),
    "topk": TopKTrainingSAEConfig(d_in=16, d_sae=64, k=8),
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", CONFIGS)
def test_training_goes_on_from_a_saved_dictionary(name, states, tmp_path):
    train, test = states[:2]
    x = test.rows(test.content)
    saved = train_dictionary(name, Recipe(CONFIGS[name], 4e-3), train, SETTINGS, tmp_path / "first").sae
    still = train_dictionary(name, Recipe(CONFIGS[name], 1e-12, saved), train, SETTINGS, tmp_path / "still").sae
    torch.testing.assert_close(still(x), saved(x), rtol=1e-3, atol=1e-3)
    further = train_dictionary(name, Recipe(CONFIGS[name], 1e-3, saved), train, SETTINGS, tmp_path / "further").sae
    error = {each: (sae(x) - x).square().sum().item() for each, sae in {"saved": saved, "further": further}.items()}
    assert error["further"] < 0.9 * error["saved"]


def test_another_start_is_another_training(states, tmp_path):
    saved = train_dictionary("bae", Recipe(CONFIGS["bae"], 4e-3), states[0], SETTINGS, tmp_path / "first").sae
    recipe = Recipe(CONFIGS["bae"], 1e-3, saved)
    train_dictionary("bae", recipe, states[0], SETTINGS, tmp_path / "further")
    with torch.no_grad():
        saved.W_dec.add_(1e-3)
    for other in (recipe, replace(recipe, start=None)):
        with pytest.raises(ValueError, match=r"holds something else \(recipe\.start_from: "):
            train_dictionary("bae", other, states[0], SETTINGS, tmp_path / "further")


def test_a_description_takes_what_the_dictionary_says(states, tmp_path):
    cfg = TopKTrainingSAEConfig(d_in=16, d_sae=40, k=7)
    train_dictionary("d", Recipe(cfg, 1e-3), states[0], SETTINGS, tmp_path)
    spec = DictionarySpec("topk", start_from=str(tmp_path / "dictionaries" / "d"))
    (recipe,) = spec.contender_by_width(lambda _: {"h": 16}, "h", 4, 100).trials
    assert (recipe.cfg.d_sae, recipe.cfg.to_dict()["k"]) == (40, 7)
    assert recipe.start is not None
    with pytest.raises(ValueError, match="to start from has d_sae 40, and asked for is 64"):
        replace(spec, config={"d_sae": 64}).contender_by_width(lambda _: {"h": 16}, "h", 4, 100)
    with pytest.raises(ValueError, match="to start from has d_in 16, and asked for is 12"):
        spec.contender_by_width(lambda _: {"h": 12}, "h", 4, 100)
