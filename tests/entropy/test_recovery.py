import pytest
import torch

from bae_lens.entropy.fit import FitSettings
from bae_lens.entropy.recovery import Recovery, agreement, recover


@pytest.mark.usefixtures("one_thread")
def test_rows_are_ranks_in_order_and_held_out():
    rows = recover((2, 3), 8, settings=FitSettings(steps=2, batch_size=32), n_vectors=200)
    assert [(row.rank, row.true_bits, row.d_sae) for row in rows] == [(2, 2.0, 8), (3, 3.0, 8)]
    assert Recovery.from_dict(rows[0].to_dict()) == rows[0]


def test_relative_error():
    assert Recovery(8, 64, 0, 8.0, 9.0, 8.0, 0.0, 9, 1.0, 1.0).relative_error == pytest.approx(0.125)


def test_agreement_by_hand():
    coins = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    negated, late, never = 1 - coins[:, 0], torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.zeros(4)
    assert agreement(torch.stack([negated, coins[:, 1]], 1), coins) == 1.0
    assert agreement(torch.stack([negated, never], 1), coins) == (1 + 3 / 4) / 2
    assert agreement(torch.stack([late, late], 1), coins[:, :1]) == 3 / 4
    assert agreement(never[:, None], coins) == (1 / 2 + 3 / 4) / 2


@pytest.mark.usefixtures("one_thread")
def test_coins_are_found_in_the_held_out_vectors():
    (row,) = recover((3,), 12, settings=FitSettings(steps=600, batch_size=64, lr=3e-2), n_vectors=4000)
    assert row.agreement == 1.0
