"""A dictionary that chooses the bits of each vector, from training to file."""

import math

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainStepInput

from bae_lens import BAE, BAEConfig, TrainingBAE, TrainingBAEConfig
from bae_lens.functional.optimized_code import firing_bits, optimize_code, rate_distortion
from bae_lens.saes import BinaryTranscoder, BinaryTranscoderConfig, TrainingBinaryTranscoderConfig
from bae_lens.saes.standardization import Standardization

pytestmark = pytest.mark.usefixtures("one_thread")


def random_bae(price: float = 0.5, **config) -> BAE:
    bae = BAE(BAEConfig(d_in=8, d_sae=24, **config))
    for parameter in bae.parameters():
        parameter.data.normal_()
    bae.prior.uniform_(0.05, 0.4)
    bae.bit_price.fill_(price)
    return bae


def cost(bae: BAE, x: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """Squared error plus price times bits."""
    return rate_distortion(x - bae.b_dec, code, bae.W_dec, bae.bit_price * firing_bits(bae.prior))


class TestEncoding:
    def test_optimizes_the_encoders_code_by_price_and_prior(self):
        bae, x = random_bae(), torch.randn(50, 8) * 3

        optimized = bae.encode_optimized(x)

        expected = optimize_code(x - bae.b_dec, bae.encode(x), bae.W_dec, 0.5 * firing_bits(bae.prior))
        assert optimized.equal(expected)
        assert cost(bae, x, optimized).sum() < 0.5 * cost(bae, x, bae.encode(x)).sum()

    def test_is_off_by_default(self):
        bae, x = random_bae(), torch.randn(5, 8)

        assert bae.cfg.max_flips == 0
        assert bae.encode(x).equal((x @ bae.W_enc + bae.b_enc >= 0).float())

    def test_encode_flips_as_many_bits_as_the_config_says(self):
        bae, x = random_bae(max_flips=2), torch.randn(50, 8) * 3

        assert bae.encode(x).equal(bae.encode_optimized(x, max_flips=2))
        assert not bae.encode(x).equal(bae.encode_optimized(x))
        assert bae(x).equal(bae.decode(bae.encode(x)))

    @pytest.mark.parametrize("shape", [(8,), (2, 3, 8), (0, 8)])
    def test_keeps_leading_axes(self, shape):
        bae, x = random_bae(), torch.randn(shape)

        code = bae.encode_optimized(x)

        assert code.shape == (*shape[:-1], 24)
        assert code.reshape(-1, 24).equal(bae.encode_optimized(x.reshape(-1, 8)))

    def test_takes_heads_apart_at_hook_z(self):
        bae = random_bae(reshape_activations="hook_z")
        x = torch.randn(3, 5, 2, 4)

        code = bae.encode_optimized(x)

        bae.turn_off_forward_pass_hook_z_reshaping()
        assert code.equal(bae.encode_optimized(x.flatten(-2)))

    def test_normalized_activations_are_the_target(self):
        bae, x = random_bae(normalize_activations="layer_norm"), torch.randn(50, 8) * 3 + 1
        normalized = torch.nn.functional.layer_norm(x, (8,))

        code = bae.encode_optimized(x)

        assert (cost(bae, normalized, code) <= cost(bae, normalized, bae.encode(x))).all()

    def test_code_is_hooked_once(self):
        bae, seen = random_bae(), []
        for name in ("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post"):
            getattr(bae, name).add_hook(lambda acts, hook: seen.append((hook.name, acts.clone())))

        code = bae.encode_optimized(torch.randn(5, 8))

        assert [name for name, _ in seen] == ["hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post"]
        assert seen[-1][1].equal(code)

    def test_in_bfloat16(self):
        bae, x = random_bae(dtype="bfloat16"), torch.randn(50, 8) * 3

        code = bae.encode_optimized(x)

        assert code.dtype == torch.bfloat16
        before, after = (cost(bae, x.bfloat16(), h) for h in (bae.encode(x), code))
        assert (after <= before).all()

    def test_follows_weights_that_change(self):
        bae, x = random_bae(), torch.randn(50, 8) * 3
        bae.encode_optimized(x)
        bae.W_dec.data.normal_()

        assert bae.encode_optimized(x).equal(bae.encode_optimized(x.clone()))
        fresh = BAE(BAEConfig(d_in=8, d_sae=24))
        fresh.load_state_dict(bae.state_dict())
        assert bae.encode_optimized(x).equal(fresh.encode_optimized(x))

    def test_polarity_does_not_matter(self):
        bae, x = random_bae(), torch.randn(50, 8) * 3
        bae.prior[:5] = 0.9
        before = bae(x), bae.decode(bae.encode_optimized(x))

        bae.fold_polarity()

        torch.testing.assert_close((bae(x), bae.decode(bae.encode_optimized(x))), before)


class TestRefusals:
    @pytest.mark.parametrize("price", [math.nan, -0.1])
    def test_a_price_that_is_unknown_or_negative(self, price):
        bae = random_bae(price)

        with pytest.raises(ValueError, match=rf"bit_price must be at least 0, got {price}.* set it with sae.bit_price"):
            bae.encode_optimized(torch.randn(2, 8))

    def test_an_unknown_prior(self):
        bae = random_bae()
        bae.prior.zero_()

        with pytest.raises(ValueError, match=r"prior of this BAE is unknown \(0\); call estimate_prior"):
            bae.encode_optimized(torch.randn(2, 8))

    def test_rows_that_are_not_finite(self):
        x = torch.randn(4, 8)
        x[1, 2] = math.nan

        with pytest.raises(ValueError, match="1 of 4 hold NaN or infinity"):
            random_bae().encode_optimized(x)

    @pytest.mark.parametrize("config", [BAEConfig, TrainingBAEConfig])
    def test_a_negative_number_of_flips(self, config):
        with pytest.raises(ValueError, match="max_flips must be at least 0, where 0 is the encoder's own code, got -1"):
            config(d_in=8, d_sae=24, max_flips=-1)

    @pytest.mark.parametrize("config", [BinaryTranscoderConfig, TrainingBinaryTranscoderConfig])
    def test_a_transcoder(self, config):
        with pytest.raises(ValueError, match="max_flips must be 0 for a transcoder"):
            config(d_in=8, d_out=8, d_sae=24, max_flips=1)
        with pytest.raises(NotImplementedError, match="code of a transcoder cannot be optimized"):
            BinaryTranscoder(BinaryTranscoderConfig(d_in=8, d_out=8, d_sae=24)).encode_optimized(torch.randn(2, 8))


class TestPrice:
    def trained(self, x: torch.Tensor, steps: int = 3, **config) -> TrainingBAE:
        cfg = TrainingBAEConfig(d_in=8, d_sae=24, encoder_bias_init=0.0, target_l0=3.0, **config)
        sae = TrainingBAE(cfg)
        for step in range(steps):
            sae.training_forward_pass(TrainStepInput(x, {"entropy": 0.3, "covariance": 0.0}, None, step, False))
        return sae

    def test_is_the_entropy_coefficient_that_was_found(self):
        sae = self.trained(torch.randn(40, 8), standardize_activations=False)

        assert sae.entropy_multiplier > 1
        torch.testing.assert_close(sae.bit_price, 0.3 * sae.entropy_multiplier)

    def test_in_the_authors_convention_is_a_share_of_a_dimension(self):
        x = torch.randn(40, 8)
        torch.manual_seed(0)
        summed = self.trained(x, standardize_activations=False)
        torch.manual_seed(0)
        averaged = self.trained(x, standardize_activations=False, reconstruction="mean")

        torch.testing.assert_close(averaged.bit_price, 8 * summed.bit_price)

    def test_is_unknown_before_the_entropy_is_switched_on(self):
        assert self.trained(torch.randn(40, 8), entropy_start_step=3).bit_price.isnan()
        assert not self.trained(torch.randn(40, 8), entropy_start_step=2).bit_price.isnan()

    @pytest.mark.parametrize("standardizes", [True, False])
    def test_is_saved_for_activations_as_they_are(self, standardizes):
        x = torch.randn(400, 8) * 5 + 2
        sae = self.trained(x, standardize_activations=standardizes, max_flips=4)
        scale = sae.standardization.target.scale.item() if standardizes else 1.0

        bae = sae.to_inference()

        assert bae.cfg.max_flips == 4
        torch.testing.assert_close(bae.bit_price, sae.bit_price / scale**2)
        sae.fold_standardization()
        torch.testing.assert_close(sae.bit_price, bae.bit_price)

    def test_folding_leaves_the_code_alone(self):
        bae, x = random_bae(), torch.randn(50, 8) * 3
        code = bae.encode_optimized(x)
        standardization = Standardization(torch.randn(8), 0.2)

        standardization.fold_into(bae)

        assert bae.bit_price.item() == pytest.approx(0.5 / 0.2**2)
        assert bae.encode_optimized(x / 0.2 + standardization.mean).equal(code)
        bae.fold_activation_norm_scaling_factor(5.0)
        assert bae.bit_price.item() == pytest.approx(0.5)

    def test_is_unknown_after_a_whitening_that_changes_directions(self):
        bae = random_bae()

        bae.fold_activation_whitening(
            torch.zeros(8), torch.diag(torch.arange(1.0, 9)), torch.diag(1 / torch.arange(1.0, 9))
        )

        assert bae.bit_price.isnan()

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_is_saved_and_loaded(self, tmp_path, dtype):
        price = 0.375  # in bfloat16 exactly, to which SAELens rounds the statistics that it loads
        bae, x = random_bae(price, max_flips=3, dtype=dtype), torch.randn(20, 8)
        bae.prior.fill_(0.25)
        bae.save_model(tmp_path)

        loaded = SAE.load_from_disk(tmp_path)

        assert isinstance(loaded, BAE)
        assert loaded.cfg.max_flips == 3
        assert loaded.bit_price.dtype == torch.float32
        assert loaded.bit_price == price
        assert loaded.encode(x).equal(bae.encode(x))

    def test_of_a_file_of_an_earlier_version_is_unknown(self, tmp_path):
        from safetensors.torch import load_file, save_file

        random_bae().save_model(tmp_path)
        weights = load_file(tmp_path / "sae_weights.safetensors")
        del weights["bit_price"]
        save_file(weights, tmp_path / "sae_weights.safetensors")

        loaded = SAE.load_from_disk(tmp_path)

        assert isinstance(loaded, BAE)
        assert loaded.bit_price.isnan()
        loaded.bit_price.fill_(0.5)
        assert loaded.encode_optimized(torch.randn(2, 8)).shape == (2, 24)

    def test_graded_view_has_weights_only(self):
        assert set(random_bae(max_flips=3).to_graded_sae().state_dict()) == {"W_enc", "b_enc", "W_dec", "b_dec"}


class TestTraining:
    """From `optimized_start_step` on."""

    def sae(self, start: int | None = 2, **config) -> TrainingBAE:
        torch.manual_seed(0)
        cfg = TrainingBAEConfig(
            d_in=8,
            d_sae=24,
            encoder_bias_init=-0.5,
            **{"max_flips": 5, "target_l0": 3.0, "optimized_start_step": start, **config},
        )
        return TrainingBAE(cfg)

    def step(self, sae: TrainingBAE, x: torch.Tensor, n: int):
        return sae.training_forward_pass(TrainStepInput(x, {"entropy": 0.3, "covariance": 0.0}, None, n, False))

    def test_until_then_nothing_is_different(self):
        x, with_it, without = torch.randn(60, 8), self.sae(), self.sae(None, max_flips=0)

        for n in range(2):
            mine, theirs = self.step(with_it, x, n), self.step(without, x, n)
            assert mine.feature_acts.equal(theirs.feature_acts)
            assert mine.losses == theirs.losses
        assert not self.step(with_it, x, 2).feature_acts.equal(self.step(without, x, 2).feature_acts)

    @pytest.mark.parametrize("standardize", [True, False])
    def test_code_is_optimized_by_what_is_known_so_far(self, standardize):
        x, sae = torch.randn(60, 8) * 4 + 1, self.sae(standardize_activations=standardize)
        sae.b_dec.data.normal_()
        for n in range(2):
            self.step(sae, x, n)
        firing_cost = sae.bit_price * firing_bits(sae.prior)

        output = self.step(sae, x, 2)

        standardized = sae.standardization.source(x)
        own = (standardized @ sae.W_enc + sae.b_enc >= 0).float()
        expected = optimize_code(standardized - sae.b_dec, own, sae.W_dec, firing_cost, 5)
        assert output.feature_acts.equal(expected)
        assert not output.feature_acts.equal(own)
        torch.testing.assert_close(output.sae_out, sae.decode(expected))

    def test_decoder_learns_from_the_code_and_the_encoder_to_predict_it(self):
        x, sae = torch.randn(60, 8), self.sae(standardize_activations=False)
        sae.b_dec.data.normal_()
        for n in range(2):
            self.step(sae, x, n)

        output = self.step(sae, x, 2)
        output.loss.backward()

        code = output.feature_acts
        error = code @ sae.W_dec + sae.b_dec - x
        missed = torch.sigmoid(x @ sae.W_enc + sae.b_enc) - code
        for parameter, gradient in (
            (sae.W_dec, code.T @ error * 2 / 60),
            (sae.b_dec, error.sum(0) * 2 / 60),
            (sae.W_enc, x.T @ missed / 60),
            (sae.b_enc, missed.sum(0) / 60),
        ):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, gradient)
        assert set(output.losses) == {"mse_loss", "entropy_loss", "prediction_loss"}

    def test_rates_and_the_controller_follow_the_code(self):
        x, sae = torch.randn(60, 8), self.sae(prior_decay=0.0)
        for n in range(2):
            self.step(sae, x, n)
        multiplier = sae.entropy_multiplier

        code = self.step(sae, x, 2).feature_acts

        torch.testing.assert_close(sae.prior, code.mean(0))
        assert (sae.entropy_multiplier > multiplier) == (code.sum(-1).mean() > 3)

    def test_explains_as_much_with_fewer_features(self):
        x = (torch.rand(2000, 24) < 0.12).float() @ torch.randn(24, 8)
        found = {}
        for start in (200, None):
            sae = self.sae(start, max_flips=8)
            optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
            for n in range(300):
                optimizer.zero_grad()
                self.step(sae, x[torch.randint(2000, (256,))], n).loss.backward()
                optimizer.step()
            bae = sae.to_inference()
            code = bae.encode(x)
            error = (x - bae.decode(code)).square().sum() / (x - x.mean(0)).square().sum()
            found[start] = error.item(), code.sum(-1).mean().item()

        (error, l0), (error_without, l0_without) = found[200], found[None]  # .114 with 2.82, .115 with 3.25 features
        assert l0 < 0.95 * l0_without
        assert error < 1.02 * error_without

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"entropy_start_step": 2}, "optimized_start_step must be after entropy_start_step = 2"),
            ({"max_flips": 0}, "must be at inference: set max_flips"),
        ],
    )
    def test_refuses(self, config, message):
        with pytest.raises(ValueError, match=message):
            self.sae(**config)


def test_prior_is_estimated_from_the_encoder_s_own_code_while_it_is_unknown():
    bae = BAE(BAEConfig(d_in=4, d_sae=8, max_flips=3))
    bae.W_enc.data.normal_()
    x = torch.randn(50, 4)
    expected = (x @ bae.W_enc + bae.b_enc >= 0).double().mean(0)
    torch.testing.assert_close(bae.estimate_prior(x), expected.float())
