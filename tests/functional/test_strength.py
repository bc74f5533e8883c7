import pytest
import torch

from bae_lens.functional.strength import (
    activation_strength,
    count_instances,
    flip_polarity,
    running_mean_weight,
    strongest_features,
)


def test_running_mean_starts_at_the_first_value():
    assert running_mean_weight(0, 0.99) == 1


def test_running_mean_is_the_decayed_weighted_mean():
    values, decay, mean = torch.rand(20, dtype=torch.float64), 0.9, torch.zeros((), dtype=torch.float64)
    for n_steps, value in enumerate(values):
        mean = mean.lerp(value, running_mean_weight(n_steps, decay))

    weights = decay ** torch.arange(19, -1, -1, dtype=torch.float64)

    torch.testing.assert_close(mean, (weights * values).sum() / weights.sum(), rtol=1e-12, atol=0)


def test_activation_strength_by_hand():
    # Prior 1/4: a set bit has log2 3/4, an unset one log2 1/4 = -2. Prior 1: log2 0 for a set bit, log2 1 for an unset.
    strength = activation_strength(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([0.25, 1.0]))

    torch.testing.assert_close(strength, torch.tensor([[-0.41503750, -torch.inf], [-2.0, 0.0]]))


def test_rare_set_bits_are_stronger_than_common_ones():
    strength = activation_strength(torch.ones(3), torch.tensor([0.01, 0.3, 0.9]))

    assert strength.argsort(descending=True).tolist() == [0, 1, 2]


def test_strongest_features_come_strongest_first():
    strength = torch.tensor([[-0.5, -0.1, -3.0, -0.2], [-0.9, -0.3, -0.2, -0.4]])

    assert strongest_features(strength, k=3).tolist() == [[1, 3, 0], [2, 1, 3]]


def test_fills_up_with_minus_one_below_the_floor():
    # -1 bit is exactly what a prior of 1/2 gives both values of a bit: no surprise
    strength = torch.tensor([-torch.inf, -1.0, -0.999, -5.0])

    assert strongest_features(strength, k=3).tolist() == [2, -1, -1]


def test_a_floor_of_zero_leaves_inactive_features_out():
    assert strongest_features(torch.tensor([0.0, 2.0, 0.0, 0.1]), k=4, floor=0.0).tolist() == [1, 3, -1, -1]


def test_takes_ten_features_by_default():
    assert strongest_features(torch.zeros(12)).shape == (10,)


@pytest.mark.parametrize("k", [0, -1])
def test_refuses_k_below_one(k):
    with pytest.raises(ValueError, match=f"k must be at least 1, got {k}"):
        strongest_features(torch.zeros(4), k)


def test_counts_the_tokens_that_activate_a_feature():
    activated = torch.tensor([[[0, 2], [2, -1]], [[4, 2], [-1, -1]]])

    assert count_instances(activated, d_sae=6).tolist() == [1, 0, 3, 0, 1, 0]


def test_flipping_exchanges_zero_and_one_and_keeps_the_reconstruction():
    W_enc, b_enc, W_dec, b_dec, x = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((4, 6), (6,), (6, 4), (4,), (50, 4))
    )
    prior, flip = torch.rand(6, dtype=torch.float64), torch.tensor([1, 0, 0, 1, 1, 0], dtype=torch.float64)
    old_prior, old_code = prior.clone(), (x @ W_enc + b_enc >= 0).double()
    old_output = old_code @ W_dec + b_dec

    flip_polarity(flip, W_enc, b_enc, W_dec, b_dec, prior)
    code = (x @ W_enc + b_enc >= 0).double()

    assert code.equal(torch.where(flip.bool(), 1 - old_code, old_code))
    torch.testing.assert_close(code @ W_dec + b_dec, old_output, rtol=0, atol=1e-12)
    torch.testing.assert_close(prior, torch.where(flip.bool(), 1 - old_prior, old_prior))
