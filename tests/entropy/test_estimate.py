import json
import math
from itertools import product

import pytest
import torch

from bae_lens import BAE, BAEConfig
from bae_lens.entropy import estimate
from bae_lens.entropy.estimate import EntropyEstimate, estimate_entropy, fit_tree, jackknife_entropy
from bae_lens.entropy.fit import FitSettings, fit_bae
from bae_lens.entropy.synthetic import biased_coins, correlated_coins, random_directions


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
    assert estimate.joint_bits_bound >= k
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
    estimate = estimate_entropy(Coins(copies=2), words(8))
    assert estimate.bits == pytest.approx(16.0)
    assert 8 <= estimate.joint_bits_bound < 8.5  # what more than 8 is for the rates, which halves do not have alike


def test_three_copies_share_two_bits():
    # A feature is coded given one other: all three pairs would count 3 bits where only 2 are shared.
    estimate = estimate_entropy(Coins(copies=3), words(8)[:, :1].contiguous())
    assert estimate.joint_bits_bound == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_independent_coins_share_nothing_even_if_they_are_few(rate):
    known = biased_coins(5 * 200, [rate] * 200, 200, torch.Generator().manual_seed(0))
    for part in known.coefficients.split(200):
        estimate = estimate_entropy(Coins(), part)
        assert estimate.joint_bits_bound > estimate.corrected_bits - 0.3


def test_most_that_correlated_coins_share_is_found():
    known = correlated_coins(200, 16, 16, torch.Generator().manual_seed(0))
    noise = biased_coins(200, [0.5] * 180, 180, torch.Generator().manual_seed(1))
    code = torch.cat([known.coefficients, noise.coefficients], 1)
    shared = known.marginal_bits - known.joint_bits
    estimate = estimate_entropy(Coins(), code)
    rates = len(code[0]) * 0.72 / 100  # what rates that are learnt from half of the vectors cost the others, in bits
    found = estimate.corrected_bits - estimate.joint_bits_bound + rates
    assert 0.85 * shared < found < 1.05 * shared


def test_what_clusters_have_in_common_is_not_shared_by_features():
    # 20 clusters of equal vectors: features agree by chance in all vectors of a cluster.
    known = biased_coins(20, [0.5] * 100, 100, torch.Generator().manual_seed(0))
    code, clusters = known.coefficients.repeat_interleave(20, 0), torch.arange(20).repeat_interleave(20)
    assert estimate_entropy(Coins(), code).joint_bits_bound < 80
    assert estimate_entropy(Coins(), code, clusters=clusters).joint_bits_bound > 100


