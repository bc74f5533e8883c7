from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from bae_lens.functional import nonnegative_code
from bae_lens.functional.nonnegative_code import fit_values, pursue


def squared_error(target: torch.Tensor, code: torch.Tensor, W_dec: torch.Tensor) -> torch.Tensor:
    return (target.double() - code.double() @ W_dec.double()).square().sum(-1)


def test_values_are_those_of_scipy():
    W, target = torch.randn(40, 12).double(), torch.randn(60, 12).double()
    fires = torch.rand(60, 40) < torch.linspace(0, 0.9, 60)[:, None]  # from none to three times the width
    code = fit_values(target, fires, W)
    assert (code >= 0).all()
    assert not code[~fires].any()
    for x, own, row in zip(target, fires, code, strict=True):
        if own.any():
            values, norm = nnls(W[own].T.numpy(), x.numpy())
            assert squared_error(x, row, W).sqrt().item() == pytest.approx(norm, abs=1e-5)
            if own.sum() <= 12:
                assert row[own].tolist() == pytest.approx(values.tolist(), abs=1e-4)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 6))
def test_no_feature_at_0_lowers_the_error_and_no_other_has_a_slope(seed, rank):
    drawing = torch.Generator().manual_seed(seed)
    W = torch.randn(20, rank, generator=drawing).double() @ torch.randn(rank, 9, generator=drawing).double()
    target, fires = torch.randn(15, 9, generator=drawing).double(), torch.rand(15, 20, generator=drawing) < 0.6
    code = fit_values(target, fires, W)
    norms = W.norm(dim=1)
    slope = (target - code.double() @ W) @ (W / norms[:, None]).T
    rounding = 1e-6 * (target.norm(dim=1) + code.double() @ norms)[:, None].expand_as(slope)  # values are in float32
    assert (slope < rounding)[fires].all()
    assert (slope.abs() < rounding)[code > 0].all()


def test_hand_number():
    # Along (1, 0) and (1, 1): (1, 3) is nearest to 2 (1, 1), whose share of (1, 0) would be -2; (3, 1) is their sum.
    W, target = torch.tensor([[1.0, 0], [1, 1]]), torch.tensor([[1.0, 3], [3, 1]])
    assert fit_values(target, torch.ones(2, 2).bool(), W).tolist() == [
        [0, pytest.approx(2)],
        [pytest.approx(2), pytest.approx(1)],
    ]


def test_features_without_a_row_and_rows_that_are_the_same():
    W = torch.tensor([[0.0, 0], [2, 0], [2, 0]])
    code = fit_values(torch.tensor([[6.0, 1]]), torch.ones(1, 3).bool(), W)
    assert code[0, 0] == 0
    assert (2 * code[0, 1:]).sum().item() == pytest.approx(6)


def test_scale_of_the_rows_makes_no_difference():
    W, target = torch.randn(30, 8), torch.randn(20, 8)
    scale = 10.0 ** torch.randint(-4, 5, (30, 1))
    fires = torch.rand(20, 30) < 0.2
    assert torch.allclose(fit_values(target, fires, W), fit_values(target, fires, W * scale) * scale.T, atol=1e-5)


def test_vectors_do_not_depend_on_each_other(monkeypatch):
    W, target, counts = torch.randn(50, 16), torch.randn(40, 16), torch.arange(40) % 7
    whole = pursue(target, counts, W)
    monkeypatch.setattr(nonnegative_code, "PRODUCTS_AT_ONCE", 150)
    monkeypatch.setattr(nonnegative_code, "NUMBERS_AT_ONCE", 300)
    assert torch.allclose(pursue(target, counts, W), whole, atol=1e-5)
    alone = torch.cat([pursue(x[None], n[None], W) for x, n in zip(target, counts, strict=True)])
    assert torch.allclose(alone, whole, atol=1e-5)
    assert (whole.count_nonzero(1) <= counts).all()


def test_one_feature_is_the_one_that_points_most_along():
    W, target = torch.randn(30, 8), torch.randn(25, 8)
    code = pursue(target, torch.ones(25, dtype=torch.int64), W)
    assert code.argmax(1).equal((target @ (W / W.norm(dim=1, keepdim=True)).T).argmax(1))
    best = code.argmax(1)
    assert torch.allclose(code.amax(1), (target * W[best]).sum(1) / W[best].square().sum(1), atol=1e-5)


def test_pursuit_finds_what_vectors_are_made_of():
    W = torch.randn(64, 256) / 16  # nearly orthogonal
    code = torch.zeros(50, 64)
    for row in code:
        row[torch.randperm(64)[:5]] = 1 + torch.rand(5)
    found = pursue(code @ W, torch.full((50,), 5), W)
    assert torch.allclose(found, code, atol=1e-4)


def test_what_is_left_decides_by_hand():
    # Of (4, 3, 2) the first two leave (0, 0, 2), along which the third row points; the last points against the first.
    W = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0]])
    assert pursue(torch.tensor([[4.0, 3, 2]]), torch.tensor([3]), W).tolist() == [[4, 3, 2, 0]]


def test_no_feature_is_chosen_twice():
    """Of rows that point much the same way, the first chosen still explains most of what is left."""
    drawing = torch.Generator().manual_seed(0)
    W, code = 1 + 0.3 * torch.randn(12, 20, generator=drawing), 1 + torch.rand(30, 12, generator=drawing)
    assert torch.allclose(pursue(code @ W, torch.full((30,), 12), W), code, atol=1e-3)


def test_pursuit_comes_near_the_best_of_all_supports():
    W, target = torch.randn(10, 5), torch.randn(30, 5)
    found = squared_error(target, pursue(target, torch.full((30,), 3), W), W)
    supports = [torch.zeros(10).bool().index_fill(0, torch.tensor(own), True) for own in combinations(range(10), 3)]
    best = torch.stack([squared_error(target, fit_values(target, own.expand(30, -1), W), W) for own in supports]).amin(
        0
    )
    assert (found >= best - 1e-6).all()
    assert found.mean() < 1.6 * best.mean() + 0.05 * target.square().sum(1).mean()


@pytest.mark.parametrize("target", [torch.tensor([[-1.0, -2.0]]), torch.zeros(1, 2)])
def test_what_no_row_points_along_stays_unexplained(target):
    assert not pursue(target, torch.tensor([2]), torch.eye(2)).any()


def test_no_features_and_no_vectors():
    W = torch.randn(4, 3)
    assert not pursue(torch.randn(5, 3), torch.zeros(5, dtype=torch.int64), W).any()
    assert not fit_values(torch.randn(5, 3), torch.zeros(5, 4).bool(), W).any()
    assert pursue(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), W).shape == (0, 4)


def test_what_is_refused():
    W, bad = torch.eye(2), torch.tensor([[1.0, 0], [torch.nan, 0]])
    with pytest.raises(ValueError, match="1 of 2 hold NaN"):
        fit_values(bad, torch.ones(2, 2).bool(), W)
    with pytest.raises(ValueError, match="1 of 2 hold NaN"):
        pursue(bad, torch.ones(2, dtype=torch.int64), W)
    with pytest.raises(ValueError, match="between 0 and d_sae = 2"):
        pursue(torch.ones(1, 2), torch.tensor([3]), W)
