import pytest
import torch

import bae_lens.functional.sparse_matmul
from bae_lens import BAE, BAEConfig, TrainingBAE, TrainingBAEConfig, unpack_code

pytestmark = pytest.mark.usefixtures("one_thread")


def random_bae(d_in: int = 8, d_sae: int = 24, **overrides) -> BAE:
    """A float64 BAE with arbitrary weights, biases and prior."""
    bae = BAE(BAEConfig(d_in=d_in, d_sae=d_sae, **{"dtype": "float64", **overrides}))
    for parameter in bae.parameters():
        parameter.data.normal_()
    bae.prior.uniform_()
    return bae


class TestForward:
    @pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
    def test_encodes_and_decodes_by_the_equations(self, shape):
        bae, x = random_bae(), torch.randn(*shape, 8, dtype=torch.float64)

        code = bae.encode(x)

        assert code.equal((x @ bae.W_enc + bae.b_enc >= 0).double())
        torch.testing.assert_close(bae.decode(code), code @ bae.W_dec + bae.b_dec)
        torch.testing.assert_close(bae(x), bae.decode(code))

    def test_training_class_encodes_the_same(self, bae_config):
        sae, x = TrainingBAE(bae_config()), torch.randn(9, 16)

        code, hidden_pre = sae.encode_with_hidden_pre(x)

        assert hidden_pre.equal(x @ sae.W_enc + sae.b_enc)
        assert code.equal((hidden_pre >= 0).float())
        assert sae.encode(x).equal(code)

    @pytest.mark.parametrize("make", [random_bae, lambda: TrainingBAE(TrainingBAEConfig(d_in=8, d_sae=24))])
    def test_refuses_activations_of_another_width(self, make):
        with pytest.raises(ValueError, match=r"takes activations 8 wide \(d_in\), got 9; check the hook"):
            make().encode(torch.zeros(2, 9))

    def test_starts_with_tied_unit_decoder_rows_and_the_configured_bias(self):
        sae = TrainingBAE(TrainingBAEConfig(d_in=16, d_sae=64))

        torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(64))
        assert sae.W_enc.equal(sae.W_dec.T)
        assert sae.b_enc.eq(-2).all()
        assert sae.b_dec.eq(0).all()
        assert sae.prior.eq(0).all()
        assert sae.entropy_multiplier == 1

    def test_folding_decoder_norms_is_refused(self, bae_config):
        for sae in (random_bae(), TrainingBAE(bae_config())):
            with pytest.raises(NotImplementedError, match="a binary code cannot absorb a scale"):
                sae.fold_W_dec_norm()

    @pytest.mark.parametrize("cls", [BAE, TrainingBAE])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_statistics_stay_float32_whatever_the_weights(self, cls, dtype, bae_config):
        sae = cls(bae_config() if cls is TrainingBAE else BAEConfig(d_in=16, d_sae=64))
        sae.prior.fill_(1 / 3)

        sae.to(dtype)

        assert sae.W_enc.dtype == sae.dtype == dtype
        assert {buffer.dtype for buffer in sae.buffers()} == {torch.float32}
        assert sae.prior.eq(torch.tensor(1 / 3)).all()


