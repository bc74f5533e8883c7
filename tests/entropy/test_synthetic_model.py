import math

import pytest
import torch

from bae_lens.entropy.synthetic_model import SyntheticModel, bit_model, random_embedding_model


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def empirical_bits(states: torch.Tensor) -> float:
    """Entropy of the states as they come, told apart to six digits."""
    _, counts = states.mul(1e4).round().unique(dim=0, return_counts=True)
    share = counts.double() / len(states)
    return -(share * share.log2()).sum().item()


def test_a_state_by_hand():
    # A quarter turn: the token before the last is turned once.
    words = torch.tensor([[0.0], [1.0]])
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    model = SyntheticModel(words, embeddings, quarter, torch.full((2, 2), 0.5), (1, 2, 3))
    tokens = torch.tensor([[0, 1, 1]])
    assert model.states(tokens, 0, 3).tolist() == [[0.0, 3.0]]
    assert model.states(tokens, 1, 3).tolist() == [[-3.0, 3.0]]  # (0, 3) turned is (-3, 0)
    assert model.states(tokens, 2, 3).tolist() == [[-4.0, 3.0]]  # (1, 0) turned twice is (-1, 0)
    assert model.states(tokens, 2, 1).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(("layer", "position", "bits"), [(0, 1, 3.0), (0, 2, 6.0), (0, 5, 6.0), (1, 5, 15.0)])
def test_independent_bits_add_up_until_the_window_is_full(layer, position, bits):
    model = bit_model(3, 16, (2, 8), generator())
    assert model.joint_bits(layer, position) == pytest.approx(bits)
    assert model.marginal_bits(layer, position) == pytest.approx(bits)


def test_a_token_that_follows_another_adds_less():
    model = bit_model(2, 16, (3,), generator(), flip=0.25)
    rate = 2 - 0.75 * math.log2(3)  # h(1/4)
    assert model.joint_bits(0, 3) == pytest.approx(2 * (1 + 2 * rate))
    assert model.marginal_bits(0, 3) == pytest.approx(6)


def test_random_embeddings_take_a_bit_for_each_token():
    model = random_embedding_model(4, 16, (2,), generator())
    assert model.joint_bits(0, 2) == pytest.approx(4)
    assert model.marginal_bits(0, 2) == pytest.approx(2 * 4 * (2 - 0.75 * math.log2(3)))


def test_repeated_tokens_by_hand():
    # The next of two tokens is the same with probability 3/4.
    model = random_embedding_model(2, 8, (4,), generator(), repeat=0.5)
    assert model.transition.tolist() == [[0.75, 0.25], [0.25, 0.75]]
    assert model.joint_bits(0, 4) == pytest.approx(1 + 3 * (2 - 0.75 * math.log2(3)))


@pytest.mark.parametrize(
    "model", [bit_model(2, 12, (2,), generator(), flip=0.1), random_embedding_model(3, 12, (2,), generator(), 0.6)]
)
def test_states_have_the_entropy_that_is_said(model):
    tokens = model.tokens(40_000, 3, generator(1))
    for position in (1, 2, 3):
        found = empirical_bits(model.states(tokens, 0, position))
        assert found == pytest.approx(model.joint_bits(0, position), abs=0.02)


def test_tokens_follow_the_process():
    model = bit_model(2, 8, (1,), generator(), flip=0.2)
    tokens = model.tokens(20_000, 2, generator(1))
    assert tokens[:, 0].bincount().div(20_000).tolist() == pytest.approx([0.25] * 4, abs=0.015)
    turned = (model.words[tokens[:, 0]] != model.words[tokens[:, 1]]).float().mean(0)
    assert turned.tolist() == pytest.approx([0.2, 0.2], abs=0.01)
    assert torch.equal(tokens, model.tokens(20_000, 2, generator(1)))


def test_rotation_keeps_norms():
    model = bit_model(2, 8, (1,), generator())
    torch.testing.assert_close(model.rotation @ model.rotation.T, torch.eye(8), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bit_model(0, 8, (1,), generator()), "n_bits must be at least 1, got 0"),
        (lambda: bit_model(2, 8, (), generator()), r"window must be at least 1 token, got \[\]"),
        (lambda: bit_model(2, 8, (2, 0), generator()), "window must be at least 1 token"),
        (lambda: bit_model(2, 8, (1,), generator(), flip=1.1), r"flip must lie in \[0, 1\], got 1.1"),
        (lambda: random_embedding_model(1, 8, (1,), generator()), "n_tokens must be at least 2, got 1"),
        (lambda: random_embedding_model(3, 8, (1,), generator(), -0.1), r"repeat must lie in \[0, 1\], got -0.1"),
    ],
)
def test_models_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_places_that_are_not_there_are_refused():
    model = bit_model(2, 8, (1, 2), generator())
    with pytest.raises(ValueError, match="layers are 0 to 1 and positions start at 1, got 2 and 1"):
        model.joint_bits(2, 1)
    with pytest.raises(ValueError, match="positions start at 1, got 0 and 0"):
        model.marginal_bits(0, 0)
    with pytest.raises(ValueError, match="at most the 3 tokens, got 4"):
        model.states(torch.zeros(2, 3, dtype=torch.long), 0, 4)
