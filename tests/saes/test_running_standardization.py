import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from bae_lens import TrainingBAE
from bae_lens.functional import covariance, sparse_matmul
from bae_lens.saes import finite_check
from bae_lens.saes.running_standardization import RunningSide, RunningStandardization, State
from tests.saes.test_training_bae import forward


def test_a_mean_followed_by_hand():
    side = RunningSide(2, torch.device("cpu"))
    side.mean, side.scale = torch.tensor([1.0, 0.0]), torch.tensor(0.5)
    outlier = torch.tensor([1.0, 100.0])  # a norm of 50 when standardized, of which sqrt(2) is the usual

    moved = side.follow(torch.stack([torch.tensor([3.0, 2.0]), torch.tensor([5.0, 0.0]), outlier]), weight=0.1)

    assert side.mean.tolist() == pytest.approx([1.3, 0.1])
    assert moved.tolist() == pytest.approx([0.15, 0.05])


def test_before_anything_is_known_activations_are_taken_as_they_are():
    standardization, x = RunningStandardization(3, 2, torch.device("cpu")), torch.randn(5, 3)

    assert standardization.state == State.UNKNOWN
    assert standardization.source(x).equal(x)
    assert standardization.source.raw(x).equal(x)


def test_one_row_says_nothing():
    standardization = RunningStandardization(3, 2, torch.device("cpu"))

    standardization.find(torch.ones(1, 3), torch.ones(1, 2))

    assert standardization.state == State.UNKNOWN


@pytest.mark.parametrize("state", State)
def test_state_is_part_of_a_checkpoint(bae_config, tmp_path, state):
    sae = TrainingBAE(bae_config())
    sae.standardization.state = state
    sae.save_model(tmp_path)

    loaded = TrainingBAE.load_from_disk(tmp_path)

    assert loaded.standardization.state is state


@pytest.mark.parametrize(("earlier_scale", "state"), [(0.0, "UNKNOWN"), (0.25, "FOUND"), (-1.0, "FOLDED")])
def test_earlier_checkpoints_say_it_by_their_scale(bae_config, tmp_path, earlier_scale, state):
    sae, x = TrainingBAE(bae_config()), torch.randn(20, 16)
    mean, scale = torch.randn(16) * (state == "FOUND"), earlier_scale if state == "FOUND" else 1.0
    pre = ((x - mean) * scale) @ sae.W_enc + sae.b_enc
    out = sae.encode((x - mean) * scale) @ sae.W_dec + sae.b_dec
    sae.save_model(tmp_path)
    path = tmp_path / "sae_weights.safetensors"
    weights = {name: value for name, value in load_file(path).items() if not name.startswith("standardization.")}
    scale_then = torch.tensor(earlier_scale)
    earlier = {"input_mean": mean, "input_scale": scale_then, "output_mean": mean + 0, "output_scale": scale_then + 0}
    save_file({**weights, **earlier}, path)

    for loaded in (TrainingBAE.load_from_disk(tmp_path), TrainingBAE(sae.cfg)):
        loaded.load_weights_from_checkpoint(tmp_path)

        assert loaded.standardization.state == State[state]
        torch.testing.assert_close(loaded.encode_with_hidden_pre(x)[1], pre)
        torch.testing.assert_close(loaded(x), out / scale + mean)


class WaitsForTheDevice(TorchDispatchMode):
    """Fails where a number is read back from a tensor, for which a GPU has to be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("target_l0", [None, 4.0])
def test_a_step_reads_no_number_back(bae_config, monkeypatch, target_l0):
    sae = TrainingBAE(bae_config(standardize_activations=True, covariance_coefficient=0.1, target_l0=target_l0))
    forward(sae, torch.randn(32, 16))
    for module in (covariance, sparse_matmul):  # which count on a CPU only
        monkeypatch.setattr(module, "sums_rows", lambda _: False)
    monkeypatch.setattr(finite_check, "ANSWERS_AT_ONCE", ())

    with WaitsForTheDevice():
        for n_training_steps in range(1, 4):
            forward(sae, torch.randn(32, 16), n_training_steps).loss.backward()

        with pytest.raises(AssertionError):
            bool(sae.prior[0] == 0)
