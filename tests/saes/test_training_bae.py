import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from safetensors.torch import load_file

import bae_lens.functional.sparse_matmul
from bae_lens import BAEConfig, TrainingBAE, TrainingBAEConfig, covariance_penalty, marginal_entropy
from bae_lens.functional.losses import reconstruction_error, tangent_entropy
from bae_lens.functional.rate_control import INTEGRAL, PROPORTIONAL

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN: dict[str, Any] = {"tangent_rate": 1.0, "standardize_activations": False}  # the formulas of the paper


def forward(sae: TrainingBAE, x: torch.Tensor, n_training_steps: int = 0) -> TrainStepOutput:
    """One step as SAETrainer takes it."""
    coefficients = {"entropy": sae.cfg.entropy_coefficient, "covariance": sae.cfg.covariance_coefficient}
    return sae.training_forward_pass(TrainStepInput(x, coefficients, None, n_training_steps, False))


def metric(output: TrainStepOutput, name: str) -> torch.Tensor:
    value = output.metrics[name]
    assert isinstance(value, torch.Tensor)
    return value


class TestAgainstTheAuthorsCode:
    @pytest.fixture(params=[("sign", "straight_through"), ("sign_s", "authors")], ids=["sign", "sign_s"])
    def authors(self, request, golden) -> tuple[Mapping[str, torch.Tensor], TrainingBAE]:
        variant, surrogate = request.param
        values = load_file(golden / f"{variant}.safetensors")
        cfg = TrainingBAEConfig(
            d_in=24,
            d_sae=96,
            dtype="float64",
            surrogate=surrogate,
            reconstruction="mean",
            entropy_coefficient=1e-3,
            covariance_coefficient=2e-4,
            entropy_start_step=6,
            **PLAIN,
        )
        sae = TrainingBAE(cfg)
        for theirs, ours in self.parameters(sae).items():
            ours.data.copy_(values[f"init.{theirs}"])
        return values, sae

    @staticmethod
    def parameters(sae: TrainingBAE) -> dict[str, torch.Tensor]:
        """Under their names, as views in their (out, in) layout."""
        return {
            "encoder.weight": sae.W_enc.T,
            "encoder.bias": sae.b_enc,
            "decoder.weight": sae.W_dec.T,
            "decoder.bias": sae.b_dec,
        }

    def test_outputs_and_losses(self, authors):
        values, sae = authors

        output = forward(sae, values["x"], n_training_steps=6)

        assert output.feature_acts.equal(values["code"])
        torch.testing.assert_close(output.sae_out, values["reconstruction"], rtol=0, atol=1e-15)
        torch.testing.assert_close(output.losses["mse_loss"], values["mse"], rtol=1e-14, atol=0)
        torch.testing.assert_close(output.losses["covariance_loss"] / 2e-4, values["covariance"], rtol=1e-14, atol=0)
        # They add 1e-10 inside each of the two logarithms of 96 features: about 2e-10 / ln 2 bits a feature.
        entropy = output.losses["entropy_loss"] / 1e-3
        torch.testing.assert_close(entropy, values["entropy_bits"], rtol=0, atol=96 * 2e-10 / math.log(2) * 1.01)
        torch.testing.assert_close(output.loss, values["loss"], rtol=0, atol=1e-10)

    def test_gradients(self, authors):
        values, sae = authors

        forward(sae, values["x"], n_training_steps=6).loss.backward()

        for name, gradient in {
            "encoder.weight": sae.W_enc.grad.T,
            "encoder.bias": sae.b_enc.grad,
            "decoder.weight": sae.W_dec.grad.T,
            "decoder.bias": sae.b_dec.grad,
        }.items():
            torch.testing.assert_close(gradient, values[f"grad.{name}"], rtol=0, atol=1e-16)

    def test_weights_after_25_adam_steps(self, authors):
        values, sae = authors
        optimizer = torch.optim.Adam(sae.parameters(), lr=5e-4)

        for n_training_steps in range(25):
            optimizer.zero_grad()
            forward(sae, values["x"], n_training_steps).loss.backward()
            optimizer.step()

        for name, weights in self.parameters(sae).items():
            torch.testing.assert_close(weights, values[f"after25.{name}"], rtol=0, atol=1e-14)


