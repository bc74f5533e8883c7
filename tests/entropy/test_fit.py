import math

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput

from bae_lens import BAE, TrainingBAE, TrainingBAEConfig
from bae_lens.entropy.estimate import estimate_entropy
from bae_lens.entropy.fit import FitSettings, _Weights, fit_bae, fit_baes
from bae_lens.entropy.synthetic import biased_coins, random_directions

SHORT = FitSettings(steps=12, batch_size=32, lr=1e-3)


@pytest.fixture
def sets():
    """Three sets of 128 vectors, 6 wide, in float64."""
    data = [random_directions(128, rank, 6, torch.Generator().manual_seed(rank)).vectors for rank in (1, 3, 5)]
    return torch.stack(data).double()


@pytest.mark.parametrize("rank", [4, 12])
@pytest.mark.usefixtures("one_thread")
def test_number_of_coins_is_recovered(rank):
    # A fifth of the default steps, at thrice the learning rate: few coins in few dimensions are quick to find.
    vectors, _ = random_directions(10_000, rank, 16, torch.Generator().manual_seed(rank))
    bae = fit_bae(vectors[:8000], 48, settings=FitSettings(steps=600, lr=3e-2))
    estimate = estimate_entropy(bae, vectors[8000:])
    assert estimate.bits == pytest.approx(rank, rel=0.01)
    assert estimate.fvu < 1e-2
    assert estimate.varying_features == rank


@pytest.mark.usefixtures("one_thread")
def test_biased_coins_are_recovered_away_from_the_origin():
    known = biased_coins(10_000, [0.1, 0.3, 0.5, 0.7], 16, torch.Generator().manual_seed(0))
    vectors = 100 + 7 * known.vectors
    bae = fit_bae(vectors[:8000], 32, settings=FitSettings(steps=600, lr=3e-2))
    estimate = estimate_entropy(bae, vectors[8000:])
    assert estimate.bits == pytest.approx(known.joint_bits, rel=0.03)
    assert estimate.fvu < 1e-2


def test_batched_equals_one_by_one(sets):
    prices = [0.1, 0.3, 0.9]
    together = fit_baes(sets, 10, 3, prices, SHORT)
    for vectors, price, bae in zip(sets, prices, together, strict=True):
        alone = fit_bae(vectors, 10, 3, price, SHORT)
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(bae.state_dict()[name], value, rtol=1e-9, atol=1e-9)


def test_models_of_a_batch_differ_by_their_price(sets):
    cheap, dear = fit_baes(sets[2].expand(2, -1, -1), 10, 0, [0.01, 3.0], SHORT)
    assert estimate_entropy(cheap, sets[2]).bits > estimate_entropy(dear, sets[2]).bits


@pytest.mark.parametrize("covariance", [0.0, 0.3])
def test_loss_and_gradients_are_those_of_the_training_class(sets, covariance):
    x, price = sets[:, :32], torch.tensor([0.2, 0.5, 0.0], dtype=torch.float64)
    weights = _Weights(3, 6, 10, -0.1, 0, x)
    weights.loss(x, price, covariance).backward()
    total = 0.0
    for i in range(3):
        cfg = TrainingBAEConfig(
            d_in=6,
            d_sae=10,
            dtype="float64",
            entropy_coefficient=price[i].item(),
            covariance_coefficient=covariance,
            encoder_bias_init=-0.1,
            tangent_rate=1.0,
            standardize_activations=False,
        )
        bae = TrainingBAE(cfg)
        with torch.no_grad():
            bae.W_enc.copy_(weights.W_enc[i])
            bae.W_dec.copy_(weights.W_dec[i])
        step = TrainStepInput(
            sae_in=x[i],
            coefficients={"entropy": price[i].item(), "covariance": covariance},
            dead_neuron_mask=None,
            n_training_steps=1,
            is_logging_step=False,
        )
        loss = bae.training_forward_pass(step).loss
        loss.backward()
        total += loss.item()
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            torch.testing.assert_close(getattr(weights, name).grad[i].squeeze(0), getattr(bae, name).grad)
    assert weights.loss(x, price, covariance).item() == pytest.approx(total)


def test_result_is_a_bae_with_its_prior_and_a_life_of_its_own(sets, tmp_path):
    bae = fit_bae(sets[1].float(), 10, settings=SHORT)
    assert isinstance(bae, BAE)
    torch.testing.assert_close(bae.prior, bae.encode(sets[1].float()).mean(0))
    bae.save_model(tmp_path)
    again = BAE.load_from_disk(tmp_path)
    torch.testing.assert_close(again(sets[1].float()), bae(sets[1].float()))


