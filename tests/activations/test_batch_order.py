from itertools import chain, islice

import numpy as np
import pytest
import torch

from bae_lens.activations import batch_order
from bae_lens.activations.batch_order import BLOCK_ROWS, WINDOW_BLOCKS, EpochOrder, epochs


@pytest.fixture
def small_windows(monkeypatch):
    """Windows of 3 blocks."""
    monkeypatch.setattr(batch_order, "WINDOW_BLOCKS", 3)


def all_rows(order: EpochOrder) -> list[list[int]]:
    return [order.rows(window).tolist() for window in range(len(order.windows))]


def test_up_to_a_window_everything_is_mixed_with_everything_as_it_always_was():
    content = torch.arange(5, BLOCK_ROWS * WINDOW_BLOCKS, 31)
    for epoch in (0, 3):
        order = EpochOrder(content, 7, epoch, BLOCK_ROWS)
        seed = int(np.random.SeedSequence([7, epoch]).generate_state(1)[0])
        expected = content[torch.randperm(len(content), generator=torch.Generator().manual_seed(seed))]
        assert len(order.windows) == 1
        assert torch.equal(order.rows(0), expected)
    assert len(EpochOrder(torch.tensor([0, BLOCK_ROWS * WINDOW_BLOCKS]), 7, 0, BLOCK_ROWS).windows) == 2


@pytest.mark.usefixtures("small_windows")
def test_every_row_comes_once_an_epoch_with_those_of_two_other_blocks():
    content = torch.tensor([row for row in range(50) if row % 7])
    windows = all_rows(order := EpochOrder(content, 0, 0, 4))
    assert sorted(chain.from_iterable(windows)) == content.tolist()
    assert [len(rows) for rows in windows] == [order.size(window) for window in range(len(windows))]
    assert [{row // 4 for row in rows} for rows in windows] == [set(blocks) for blocks in order.windows]
    assert [len(blocks) for blocks in order.windows] == [3, 3, 3, 3, 1]
    assert all(blocks == sorted(blocks) for blocks in order.windows)
    assert all(rows != sorted(rows) for rows in windows[:-1])


@pytest.mark.usefixtures("small_windows")
def test_seed_and_epoch_give_the_order():
    content = torch.arange(60)
    orders = [all_rows(EpochOrder(content, *which, 4)) for which in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] != orders[3] != orders[0]
    blocks = [EpochOrder(content, *which, 4).windows for which in ((0, 0), (0, 1), (1, 0))]
    assert blocks[0] != blocks[1] != blocks[2] != blocks[0]


@pytest.mark.usefixtures("small_windows")
def test_a_row_comes_anywhere_and_beside_any_other():
    content, n = torch.arange(120), 400  # 30 blocks in 10 windows
    where, together = np.zeros((120, 10)), np.zeros((30, 30))
    for epoch in range(n):
        order = EpochOrder(content, 0, epoch, 4)
        for window, blocks in enumerate(order.windows):
            where[order.rows(window).numpy(), window] += 1
            together[np.ix_(blocks, blocks)] += 1
    assert np.abs(where / n - 1 / 10).max() < 5 * (0.1 * 0.9 / n) ** 0.5
    others = together[~np.eye(30, dtype=bool)] / n  # two of 29 others are in a block's window
    assert np.abs(others - 2 / 29).max() < 5 * (2 / 29 / n) ** 0.5


def test_within_a_window_no_row_is_near_where_it_was():
    content = torch.arange(BLOCK_ROWS * WINDOW_BLOCKS)
    moved = (EpochOrder(content, 0, 0, BLOCK_ROWS).rows(0) - content).abs().double().mean() / len(content)
    assert moved.item() == pytest.approx(1 / 3, abs=0.005)


def test_epochs_go_on_from_a_step():
    assert list(islice(epochs(5, 13), 3)) == [(2, 3), (3, 0), (4, 0)]
