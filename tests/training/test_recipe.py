import pytest

from bae_lens.training.recipe import Recipe, TrainingSettings


@pytest.mark.parametrize("mode", ["expected_average_only_in", "layer_norm", "constant_norm_rescale"])
def test_normalizing_what_is_standardized_is_refused(bae_config, mode):
    with pytest.raises(ValueError, match=f"normalize_activations must be 'none', got '{mode}'"):
        Recipe(bae_config(normalize_activations=mode), lr=1e-3)


def test_learning_rate_must_be_positive(bae_config):
    with pytest.raises(ValueError, match=r"lr must be positive and finite, got 0.0"):
        Recipe(bae_config(), lr=0.0)


def test_recipe_as_values_tells_it_from_others(bae_config):
    values = Recipe(bae_config(target_l0=8.0), lr=1e-3).to_dict()
    assert (values["lr"], values["architecture"], values["target_l0"], values["d_sae"]) == (1e-3, "bae", 8.0, 64)
    assert "metadata" not in values
    assert values != Recipe(bae_config(target_l0=9.0), lr=1e-3).to_dict()


def test_steps_are_whole_batches():
    assert TrainingSettings(training_tokens=1000, batch_size=300).steps == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"training_tokens": 100}, r"training_tokens must be at least a batch \(512\), got 100"),
        ({"lr_decay": 1.0}, r"lr_decay must lie in \[0, 1\), got 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**values)