def test_seed_decides(sets):
    x = sets[1].float()
    first, again, other = (fit_bae(x, 10, seed, settings=SHORT) for seed in (0, 0, 1))
    assert torch.equal(first.W_enc, again.W_enc)
    assert not torch.equal(first.W_enc, other.W_enc)


def test_eliminated_features_stay_out(sets):
    bae = fit_bae(sets[0], 10, settings=FitSettings(steps=200, batch_size=32))
    assert 0 < ((bae.prior > 0) & (bae.prior < 1)).sum() < 10
    assert bae.W_dec[bae.prior == 0].abs().max() == 0


def test_eliminated_features_have_no_momentum(sets, monkeypatch):
    original, dropped = _Weights.eliminate, []

    def once(self, *arguments):
        if not dropped:
            original(self, *arguments)
            dropped.append((self.W_dec == 0).all(2))

    monkeypatch.setattr(_Weights, "eliminate", once)
    baes = fit_baes(sets, 10, settings=FitSettings(steps=100, batch_size=32))
    assert dropped[0].any(1).all()
    for bae, gone in zip(baes, dropped[0], strict=True):
        assert not bae.W_enc[:, gone].any()
        assert not bae.W_dec[gone].any()
        assert (bae.b_enc[gone] == -1).all()


def test_without_elimination_all_features_keep_their_decoder(sets):
    bae = fit_bae(sets[1], 10, settings=FitSettings(steps=12, batch_size=32, elimination=False))
    assert (bae.W_dec.norm(dim=1) > 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, :20], "at least a batch of 32 vectors, got 20"),
        (lambda x: torch.cat([x[:2], torch.full_like(x[:1], math.nan)]), "of model 2 must be finite"),
        (lambda x: torch.cat([x[:2], torch.full_like(x[:1], 0.7)]), "of model 2 are all the same"),
        (lambda x: x.long(), r"must be floating-point numbers, got torch.int64; pass vectors.float\(\)"),
    ],
)
def test_bad_vectors_are_refused(sets, change, message):
    with pytest.raises(ValueError, match=message):
        fit_baes(change(sets), 10, settings=SHORT)


def test_bad_sizes_and_prices_are_refused(sets):
    with pytest.raises(ValueError, match="d_sae must be at least 1, got 0"):
        fit_baes(sets, 0, settings=SHORT)
    with pytest.raises(ValueError, match="one entropy coefficient"):
        fit_baes(sets, 10, entropy_coefficients=[0.1, 0.2], settings=SHORT)
    for prices in ([0.1, -0.2, 0.3], [math.nan], [math.inf]):
        with pytest.raises(ValueError, match="must be finite and at least 0"):
            fit_baes(sets, 10, entropy_coefficients=prices, settings=SHORT)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": math.nan}, "lr must be positive"),
        ({"encoder_bias": math.inf}, "encoder_bias must be finite"),
        ({"lr_decay": 1.5}, "lr_decay must lie"),
        ({"entropy_from": -0.1}, "entropy_from must lie"),
    ],
)
def test_settings_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        FitSettings(**values)


@pytest.mark.parametrize("scale", [2.0**64, 2.0**-100])
def test_scale_of_the_vectors_makes_no_difference(scale):
    x, settings = torch.randn(100, 4), FitSettings(steps=20, batch_size=32)
    code, scaled = (
        fit_bae(x, 8, settings=settings).encode(x),
        fit_bae(x * scale, 8, settings=settings).encode(x * scale),
    )
    assert torch.equal(code, scaled)


def test_vectors_below_what_their_dtype_can_scale_are_refused():
    with pytest.raises(ValueError, match=r"too small for torch.float32; multiply them by a number"):
        fit_bae(torch.randn(100, 4) * 1e-42, 8, settings=FitSettings(steps=20, batch_size=32))


def test_price_of_a_bit_is_the_coefficient_in_squared_error_of_the_vectors_as_they_are(sets):
    standardized = (sets[0] - sets[0].mean(0)).square().sum(1).mean() / sets.shape[2]
    for size in (1.0, 10.0):
        price = fit_bae(size * sets[0], 10, 3, 0.3, SHORT).bit_price.item()
        assert price == pytest.approx(0.3 * size**2 * standardized.item(), rel=1e-5)
