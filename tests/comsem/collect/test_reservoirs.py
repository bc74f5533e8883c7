import numpy as np
import pytest
import torch

from bae_lens.comsem.collect.reservoirs import Reservoirs, TokenPool, first_of_each


def tokens(place, position=None, token=None) -> torch.Tensor:
    """Rows as `SampledToken`."""
    zeros = torch.zeros_like(place)
    return torch.stack(
        [place, zeros if position is None else position, zeros if token is None else token, zeros, zeros], 1
    )


def test_reservoirs_keep_what_has_the_smallest_keys_whatever_the_batches():
    generator = torch.Generator().manual_seed(0)
    feature = torch.randint(0, 5, (300,), generator=generator)
    key = torch.rand(300, generator=generator, dtype=torch.float64)
    item = tokens(torch.arange(300), feature)
    reservoirs = Reservoirs(7, capacity=4)
    for batch in torch.arange(300).split(23):
        reservoirs.add(feature[batch], key[batch], item[batch])
    for number in range(5):
        members = (feature == number).nonzero().flatten()
        expected = members[key[members].argsort()[:4]].tolist()
        assert [kept.place for kept in reservoirs.of(number)] == expected
        assert {kept.position for kept in reservoirs.of(number)} == {number}
    assert reservoirs.of(6) == []
    assert reservoirs.sizes().tolist() == [4, 4, 4, 4, 4, 0, 0]


def test_every_item_is_as_likely_to_be_kept():
    kept = torch.zeros(40)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        reservoirs = Reservoirs(1, capacity=10)
        for batch in torch.arange(40).split(7):
            key = torch.rand(len(batch), generator=generator, dtype=torch.float64)
            reservoirs.add(torch.zeros_like(batch), key, tokens(batch))
        kept[[token.place for token in reservoirs.of(0)]] += 1
    assert (kept / 300 - 0.25).abs().max() < 5 * (0.25 * 0.75 / 300) ** 0.5


def test_adding_nothing_changes_nothing():
    reservoirs = Reservoirs(2, capacity=3)
    empty = torch.empty(0, dtype=torch.int64)
    reservoirs.add(empty, empty.double(), tokens(empty))
    assert reservoirs.sizes().tolist() == [0, 0]


def test_first_of_each_group_has_its_smallest_key():
    group, key = torch.tensor([3, 1, 3, 1, 7]), torch.tensor([0.5, 0.2, 0.1, 0.3, 0.9], dtype=torch.float64)
    assert first_of_each(group, key).tolist() == [1, 2, 4]


@pytest.fixture
def pool() -> TokenPool:
    pool = TokenPool(capacity=6, d_sae=10)
    fires = torch.zeros(12, 10, dtype=torch.bool)
    fires[::2, 9] = True
    item = tokens(torch.arange(12), torch.arange(12) * 2, torch.arange(12) % 4)
    for batch in torch.arange(12).split(5):
        pool.add(batch.flip(0).double(), item[batch], fires[batch])
    return pool


def test_pool_keeps_tokens_with_what_fires_in_their_sentences(pool):
    kept = pool.items[:, 0].tolist()
    bits = np.unpackbits(pool.bits.numpy(), axis=1, count=10)
    assert len(kept) == 6
    assert bits[:, 9].tolist() == [place % 2 == 0 for place in kept]
    assert not bits[:, :9].any()
    assert [kept[index] for index in pool.silent(9)] == [place for place in kept if place % 2]
    assert len(pool.silent(0)) == 6


def test_controls_are_matched_by_frequency_of_the_token_and_position_without_replacement(pool):
    pool.items = tokens(torch.arange(4), torch.tensor([1, 30, 1, 30]), torch.tensor([2, 2, 3, 3]))
    counts = torch.tensor([0, 900, 1000, 4])
    matched = pool.matched(torch.arange(4), torch.tensor([1, 1, 3]), torch.tensor([28, 1, 2]), counts)
    assert matched.tolist() == [1, 0, 2]
    assert pool.matched(torch.tensor([3]), torch.tensor([1, 1]), torch.tensor([28, 1]), counts).tolist() == [3]
