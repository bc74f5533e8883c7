import pytest
import torch

from bae_lens import TrainingBAE, TrainingBAEConfig, TrainingSettings
from bae_lens.saes.sharing import SharedFeatures
from bae_lens.training.checkpoints import last_checkpoint, reading
from bae_lens.training.feature_shards import own_checkpoint
from bae_lens.training.trainer import trainer_of


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


def test_a_damaged_checkpoint_is_told_of_in_a_sentence_however_it_is_read(tmp_path):
    checkpoint = tmp_path / "00000006"
    checkpoint.mkdir()
    (checkpoint / "sae_weights.safetensors").write_bytes(b"nothing")
    sae = TrainingBAE(TrainingBAEConfig(d_in=4, d_sae=8))
    trainer = trainer_of(sae, 1e-3, TrainingSettings(training_tokens=64, batch_size=8), "cpu")
    sae.sharing = SharedFeatures(8)
    with (
        pytest.raises(
            ValueError, match=r"checkpoint .*00000006 cannot be read \(SafetensorError.*remove it to start over"
        ),
        reading(checkpoint),
        own_checkpoint(trainer, checkpoint),
    ):
        pass
    assert list(tmp_path.iterdir()) == [checkpoint]
