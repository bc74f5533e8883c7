import pytest

from bae_lens.fit import FitSettings
from bae_lens.recovery import Recovery, recover


@pytest.mark.usefixtures("one_thread")
def test_rows_are_ranks_in_order_and_held_out():
    rows = recover((2, 3), 8, settings=FitSettings(steps=2, batch_size=32), n_vectors=200)
    assert [(row.rank, row.true_bits, row.d_sae) for row in rows] == [(2, 2.0, 8), (3, 3.0, 8)]
    assert Recovery.from_dict(rows[0].to_dict()) == rows[0]


def test_relative_error():
    assert Recovery(8, 64, 0, 8.0, 9.0, 8.0, 0.0, 9, 1.0).relative_error == pytest.approx(0.125)