class TestTrainingLoss:
    def test_without_encoder_bias_it_stays_zero_in_training(self, bae_config):
        sae = TrainingBAE(bae_config(apply_encoder_bias=False, encoder_bias_init=0.0))
        optimizer = torch.optim.Adam(sae.parameters(), lr=0.1)
        before = sae.W_enc.detach().clone()

        for n_training_steps in range(3):
            forward(sae, torch.randn(8, 16), n_training_steps).loss.backward()
            optimizer.step()

        assert sae.b_enc.eq(0).all()
        assert not sae.W_enc.equal(before)

    @pytest.mark.parametrize("reconstruction", ["sum", "mean", "l2_norm"])
    @pytest.mark.parametrize("entropy", ["bernoulli", "printed"])
    def test_adds_up_the_three_terms(self, bae_config, reconstruction, entropy):
        cfg = bae_config(
            reconstruction=reconstruction,
            entropy=entropy,
            entropy_coefficient=0.25,
            covariance_coefficient=0.125,
            **PLAIN,
        )
        sae, x = TrainingBAE(cfg), torch.randn(32, 16)
        code = sae.encode(x)

        output = forward(sae, x)

        expected = {
            "mse_loss": reconstruction_error(sae.decode(code), x, reconstruction).sum(-1).mean(),
            "entropy_loss": 0.25 * marginal_entropy(code.mean(0), entropy),
            "covariance_loss": 0.125 * covariance_penalty(code),
        }
        assert output.losses.keys() == expected.keys()
        for name, value in expected.items():
            assert value > 0
            torch.testing.assert_close(output.losses[name], value)
        torch.testing.assert_close(output.loss, torch.stack(list(expected.values())).sum())

    def test_weights_get_the_gradient_of_the_smoothed_code(self):
        sae = TrainingBAE(
            TrainingBAEConfig(
                d_in=8,
                d_sae=24,
                dtype="float64",
                covariance_coefficient=0.1,
                **PLAIN,
            )
        )
        x = torch.randn(20, 8, dtype=torch.float64)

        forward(sae, x).loss.backward()

        hidden_pre = (x @ sae.W_enc + sae.b_enc).detach()
        code = (hidden_pre >= 0).double().requires_grad_()
        loss = (code @ sae.W_dec.detach() - x).square().sum(-1).mean()
        (loss + 0.3 * marginal_entropy(code.mean(0)) + 0.1 * covariance_penalty(code)).backward()
        assert code.grad is not None
        smooth = torch.sigmoid(hidden_pre)
        torch.testing.assert_close(sae.W_enc.grad, x.T @ (code.grad * smooth * (1 - smooth)))

    def test_sparse_and_dense_codes_train_alike(self, bae_config, monkeypatch):
        x, gradients = torch.randn(64, 16, dtype=torch.float64), []
        for below in (0.0, 2.0):
            monkeypatch.setattr(bae_lens.functional.sparse_matmul, "GATHER_BELOW", below)
            torch.manual_seed(1)
            sae = TrainingBAE(bae_config(dtype="float64", covariance_coefficient=0.1, encoder_bias_init=-1.0))
            forward(sae, x).loss.backward()
            gradients.append({name: parameter.grad for name, parameter in sae.named_parameters()})

        assert gradients[0]["W_enc"].abs().max() > 0
        torch.testing.assert_close(gradients[1], gradients[0])

    def test_covariance_sample_is_drawn_anew_each_step_and_again_in_a_rerun(self, bae_config):
        x = torch.randn(64, 16)
        sae = TrainingBAE(bae_config(covariance_coefficient=0.1, covariance_sample=5))

        penalties = [forward(sae, x, step).losses["covariance_loss"] for step in (0, 1, 0)]

        assert penalties[0] == penalties[2] != penalties[1]

    def test_entropy_is_switched_on_at_its_step(self, bae_config):
        sae = TrainingBAE(bae_config(entropy_start_step=5, entropy_coefficient=0.25))
        x = torch.randn(32, 16)

        outputs = [forward(sae, x, n_training_steps) for n_training_steps in (0, 4, 5, 6)]

        assert [metric(output, "entropy_coefficient").item() for output in outputs] == [0, 0, 0.25, 0.25]
        assert [bool(output.losses["entropy_loss"] > 0) for output in outputs] == [False, False, True, True]

    def test_covariance_is_left_out_at_coefficient_zero_and_acts_from_the_start_otherwise(self, bae_config):
        x = torch.randn(32, 16)

        without = forward(TrainingBAE(bae_config(entropy_start_step=5)), x)
        with_it = forward(TrainingBAE(bae_config(entropy_start_step=5, covariance_coefficient=0.1)), x)

        assert "covariance_loss" not in without.losses
        assert with_it.losses["covariance_loss"] > 0

    def test_reports_entropy_bits_and_constant_features(self, bae_config):
        sae = TrainingBAE(bae_config(entropy="printed"))
        sae.b_enc.data[:3], sae.b_enc.data[3:5] = -100, 100
        x = torch.randn(64, 16)

        output = forward(sae, x)

        rate = sae.encode(x).mean(0)
        assert metric(output, "constant_features").item() == ((rate == 0) | (rate == 1)).sum() >= 5
        torch.testing.assert_close(metric(output, "entropy_bits"), marginal_entropy(rate))

    def test_constant_features_get_no_entropy_gradient(self, bae_config):
        sae = TrainingBAE(bae_config(entropy_coefficient=1.0, **PLAIN))
        sae.W_dec.data.zero_()
        sae.b_enc.data[:3], sae.b_enc.data[3:5] = -5, 5

        forward(sae, 0.1 * torch.randn(64, 16)).loss.backward()

        assert sae.b_enc.grad is not None
        assert sae.b_enc.grad[:5].eq(0).all()
        assert sae.b_enc.grad.isfinite().all()

    def test_prior_is_the_running_mean_of_the_batches_rates(self, bae_config):
        sae = TrainingBAE(bae_config(prior_decay=0.5))
        batches = torch.randn(3, 32, 16)

        for n_training_steps, batch in enumerate(batches):
            forward(sae, batch, n_training_steps)

        # Weights 1/4, 1/2, 1 of the oldest to the newest, over their sum 7/4.
        rates = torch.stack([sae.encode(batch).mean(0) for batch in batches])
        torch.testing.assert_close(sae.prior, (rates * torch.tensor([[1.0], [2.0], [4.0]])).sum(0) / 7)

    @pytest.mark.parametrize(
        ("target_l0", "excess"),
        # L0 is exactly 8: 8 / 6.4 - 1 = 1/4.
        [(1.0, 1.0), (32.0, -0.75), (6.4, 0.25), (8.0, 0.0)],
    )
    def test_target_l0_steers_the_coefficient(self, bae_config, target_l0, excess):
        sae = TrainingBAE(bae_config(target_l0=target_l0, entropy_coefficient=0.25, entropy_start_step=2))
        sae.b_enc.data.fill_(-100)
        sae.b_enc.data[:8] = 100

        coefficients = [metric(forward(sae, torch.randn(32, 16), i), "entropy_coefficient") for i in range(5)]

        at_once, kept = math.exp(PROPORTIONAL * excess), math.exp(INTEGRAL * excess)
        expected = [0, 0, 0.25 * at_once, 0.25 * at_once * kept, 0.25 * at_once * kept**2]
        torch.testing.assert_close(torch.stack(coefficients), torch.tensor(expected))
        torch.testing.assert_close(sae.entropy_multiplier, torch.tensor(kept**3))

    def test_target_bits_steers_by_what_a_feature_costs_so_far(self, bae_config):
        sae = TrainingBAE(bae_config(target_bits=4.0, entropy_coefficient=0.25))
        sae.b_enc.data.fill_(-100)
        sae.b_enc.data[:8] = 100
        sae.prior[:16] = 0.5  # 16 bits for 8 features, so that the 8 that fire count as 16 bits

        output = forward(sae, torch.randn(32, 16), n_training_steps=1000)

        assert metric(output, "entropy_coefficient").item() == pytest.approx(0.25 * math.exp(PROPORTIONAL))
        assert sae.entropy_multiplier.item() == pytest.approx(math.exp(INTEGRAL))

    @pytest.mark.parametrize(("target_l0", "limit"), [(0.1, 1e6), (63.0, 1e-6)])
    def test_a_target_out_of_reach_for_long_does_not_break_training(self, bae_config, target_l0, limit):
        sae = TrainingBAE(bae_config(target_l0=target_l0))

        losses = [forward(sae, torch.randn(8, 16), step).loss for step in range(700)]

        assert torch.stack(losses).isfinite().all()
        assert sae.entropy_multiplier == pytest.approx(limit)

    def test_without_target_the_coefficient_stays(self, bae_config):
        sae = TrainingBAE(bae_config())

        for n_training_steps in range(3):
            forward(sae, torch.randn(32, 16), n_training_steps)

        assert sae.entropy_multiplier == 1

    def test_the_entropy_is_its_tangent_beyond_the_rate(self, bae_config):
        sae = TrainingBAE(bae_config(tangent_rate=0.1, entropy_coefficient=0.25))

        output = forward(sae, torch.randn(32, 16))

        bits = tangent_entropy(output.feature_acts.mean(0), 0.1)
        assert bits > marginal_entropy(output.feature_acts.mean(0)) + 1
        torch.testing.assert_close(output.losses["entropy_loss"], 0.25 * bits)

    @pytest.mark.parametrize("n_rows", [0, 1])
    def test_refuses_a_batch_without_statistics(self, bae_config, n_rows):
        with pytest.raises(ValueError, match=f"at least 2 rows to have statistics, got {n_rows}"):
            forward(TrainingBAE(bae_config(standardize_activations=True)), torch.zeros(n_rows, 16))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_refuses_a_batch_that_is_not_finite(self, bae_config, value):
        sae, x = TrainingBAE(bae_config()), torch.zeros(5, 16)
        x[1, 3] = x[4, :] = value

        with pytest.raises(ValueError, match="2 of 5 rows of the batch at training step 17 hold NaN or infinity"):
            forward(sae, x, n_training_steps=17)

        assert sae.prior.eq(0).all()

    def test_bfloat16_weights_train_with_float32_statistics_and_penalties(self, bae_config):
        sae = TrainingBAE(bae_config(dtype="bfloat16", covariance_coefficient=0.1, target_l0=4.0))
        x = torch.randn(1000, 16).bfloat16()

        output = forward(sae, x)
        output.loss.backward()

        assert output.losses["entropy_loss"].dtype == output.losses["covariance_loss"].dtype == torch.float32
        assert sae.prior.equal(sae.encode(x).float().mean(0))
        assert sae.entropy_multiplier.dtype == torch.float32
        assert sae.W_enc.grad is not None
        assert sae.W_enc.grad.isfinite().all()
        assert sae.W_enc.grad.abs().sum() > 0

    def test_autocast_keeps_the_penalties_in_float32(self, bae_config):
        cfg, x = bae_config(covariance_coefficient=0.1, **PLAIN), torch.randn(1000, 16)
        sae = TrainingBAE(cfg)
        expected = forward(sae, x).losses

        with torch.autocast("cpu", torch.bfloat16):
            output = forward(sae, x)

        code = output.feature_acts
        assert output.loss.isfinite()
        assert {loss.dtype for loss in output.losses.values()} == {torch.float32}
        torch.testing.assert_close(output.losses["entropy_loss"], 0.3 * marginal_entropy(code.float().mean(0)))
        torch.testing.assert_close(output.losses["covariance_loss"], 0.1 * covariance_penalty(code.float()))
        for name, loss in output.losses.items():
            torch.testing.assert_close(loss, expected[name], rtol=0.02, atol=0)


