from itertools import product

import pytest
import torch

from bae_lens.entropy.elimination import eliminate
from bae_lens.functional.losses import marginal_entropy


def words(k: int) -> torch.Tensor:
    """All 2^k codes: k independent fair coins."""
    return torch.tensor(list(product([0.0, 1.0], repeat=k)))


def loss(code: torch.Tensor, target: torch.Tensor, kept: torch.Tensor, price: float) -> float:
    """Of the best decoder of the features kept."""
    design = torch.cat([code[:, kept], torch.ones(len(code), 1)], 1).double()
    fit = design @ torch.linalg.lstsq(design, target.double(), driver="gelsd").solution
    error = (fit - target).square().sum(1).mean().item()
    return error + price * marginal_entropy(code[:, kept].double().mean(0)).item()


def test_twins_negations_and_constants_go():
    coins = words(3)
    extra = torch.stack([coins[:, 0], 1 - coins[:, 1], torch.ones(8), torch.zeros(8)], 1)
    target = coins @ torch.randn(3, 5) + 2.0
    kept, W_dec, b_dec = eliminate(torch.cat([coins, extra], 1), target, 0.01)
    assert kept.sum() == 3
    assert not kept[5:].any()
    assert kept[[0, 3]].sum() == kept[[1, 4]].sum() == 1
    torch.testing.assert_close(torch.cat([coins, extra], 1) @ W_dec + b_dec, target, atol=1e-4, rtol=0)
    assert not W_dec[~kept].any()


def test_features_that_follow_from_others_go():
    coins = words(4)
    majority = ((coins[:, :3].sum(1)) >= 2).float()
    kept, *_ = eliminate(torch.cat([majority[:, None], coins], 1), coins, 0.01)
    assert kept.tolist() == [False, True, True, True, True]


@pytest.mark.parametrize(("price", "expected"), [(0.9, True), (1.1, False)])
def test_a_fair_coin_of_amplitude_two_is_worth_one(price, expected):
    # Half the time 2 and half the time 0: knowing which saves a squared error of 1, for one bit.
    kept, _, b_dec = eliminate(words(1), 2 * words(1), price)
    assert kept.tolist() == [expected]
    assert b_dec.item() == pytest.approx(0.0 if expected else 1.0, abs=1e-5)


def test_what_a_twin_leaves_behind_is_worth_more():
    # Each of two twins carries half of the amplitude 2, worth 1/4; what is left of them carries all of it, worth 1.
    kept, W_dec, _ = eliminate(words(1).repeat(1, 2), 2 * words(1), 0.5)
    assert kept.sum() == 1
    assert W_dec.sum().item() == pytest.approx(2.0, abs=1e-3)


def test_each_step_is_worth_it_and_no_further_one_would_be():
    generator = torch.Generator().manual_seed(0)
    code = (torch.rand(400, 10, generator=generator) < torch.linspace(0.05, 0.6, 10)).float()
    target = code[:, :6] @ torch.randn(6, 4, generator=generator) + torch.randn(400, 4, generator=generator)
    price = 0.4
    kept, *_ = eliminate(code, target, price)
    assert 0 < kept.sum() < 10
    now = loss(code, target, kept, price)
    assert now < loss(code, target, torch.ones(10, dtype=torch.bool), price)
    for j in kept.nonzero().flatten():
        without = kept.clone()
        without[j] = False
        assert loss(code, target, without, price) > now - 1e-6


def test_decoder_is_least_squares():
    code, target = (torch.rand(60, 3) < 0.4).float(), torch.randn(60, 2)
    kept, W_dec, b_dec = eliminate(code, target, 0.0)
    assert kept.all()
    design = torch.cat([code, torch.ones(60, 1)], 1)
    expected = torch.linalg.lstsq(design, target).solution
    torch.testing.assert_close(torch.cat([W_dec, b_dec[None]]), expected, atol=1e-3, rtol=0)


def test_nothing_is_left_at_an_exorbitant_price():
    target = words(2)
    kept, W_dec, b_dec = eliminate(words(2), target, 1e6)
    assert not kept.any()
    assert not W_dec.any()
    torch.testing.assert_close(b_dec, target.mean(0))


def test_dtype_is_the_targets():
    assert eliminate(words(2), words(2).double(), 0.1).W_dec.dtype == torch.float64


def test_one_row_is_refused():
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        eliminate(torch.ones(1, 2), torch.ones(1, 2), 0.1)