class TestWhatABitSays:
    def test_activation_strength_is_measured_against_the_prior(self):
        bae = random_bae()
        code = bae.encode(torch.randn(5, 8, dtype=torch.float64))

        torch.testing.assert_close(bae.activation_strength(code), (code - bae.prior).abs().log2())

    @pytest.mark.parametrize("shape", [(40,), (4, 10)])
    def test_activated_features_are_the_most_surprising_bits(self, shape):
        bae, k = random_bae(), 10
        x = torch.randn(*shape, 8, dtype=torch.float64)

        activated = bae.activated_features(x, k).reshape(40, k)

        for token, code in zip(activated.tolist(), bae.encode(x).reshape(40, 24), strict=True):
            surprise = {i: abs(code[i] - bae.prior[i]).item() for i in range(24)}
            surprising = [i for i in sorted(surprise, key=surprise.__getitem__, reverse=True) if surprise[i] > 0.5]
            assert token == (surprising + [-1] * k)[:k]
        assert activated.eq(-1).any()
        assert activated[:, -1].ne(-1).any()

    def test_a_set_bit_of_a_rare_and_an_unset_bit_of_a_common_feature_are_activated(self):
        bae = random_bae(d_in=1, d_sae=4)
        bae.W_enc.data.zero_()
        bae.b_enc.data.copy_(torch.tensor([1.0, -1.0, 1.0, -1.0]))
        bae.prior.copy_(torch.tensor([0.1, 0.7, 0.8, 0.3]))

        assert bae.activated_features(torch.zeros(1, dtype=torch.float64), k=3).tolist() == [0, 1, -1]

    @pytest.mark.parametrize("as_batches", [True, False])
    def test_prior_is_the_exact_mean_code(self, as_batches):
        bae, x = random_bae(), torch.randn(7, 30, 8, dtype=torch.float64)

        prior = bae.estimate_prior(iter(x) if as_batches else x)

        assert prior.equal(bae.encode(x).reshape(-1, 24).mean(0).float())
        assert bae.prior.equal(prior)

    def test_prior_counts_exactly_where_float32_would_not(self, monkeypatch):
        bae = random_bae(d_in=1, d_sae=1)
        monkeypatch.setattr(bae, "encode", torch.ones_like)

        # 2^24 + 3 ones: counting in float32 stops at 2^24, so the mean would be below 1.
        assert bae.estimate_prior([torch.zeros(2**24, 1), *torch.zeros(3, 1, 1)]).item() == 1

    @pytest.mark.parametrize("nothing", [torch.zeros(0, 8), [], iter(())], ids=["tensor", "list", "iterator"])
    def test_prior_needs_activations(self, nothing):
        with pytest.raises(ValueError, match="estimate_prior needs at least one activation, got none"):
            random_bae().estimate_prior(nothing)

    @pytest.mark.parametrize("normalize_activations", ["none", "layer_norm"])
    def test_folding_polarity_makes_every_feature_rare_and_keeps_the_output(self, normalize_activations):
        bae, x = random_bae(normalize_activations=normalize_activations), torch.randn(200, 8, dtype=torch.float64)
        bae.estimate_prior(x)
        prior, code, output, activated = bae.prior.clone(), bae.encode(x), bae(x), bae.activated_features(x)

        flipped = bae.fold_polarity()

        assert flipped.equal((prior > 0.5).float())
        assert 0 < flipped.sum() < 24
        torch.testing.assert_close(bae(x), output, rtol=0, atol=1e-12)
        assert bae.encode(x).equal(torch.where(flipped.bool(), 1 - code, code))
        assert bae.prior.max() <= 0.5
        torch.testing.assert_close(bae.prior, bae.encode(x).mean(0).float(), rtol=0, atol=1e-6)
        assert bae.activated_features(x).equal(activated)
        assert bae.fold_polarity().sum() == 0

    def test_graded_view_fires_where_the_bae_does_and_says_how_far(self):
        bae, x = random_bae(), torch.randn(100, 8, dtype=torch.float64)

        graded = bae.to_graded_sae()
        acts = graded.encode(x)

        assert graded.cfg.architecture() == "standard"
        assert (acts > 0).equal(bae.encode(x).bool())
        torch.testing.assert_close(acts, (x @ bae.W_enc + bae.b_enc).relu())

    def test_graded_view_shares_no_weights(self):
        bae = random_bae()
        graded = bae.to_graded_sae()
        before = bae.W_enc.clone()

        graded.W_enc.data.zero_()

        assert bae.W_enc.equal(before)


@pytest.mark.parametrize(("n_heads", "d_head"), [(2, 4), (4, 2)])
def test_hook_z_activations_keep_their_heads(n_heads, d_head):
    bae = random_bae(reshape_activations="hook_z")
    z = torch.randn(5, 3, n_heads, d_head, dtype=torch.float64)

    flat = z.flatten(-2)
    code = bae.encode(z)

    assert code.equal((flat @ bae.W_enc + bae.b_enc >= 0).double())
    torch.testing.assert_close(bae.decode(code), (code @ bae.W_dec + bae.b_dec).reshape(z.shape))
    with pytest.raises(ValueError, match=r"takes activations 8 wide \(d_in\), got 12"):
        bae.encode(torch.zeros(1, 3, 4))


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_sparse_and_dense_codes_are_decoded_alike(monkeypatch, shape):
    bae = random_bae()
    code = (torch.rand(*shape, 24) < 0.2).double()
    decoded = []

    for below in (0.0, 2.0):
        monkeypatch.setattr(bae_lens.functional.sparse_matmul, "GATHER_BELOW", below)
        decoded.append(bae.decode(code))

    torch.testing.assert_close(decoded[0], code @ bae.W_dec + bae.b_dec)
    torch.testing.assert_close(decoded[1], decoded[0])


@pytest.mark.parametrize("rows_at_once", [1, 4, 100])
def test_packed_code_is_the_code(rows_at_once):
    bae, x = random_bae(d_in=6, d_sae=20), torch.randn(11, 6, dtype=torch.float64)

    packed = bae.encode_packed(x, rows_at_once)

    assert packed.shape == (11, 3)
    assert unpack_code(packed, 20, torch.float64).equal(bae.encode(x))