def test_batches_make_no_difference(monkeypatch):
    monkeypatch.setattr(estimate, "ROWS", 64)
    generator = torch.Generator().manual_seed(0)
    rates = torch.linspace(0.001, 0.5, 300)
    x = (torch.rand(900, 300, generator=generator) < rates).float()
    whole = estimate_entropy(Coins(), x, clusters=torch.arange(900) // 3)
    for sizes in ((1, 39, 0, 860), (300, 300, 300)):
        assert estimate_entropy(Coins(), x.split(sizes), clusters=torch.arange(900) // 3) == whole
    whole = estimate_entropy(Coins(), x)
    assert estimate_entropy(Coins(), [x[:40], x[40:].view(43, 20, 300)]) == whole


def test_correction_stays_below_a_bit_a_feature():
    estimate = estimate_entropy(Coins(), words(3))
    assert estimate.corrected_bits == 3.0
    assert estimate.interval[1] == 3.0


@pytest.mark.parametrize("copies", [1, 4])
def test_interval_is_as_wide_as_theory_says(copies):
    # The bits of n vectors have variance p (1 - p) h'(p)^2 / n a coin; coins that repeat one another add up linearly.
    rates = torch.tensor([0.8, 0.9, 0.1, 0.7])
    known = biased_coins(4000, rates.tolist(), 4, torch.Generator().manual_seed(0))
    slope = ((1 - rates) / rates).log2()
    deviation = copies * (rates * (1 - rates) * slope**2 / 4000).sum().sqrt().item()
    low, high = estimate_entropy(Coins(copies), known.coefficients).interval
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.12)


def test_clusters_widen_the_interval():
    known = biased_coins(1000, [0.1, 0.8], 2, torch.Generator().manual_seed(0))
    order = torch.randperm(9000, generator=torch.Generator().manual_seed(1))
    x, clusters = known.coefficients.repeat(9, 1)[order], torch.arange(1000).repeat(9)[order]
    once, naive, clustered = (
        high - low
        for low, high in (
            estimate_entropy(Coins(), known.coefficients).interval,
            estimate_entropy(Coins(), x).interval,
            estimate_entropy(Coins(), x, clusters=clusters).interval,
        )
    )
    assert naive == pytest.approx(once / 3, rel=0.3)
    assert clustered == pytest.approx(once, rel=0.3)


@pytest.mark.parametrize("n", [5, 11])
def test_clusters_are_of_every_vector(n):
    with pytest.raises(ValueError, match="clusters must name one for each"):
        estimate_entropy(Coins(), words(3), clusters=torch.arange(n))


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


def test_interval_begins_at_zero_or_above():
    rare = torch.zeros(60, 2)
    rare[0, 0] = rare[1, 1] = 1
    estimate = estimate_entropy(Coins(), rare, tree=fit_tree(Coins(), rare))
    assert estimate.joint_interval is not None
    assert (estimate.interval[0], estimate.joint_interval[0]) == (0.0, 0.0)


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


@pytest.mark.parametrize("n_clusters", [6, 25, 204])
def test_copies_of_one_coin_are_not_bounded_below_its_one_bit(n_clusters):
    # Halves differ in the coin's rate, which must not count as something shared.
    for seed in range(5):
        generator = torch.Generator().manual_seed(100 + seed)
        clusters = torch.arange(204) % n_clusters
        coin = (torch.rand(n_clusters, generator=generator) < 0.5)[clusters]
        if n_clusters < 204:
            coin = torch.where(torch.rand(204, generator=generator) < 0.1, ~coin, coin)
        code = coin[:, None].float().expand(204, 50).contiguous()
        estimate = estimate_entropy(Coins(), code, clusters=clusters)
        assert estimate.joint_bits_bound > 0.95 * estimate.corrected_bits / 50


def test_vectors_made_with_the_same_seed_are_halved_all_the_same():
    coin = torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.5

    assert estimate_entropy(Coins(), coin[:, None].float().expand(400, 8).contiguous()).joint_bits_bound < 2


def test_refuses_an_interval_over_one_cluster():
    with pytest.raises(ValueError, match="needs at least 2 of them, got 1"):
        estimate_entropy(Coins(), torch.eye(4), clusters=torch.zeros(4, dtype=torch.long))


def test_refuses_batches_of_different_widths():
    with pytest.raises(ValueError, match="one batch is 3 wide and another 2"):
        estimate_entropy(Coins(), [torch.eye(3), torch.eye(2)])


def test_a_bfloat16_dictionary_is_measured_against_the_vectors_as_they_are():
    vectors = random_directions(4096, 4, 16, torch.Generator().manual_seed(0)).vectors + 100
    bae = fit_bae(vectors, d_sae=16, settings=FitSettings(steps=200, elimination=False)).to(torch.bfloat16)

    error = (bae(vectors.bfloat16()).double() - vectors.double()).square().sum()
    expected = 1 - error / (vectors - vectors.mean(0)).double().square().sum()
    assert estimate_entropy(bae, vectors).explained_variance == pytest.approx(expected.item(), rel=1e-3)


def test_vectors_too_large_for_the_dictionary_are_refused():
    bae = BAE(BAEConfig(d_in=6, d_sae=11, dtype="float16"))
    x = torch.randn(64, 6) * 1e5
    with pytest.raises(ValueError, match=r"finite in the dictionary's torch.float16, but some are too large"):
        estimate_entropy(bae, x)