class TestConfig:
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"d_sae": 0}, "d_sae must be at least 1, got 0"),
            ({"d_in": -1}, "d_in must be at least 1, got -1"),
            ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input must be False"),
            ({"entropy_coefficient": -0.1}, "entropy_coefficient must be at least 0 and finite, got -0.1"),
            ({"entropy_coefficient": math.nan}, "entropy_coefficient must be at least 0 and finite, got nan"),
            ({"covariance_sample": 1}, "covariance_sample must lie between 2 and d_sae = 64, got 1"),
            ({"covariance_coefficient": -1e-9}, "covariance_coefficient must be at least 0 and finite, got -1e-09"),
            ({"covariance_coefficient": math.inf}, "covariance_coefficient must be at least 0 and finite, got inf"),
            ({"entropy_start_step": -1}, "entropy_start_step must be at least 0 and finite, got -1"),
            ({"target_l0": 0.0}, "target_l0 must lie between 0 and d_sae = 64, got 0.0"),
            ({"target_l0": 64.0}, "target_l0 must lie between 0 and d_sae = 64, got 64.0"),
            ({"target_bits": -1.0}, "target_bits must lie between 0 and d_sae = 64, got -1.0"),
            ({"target_bits": 9.0, "entropy_coefficient": 0.0}, "target_bits steers the entropy coefficient"),
            ({"target_bits": 9.0, "target_l0": 3.0}, "set target_l0 or target_bits, got 3.0 and 9.0"),
            ({"tangent_rate": 0.0}, "tangent_rate must lie between 0 and 1/e, or be 1 for no tangent, got 0.0"),
            ({"target_l0": math.nan}, "target_l0 must lie between 0 and d_sae = 64, got nan"),
            ({"prior_decay": 1.0}, r"prior_decay must lie in \[0, 1\), got 1.0"),
            ({"prior_decay": -0.1}, r"prior_decay must lie in \[0, 1\), got -0.1"),
            ({"apply_encoder_bias": False}, "encoder_bias_init must be 0 without an encoder bias, got -0.5"),
            ({"surrogate": "ste"}, "surrogate must be one of sigmoid, straight_through, authors, got 'ste'"),
            ({"entropy": "joint"}, "entropy must be one of bernoulli, printed, got 'joint'"),
            ({"reconstruction": "mse"}, "reconstruction must be one of sum, mean, l2_norm, got 'mse'"),
            ({"normalize_activations": "batch_norm"}, "normalize_activations must be none"),
        ],
    )
    def test_values_out_of_range_are_refused(self, bae_config, overrides, message):
        with pytest.raises(ValueError, match=message):
            bae_config(**overrides)

    @pytest.mark.parametrize(("d_in", "d_sae", "message"), [(0, 8, "d_in must be"), (4, 0, "d_sae must be")])
    def test_inference_config_checks_its_sizes(self, d_in, d_sae, message):
        with pytest.raises(ValueError, match=f"{message} at least 1, got 0"):
            BAEConfig(d_in=d_in, d_sae=d_sae)

    def test_inference_config_refuses_a_decoder_bias_on_the_input(self):
        with pytest.raises(ValueError, match="apply_b_dec_to_input must be False"):
            BAEConfig(d_in=4, d_sae=8, apply_b_dec_to_input=True)

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("default", (50, 0.3, 0.0, -2.0, True, "sigmoid", "bernoulli", "sum")),
            ("paper", (250, 1e-7, 1e-7, 0.0, False, "sigmoid", "bernoulli", "l2_norm")),
            ("authors", (250, 1e-7, 1e-7, 0.0, True, "authors", "bernoulli", "mean")),
        ],
    )
    def test_presets(self, name, expected):
        cfg = TrainingBAEConfig.preset(name, d_in=4, d_sae=16, training_steps=1000)

        assert (cfg.d_in, cfg.d_sae) == (4, 16)
        assert expected == (
            cfg.entropy_start_step,
            cfg.entropy_coefficient,
            cfg.covariance_coefficient,
            cfg.encoder_bias_init,
            cfg.apply_encoder_bias,
            cfg.surrogate,
            cfg.entropy,
            cfg.reconstruction,
        )

    def test_preset_for_optimized_codes_is_the_default_until_the_learning_rate_falls(self):
        sizes = {"d_in": 4, "d_sae": 16, "training_steps": 1000}

        cfg, default = (TrainingBAEConfig.preset(name, **sizes) for name in ("optimized", "default"))

        assert (cfg.max_flips, cfg.optimized_start_step) == (128, 800)
        assert cfg == dataclasses.replace(default, max_flips=128, optimized_start_step=800)

    def test_the_authors_surrogate_under_its_earlier_name(self, bae_config):
        saved = bae_config(surrogate="authors").to_dict()

        loaded = TrainingBAEConfig.from_dict({**saved, "surrogate": "reference"})

        assert loaded == TrainingBAEConfig.from_dict(saved)
        assert loaded.surrogate == "authors"

    def test_keywords_override_a_preset(self):
        cfg = TrainingBAEConfig.preset(
            "paper", d_in=4, d_sae=16, training_steps=1000, entropy_start_step=3, surrogate="authors"
        )

        assert (cfg.entropy_start_step, cfg.surrogate, cfg.reconstruction) == (3, "authors", "l2_norm")

    def test_refuses_an_unknown_preset(self):
        with pytest.raises(ValueError, match="preset must be one of default, optimized, paper, authors, got 'best'"):
            TrainingBAEConfig.preset("best", d_in=4, d_sae=16, training_steps=10)  # pyright: ignore[reportArgumentType]


def test_learns_every_truth_table_row():
    """Four clusters need two bits: the reconstruction becomes exact only if the encoder is trained through the step."""
    centers = torch.tensor(list(itertools.product([0.0, 2.0], repeat=2)))
    sae = TrainingBAE(TrainingBAEConfig(d_in=2, d_sae=4, encoder_bias_init=0.0, entropy_coefficient=0.0))
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.02)

    for n_training_steps in range(500):
        optimizer.zero_grad()
        forward(sae, centers, n_training_steps).loss.backward()
        optimizer.step()

    assert (sae(centers) - centers).abs().max() < 0.05
