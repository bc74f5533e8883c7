import pytest
import torch

from bae_lens import BAE, TrainingBAE, TrainingBinaryTranscoder, TrainingBinaryTranscoderConfig
from bae_lens.functional.outliers import OUTLIER_NORM
from bae_lens.saes.running_standardization import State
from bae_lens.saes.standardization import PairStandardization, Standardization, folded, standardization_of
from tests.saes.test_training_bae import forward


class TestOfASample:
    def test_gives_mean_zero_and_mean_squared_norm_d(self):
        x = torch.randn(500, 6, dtype=torch.float64) * torch.arange(1.0, 7) + 100

        standardized = standardization_of(x)(x)

        torch.testing.assert_close(standardized.mean(0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)
        assert standardized.square().sum(-1).mean().item() == pytest.approx(6)

    def test_is_not_moved_by_outlier_tokens(self):
        x = torch.randn(500, 6)
        with_massive = torch.cat([x, torch.full((3, 6), 1000.0)])

        clean, found = standardization_of(x), standardization_of(with_massive)

        torch.testing.assert_close(found.mean, clean.mean)
        assert found.scale == pytest.approx(clean.scale)

    def test_a_number_by_hand(self):
        found = standardization_of(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [6.0, 0.0]]))

        assert OUTLIER_NORM == 5  # the last row is 6 times the median distance from the medians, which are 0
        assert found.mean.tolist() == [0, 0]
        assert found.scale == pytest.approx(2**0.5)

    def test_does_not_take_the_commonest_row_for_all_of_them(self):
        x = torch.cat([torch.zeros(34, 6), torch.randn(30, 6) * 9])

        assert standardization_of(x).scale == pytest.approx(1 / 9 * (64 / 30) ** 0.5, rel=0.2)

    def test_of_constant_activations_leaves_the_scale(self):
        found = standardization_of(torch.full((4, 3), 7.0))

        assert found.scale == 1
        assert found.mean.tolist() == [7, 7, 7]


def test_folded_weights_take_and_give_raw_activations():
    source, target = Standardization(torch.randn(5), 3.0), Standardization(torch.randn(4), 0.25)
    shapes = {"W_enc": (5, 9), "b_enc": (9,), "W_dec": (9, 4), "b_dec": (4,)}
    weights = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    x = torch.randn(20, 5, dtype=torch.float64)

    raw = folded(weights, source, target)

    pre = source(x) @ weights["W_enc"] + weights["b_enc"]
    torch.testing.assert_close(x @ raw["W_enc"] + raw["b_enc"], pre)
    torch.testing.assert_close(target(pre @ raw["W_dec"] + raw["b_dec"]), pre @ weights["W_dec"] + weights["b_dec"])


