import pytest
import torch

from bae_lens import TrainingBAE
from bae_lens.saes import finite_check
from bae_lens.saes.finite_check import FiniteCheck
from tests.saes.test_training_bae import forward


def test_a_cpu_is_asked_at_once_and_again():
    check, bad = FiniteCheck(), torch.tensor([[1.0, torch.nan], [2.0, 3.0]])

    check(bad[1:], 7)
    for step in (8, 9):
        with pytest.raises(ValueError, match=f"1 of 2 rows of the batch at training step {step} hold NaN or infinity"):
            check(bad, step)


class TestAnAccelerator:
    """A device whose answers have to be waited for; here a CPU that is not known as one."""

    @pytest.fixture
    def check(self, monkeypatch):
        monkeypatch.setattr(finite_check, "ANSWERS_AT_ONCE", ())
        return FiniteCheck()

    def test_is_asked_every_hundred_steps(self, check):
        check(torch.full((3, 2), torch.inf), 0)
        for step in range(1, 99):
            check(torch.ones(3, 2), step)

        with pytest.raises(ValueError, match="3 of 300 rows of the last 100 batches at training step 99 hold NaN"):
            check(torch.ones(3, 2), 99)

    def test_is_asked_before_saving(self, check):
        check(torch.full((3, 2), torch.inf), 5)

        with pytest.raises(ValueError, match="3 of 3 rows of the batch before saving hold NaN or infinity"):
            check.answer("before saving")
        check.answer("before saving")

    @pytest.mark.usefixtures("check")
    def test_nothing_broken_is_saved(self, bae_config, tmp_path):
        sae = TrainingBAE(bae_config())
        forward(sae, torch.full((4, 16), torch.nan))

        with pytest.raises(ValueError, match="4 of 4 rows of the batch before saving hold NaN or infinity"):
            sae.save_model(tmp_path)

        assert not list(tmp_path.iterdir())
