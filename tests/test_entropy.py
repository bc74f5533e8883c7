import json
import math
from itertools import product

import pytest
import torch

from bae_lens import BAE, BAEConfig
from bae_lens.entropy import EntropyEstimate, estimate_entropy, jackknife_entropy
from bae_lens.synthetic import biased_coins


class Coins:
    """A code that is the vectors themselves, over a number of columns that say the same."""

    def __init__(self, copies: int = 1) -> None:
        self.copies = copies

    def encode(self, x):
        return x.repeat(1, self.copies)

    def decode(self, feature_acts):
        return feature_acts[:, : feature_acts.shape[1] // self.copies]


def words(k: int) -> torch.Tensor:
    return torch.tensor(list(product([0.0, 1.0], repeat=k)))


@pytest.mark.parametrize("k", [1, 3, 6])
def test_all_words_have_k_bits(k):
    estimate = estimate_entropy(Coins(), words(k))
    assert estimate.bits == pytest.approx(k)
    assert estimate.varying_features == k
    assert estimate.shared_bits == 0.0
    assert estimate.explained_variance == 1.0
    assert estimate.fvu == 0.0


def test_bits_and_explained_variance_by_hand():
    class Half(Coins):
        def decode(self, feature_acts):
            return feature_acts / 2

    estimate = estimate_entropy(Half(), torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]))
    # Rates 1/2 and 1/4; squared error 3/4; squared distance to the mean 4/4 + 12/16.
    assert estimate.bits == pytest.approx(1 + 2 - 0.75 * math.log2(3))
    assert estimate.explained_variance == pytest.approx(1 - 0.75 / 1.75)


def test_copies_of_a_feature_share_their_bits():
    coins = words(8)
    estimate = estimate_entropy(Coins(copies=2), coins)
    assert estimate.bits == pytest.approx(16.0)
    # Each of 8 pairs shares 1 bit, less what describing it costs: log2(256) / 512.
    assert estimate.shared_bits == pytest.approx(8 * (1 - 8 / 512))
    assert estimate.joint_bits_bound == pytest.approx(8 + 8 * 8 / 512)


def test_three_copies_share_two_bits():
    # The information of pairs is summed over a tree: three pairs would count 3 bits where only 2 are shared.
    estimate = estimate_entropy(Coins(copies=3), words(8)[:, :1].contiguous())
    assert estimate.shared_bits == pytest.approx(2 * (1 - 8 / 512))


def test_batches_count_like_one_tensor():
    x = (torch.rand(900, 5) < 0.3).float()
    whole = estimate_entropy(Coins(), x)
    parts = estimate_entropy(Coins(), (part for part in (x[:1], x[1:40], x[40:40], x[40:].view(43, 20, 5))))
    assert parts.bits == pytest.approx(whole.bits)
    assert parts.n_vectors == 900
    assert parts.explained_variance == whole.explained_variance
    assert parts.corrected_bits == pytest.approx(whole.corrected_bits)


def test_explained_variance_survives_a_distant_origin():
    class Rounded(Coins):
        def encode(self, x):
            return (x > 1e6).to(x)

        def decode(self, feature_acts):
            return feature_acts + (1e6 - 0.5)

    x = 1e6 + torch.tensor([[0.5], [-0.5]], dtype=torch.float64).repeat(500, 1)
    assert estimate_entropy(Rounded(), x).explained_variance == pytest.approx(1.0, abs=1e-6)


def test_jackknife_by_hand():
    # One of 2: leaving either out leaves no entropy, so 2 h(1/2) = 2. One of 3: 3 h(1/3) - 2/3 (0 + 2 h(1/2)).
    fired, n = torch.tensor([1.0], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    assert jackknife_entropy(fired, n).item() == pytest.approx(2.0)
    assert jackknife_entropy(fired, n + 1).item() == pytest.approx(3 * (math.log2(3) - 2 / 3) - 4 / 3)


def test_constant_features_have_no_entropy_after_correction():
    counts = torch.tensor([0.0, 7.0], dtype=torch.float64)
    assert jackknife_entropy(counts, torch.tensor([7.0], dtype=torch.float64)).item() == 0.0


def test_correction_removes_the_bias_and_the_interval_covers():
    known = biased_coins(64 * 200, [0.02] * 20 + [0.1] * 20 + [0.5] * 20, 60, torch.Generator().manual_seed(0))
    estimates = [estimate_entropy(Coins(), part) for part in known.coefficients.split(64)]
    plain = sum(e.bits for e in estimates) / len(estimates) - known.joint_bits
    corrected = sum(e.corrected_bits for e in estimates) / len(estimates) - known.joint_bits
    assert plain < -0.55
    assert abs(corrected) < 0.1
    covered = sum(e.interval[0] <= known.joint_bits <= e.interval[1] for e in estimates) / len(estimates)
    assert 0.85 <= covered <= 0.99


def test_seed_decides_the_interval():
    x = (torch.rand(100, 5) < 0.3).float()
    first, again, other = (estimate_entropy(Coins(), x, seed).interval for seed in (0, 0, 1))
    assert first == again != other


def test_estimate_goes_through_json():
    estimate = estimate_entropy(Coins(), words(3))
    assert EntropyEstimate.from_dict(json.loads(json.dumps(estimate.to_dict()))) == estimate


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (torch.zeros(0, 3), "at least 2 vectors, got 0"),
        (torch.zeros(1, 3), "at least 2 vectors, got 1"),
        (torch.ones(5, 3), "all the same"),
        (torch.full((5, 3), 0.5), "one of 0 and 1"),
        (torch.tensor([[0.0], [math.nan]]), "1 of 2 in a batch hold NaN"),
        ([torch.zeros(3)], "at least 2 axes"),
    ],
)
def test_bad_vectors_are_refused(vectors, message):
    with pytest.raises(ValueError, match=message):
        estimate_entropy(Coins(), vectors)


def test_another_width_is_refused():
    class Fixed(Coins):
        def decode(self, feature_acts):
            return feature_acts[:, :2]

    with pytest.raises(ValueError, match="2 wide, got 3"):
        estimate_entropy(Fixed(), words(3))
    with pytest.raises(ValueError, match="4 wide"):
        estimate_entropy(BAE(BAEConfig(d_in=4, d_sae=8)), words(3))