class TestInTraining:
    @pytest.fixture
    def train(self, bae_config):
        """Trains on the same vectors, moved and scaled."""

        def train(scale: float, shift: float, steps: int = 60, **overrides) -> tuple[TrainingBAE, torch.Tensor]:
            torch.manual_seed(0)
            cfg = bae_config(
                dtype="float64", standardize_activations=True, target_l0=4.0, tangent_rate=0.1, **overrides
            )
            sae = TrainingBAE(cfg)
            optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
            generator = torch.Generator().manual_seed(1)
            for n_training_steps in range(steps):
                x = torch.randn(64, 16, dtype=torch.float64, generator=generator).exp() * scale + shift
                optimizer.zero_grad()
                forward(sae, x, n_training_steps).loss.backward()
                optimizer.step()
            return sae, x

        return train

    @pytest.mark.parametrize(("scale", "shift"), [(1e-3, 0.0), (1e4, 0.0), (1.0, 30.0), (50.0, -1000.0)])
    def test_neither_scale_nor_mean_of_the_activations_matter(self, train, scale, shift):
        plain, x = train(1.0, 0.0)
        moved, y = train(scale, shift)

        for name, weights in plain.named_parameters():
            torch.testing.assert_close(moved.get_parameter(name), weights, rtol=0, atol=1e-5)
        assert moved.encode(y).equal(plain.encode(x))
        torch.testing.assert_close((moved(y) - shift) / scale, plain(x), rtol=1e-5, atol=1e-5)

    def test_without_it_nothing_is_found(self, bae_config):
        sae = TrainingBAE(bae_config(standardize_activations=False))

        forward(sae, torch.randn(32, 16) * 50 + 3)

        assert sae.standardization.state == State.UNKNOWN
        assert not sae.standardization.source.mean.any()

    @pytest.mark.parametrize("way", ["to_inference", "save", "fold", "fold_norm"])
    def test_what_is_saved_takes_raw_activations(self, train, tmp_path, way):
        sae, x = train(20.0, 7.0)
        code, out = sae.encode(x), sae(x)

        if way == "save":
            sae.save_inference_model(tmp_path)
            sae = BAE.load_from_disk(tmp_path)
        elif way == "to_inference":
            sae = sae.to_inference()
        elif way == "fold":
            sae.fold_standardization()
            sae.fold_standardization()
            assert sae.standardization.state == State.FOLDED
        else:
            sae.fold_activation_norm_scaling_factor(0.5)
            x, out = x * 2, out * 2

        assert sae.encode(x).equal(code)
        torch.testing.assert_close(sae(x), out)
        pre = (x @ sae.W_enc + sae.b_enc >= 0).double()
        assert pre.equal(code)

    def test_is_found_once_and_kept_in_checkpoints(self, train, tmp_path):
        sae, x = train(20.0, 7.0, steps=1)
        found = sae.standardization.source.scale.clone()
        sae.save_model(tmp_path)

        resumed = TrainingBAE(sae.cfg)
        resumed.load_weights_from_checkpoint(tmp_path)
        forward(resumed, x * 3, n_training_steps=0)

        assert resumed.standardization.source.scale == found
        assert found != 1

    def test_later_batches_move_the_mean_and_nothing_else(self, train):
        sae, x = train(20.0, 7.0, steps=1)
        code, out, first = sae.encode(x), sae(x), sae.standardization.source.mean.clone()
        far = torch.full((2, 16), 1e6)

        forward(sae, torch.cat([torch.randn(500, 16) * 20 + 50, far]), n_training_steps=9)

        assert sae.encode(x).equal(code)
        torch.testing.assert_close(sae(x), out, rtol=0, atol=1e-4)
        torch.testing.assert_close(sae.standardization.source.mean - first, (50 - first) / 10, rtol=0, atol=1)
        assert sae.standardization.target.mean.equal(sae.standardization.source.mean)

    def test_the_mean_becomes_that_of_all_batches(self, bae_config):
        sae = TrainingBAE(bae_config(standardize_activations=True))
        batches = torch.randn(50, 64, 16) * 3 + torch.arange(16)

        for n_training_steps, batch in enumerate(batches):
            forward(sae, batch, n_training_steps)

        torch.testing.assert_close(sae.standardization.source.mean, batches.mean((0, 1)), rtol=0, atol=0.05)
        assert (batches[0].mean(0) - batches.mean((0, 1))).abs().max() > 0.5

    @pytest.mark.parametrize(("scale", "shift"), [(0.1, 0.5), (20.0, 7.0)])
    def test_weights_for_raw_activations_are_trained_further_as_they_are(self, train, tmp_path, scale, shift):
        sae, x = train(scale, shift)
        sae.save_inference_model(tmp_path)
        further = TrainingBAE(sae.cfg)
        further.load_weights_from_checkpoint(tmp_path)

        for n_training_steps in range(3):
            output = forward(further, x, n_training_steps)

        assert output.feature_acts.equal(sae.encode(x))
        torch.testing.assert_close(output.sae_out, sae(x))
        assert not further.standardization.source.mean.any()

    def test_losses_are_those_of_standardized_activations(self, bae_config):
        sae, x = TrainingBAE(bae_config(standardize_activations=True)), torch.randn(64, 16) * 9 + 5

        output = forward(sae, x)

        error = (output.sae_out - x).square().sum(-1).mean() * sae.standardization.target.scale**2
        torch.testing.assert_close(output.losses["mse_loss"], error)
        assert 16 * 0.5 < error < 16 * 2

    @pytest.mark.parametrize(
        "overrides",
        [
            {"normalize_activations": "layer_norm"},
            {"dtype": "bfloat16"},
            {"apply_encoder_bias": False, "encoder_bias_init": 0.0},
        ],
    )
    def test_has_no_effect_where_weights_could_not_absorb_it(self, bae_config, overrides):
        sae = TrainingBAE(bae_config(standardize_activations=True, **overrides))

        for n_training_steps in range(2):
            forward(sae, torch.randn(64, 16).to(sae.dtype) * 9 + 5, n_training_steps)

        assert sae.standardization.state == State.UNKNOWN
        assert not sae.standardization.source.mean.any()

    def test_is_found_on_the_first_batch_whatever_its_number(self, bae_config):
        sae = TrainingBAE(bae_config(standardize_activations=True))

        forward(sae, torch.randn(64, 16) * 9 + 5, n_training_steps=1)

        assert 0.1 < sae.standardization.source.scale < 0.13

    def test_a_pair_is_folded_on_top_of_what_a_transcoder_found(self):
        sae = TrainingBinaryTranscoder(TrainingBinaryTranscoderConfig(d_in=5, d_sae=12, d_out=3, dtype="float64"))
        pairs = torch.randn(50, 8, dtype=torch.float64) * 3 + 2
        forward(sae, pairs)
        x, source, target = pairs[:, :5], Standardization(torch.randn(5), 2.0), Standardization(torch.randn(3), 0.5)
        code, out = sae.encode(x), sae.decode(sae.encode(x))

        PairStandardization(source, target).fold_into(sae)

        raw = x / source.scale + source.mean
        assert sae.encode(raw).equal(code)
        torch.testing.assert_close(target(sae.decode(code)), out)

    def test_a_transcoder_moves_both_means(self):
        sae = TrainingBinaryTranscoder(TrainingBinaryTranscoderConfig(d_in=5, d_sae=12, d_out=3, dtype="float64"))
        pairs = torch.randn(50, 8, dtype=torch.float64)
        forward(sae, pairs)
        code, out = sae.encode(pairs[:, :5]), sae.decode(sae.encode(pairs[:, :5]))

        forward(sae, pairs + 2, n_training_steps=1)

        torch.testing.assert_close(sae.standardization.source.mean, pairs[:, :5].mean(0).float() + 1, rtol=0, atol=0.01)
        torch.testing.assert_close(sae.standardization.target.mean, pairs[:, 5:].mean(0).float() + 1, rtol=0, atol=0.01)
        assert sae.encode(pairs[:, :5]).equal(code)
        torch.testing.assert_close(sae.decode(code), out, rtol=1e-6, atol=1e-6)

    def test_a_transcoder_finds_both_sides(self):
        torch.manual_seed(0)
        sae = TrainingBinaryTranscoder(TrainingBinaryTranscoderConfig(d_in=5, d_sae=12, d_out=3, dtype="float64"))
        x, y = torch.randn(50, 5, dtype=torch.float64) * 7 + 2, torch.randn(50, 3, dtype=torch.float64) / 100 - 1

        output = forward(sae, torch.cat([x, y], dim=-1))

        assert standardization_of(x).scale == pytest.approx(sae.standardization.source.scale.item())
        assert standardization_of(y).scale == pytest.approx(sae.standardization.target.scale.item())
        error = (output.sae_out - y).square().sum(-1).mean() * sae.standardization.target.scale**2
        torch.testing.assert_close(output.losses["mse_loss"], error)
        raw = sae.to_inference()
        assert raw.encode(x).equal(output.feature_acts)
        torch.testing.assert_close(raw.decode(output.feature_acts), output.sae_out, rtol=0, atol=1e-6)
