import math
from itertools import product

import pytest
import torch

from bae_lens.functional import tree_entropy
from bae_lens.functional.losses import marginal_entropy
from bae_lens.functional.tree_entropy import PairCounts, PairTree, learn_tree


def counted(code: torch.Tensor) -> PairCounts:
    counts = PairCounts(code)
    counts.add(code)
    return counts


def chain(n: int, k: int, flip: float, seed: int = 0) -> torch.Tensor:
    """Each fair bit is the one before, turned over with probability `flip`."""
    turns = torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) < torch.tensor([0.5, *[flip] * (k - 1)])
    return (turns.cumsum(1) % 2).float()


def test_bits_by_hand():
    # The first feature fires in 1 of 4 by itself; the second in 1 of 2 if the first does, in 1 of 8 if not.
    tree = PairTree(torch.tensor([-1, 0]), torch.tensor([0.25, 0.125]), torch.tensor([0.9, 0.5]))
    code = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    expected = [2 + 1, 2 + 1, -math.log2(0.75) + 3, -math.log2(0.75) - math.log2(0.875)]
    assert tree.bits(code).tolist() == pytest.approx(expected)
    assert tree.mean_bits(counted(code)) == pytest.approx(sum(expected) / 4)


def test_rates_by_hand():
    # 3 of 8 fire, so (3 + 1/2) / 9 alone. A copy: 3 of 3 and 0 of 5 given it, and one imagined vector of rate 3.5 / 9.
    counts = counted(torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0])[:, None].repeat(1, 2))
    tree = learn_tree(counts)
    (child,) = (tree.parents >= 0).nonzero().flatten().tolist()
    assert tree.rate[1 - child].item() == pytest.approx(3.5 / 9)
    assert tree.rate_given[child].item() == pytest.approx((3 + 3.5 / 9) / 4)
    assert tree.rate[child].item() == pytest.approx((3.5 / 9) / 6)


def test_a_chain_of_bits_has_its_own_entropy():
    train, test = chain(4000, 6, 0.1), chain(4000, 6, 0.1, seed=1)
    tree = learn_tree(counted(train))
    true = 1 + 5 * marginal_entropy(torch.tensor([0.1])).item()
    assert tree.bits(test).mean().item() == pytest.approx(true, rel=0.02)
    between = {frozenset((i, int(p))) for i, p in enumerate(tree.parents) if p >= 0}
    assert between == {frozenset((i, i + 1)) for i in range(5)}


def test_mean_bits_are_the_mean_of_bits():
    train, test = chain(300, 5, 0.2), chain(200, 5, 0.3, seed=1)
    tree = learn_tree(counted(train))
    assert tree.mean_bits(counted(test)) == pytest.approx(tree.bits(test).mean().item())


def test_independent_features_have_hardly_a_parent_and_cost_their_entropy():
    code = (torch.rand(500, 40, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    tree = learn_tree(counted(code))
    assert (tree.parents >= 0).sum() <= 2  # of 780 pairs
    assert tree.bits(code).mean().item() == pytest.approx(marginal_entropy(code.mean(0)).item(), abs=0.03)


def test_a_tree_of_all_words_of_three_bits_with_their_parity_is_no_shorter():
    # Any two of the four bits are independent, though each follows from the other three.
    words = torch.tensor(list(product([0.0, 1.0], repeat=3)))
    code = torch.cat([words, words.sum(1, keepdim=True) % 2], 1)
    assert learn_tree(counted(code)).bits(code).mean().item() == pytest.approx(4)


def test_a_feature_that_was_never_on_costs_what_half_a_firing_says():
    tree = learn_tree(counted(torch.zeros(7, 1)))
    assert tree.bits(torch.ones(1, 1)).item() == pytest.approx(4)


def test_counts_come_in_batches_and_in_blocks(monkeypatch):
    code = chain(100, 7, 0.2)
    whole = counted(code)
    monkeypatch.setattr(tree_entropy, "ROWS", 9)
    monkeypatch.setattr(tree_entropy, "ENTRIES", 14)
    parts = PairCounts(code)
    for part in code.split(30):
        parts.add(part)
    assert torch.equal(parts.together, whole.together)
    assert (parts.n, parts.fired.tolist()) == (100, code.sum(0).tolist())
    assert torch.equal(learn_tree(parts).parents, learn_tree(whole).parents)


def test_of_many_features_the_pairs_of_those_that_vary_most_are_counted(monkeypatch):
    monkeypatch.setattr(tree_entropy, "MOST_FEATURES", 2)
    fair = (torch.rand(400, 1, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    rare = (torch.rand(400, 1, generator=torch.Generator().manual_seed(1)) < 0.1).float()
    code = torch.cat([rare, fair, rare, fair], 1)
    counts = counted(code)
    assert counts.features.tolist() == [1, 3]
    tree = learn_tree(counts)
    assert sorted(tree.parents.tolist()) in ([-1, -1, -1, 1], [-1, -1, -1, 3])
    expected = marginal_entropy(code.mean(0)[:3]).item()
    assert tree.bits(code).mean().item() == pytest.approx(expected, abs=0.05)
    assert tree.mean_bits(counts) == pytest.approx(tree.bits(code).mean().item())


class OnGPU(torch.Tensor):
    """What says that it is on a GPU."""

    is_cuda = True


def test_as_many_pairs_are_counted_on_every_device(monkeypatch):
    monkeypatch.setattr(tree_entropy, "MOST_FEATURES", 2)
    code = chain(100, 7, 0.2)
    assert len(PairCounts(code).features) == len(PairCounts(code.as_subclass(OnGPU)).features) == 2
