import pytest
import torch

from bae_lens.training.checkpoints import last_checkpoint


def test_last_checkpoint_is_the_newest_whole_one(tmp_path):
    assert last_checkpoint(tmp_path / "none") is None
    for name in ("00000007", "00000012", ".00000015.99.partial"):
        (tmp_path / name).mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "00000012"


def test_processes_that_see_different_checkpoints_are_told_to_share_a_folder(tmp_path, monkeypatch):
    (tmp_path / "00000012").mkdir()
    monkeypatch.setattr("bae_lens.training.checkpoints.gather_rows", lambda own: torch.cat([own, torch.tensor([0])]))
    with pytest.raises(ValueError, match=r"different checkpoints in .*, at steps 12, 0; use a shared folder"):
        last_checkpoint(tmp_path)
