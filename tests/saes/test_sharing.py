import pytest
import torch
from sae_lens import TopKTrainingSAEConfig

from bae_lens import Contender, Experiment, Recipe, TrainingBAEConfig, TrainingBinaryTopKConfig
from bae_lens.comparison.experiment import check_hooks
from bae_lens.saes.sharing import SharedFeatures, check_features_can_be_shared
from bae_lens.training.trainer import check_processes


@pytest.fixture
def of_nine(monkeypatch):
    for module in ("bae_lens.training.trainer", "bae_lens.saes.sharing"):
        monkeypatch.setattr(f"{module}.n_processes", lambda: 9)


def test_a_single_process_has_all_features_and_all_rows():
    sharing, rows = SharedFeatures(7), torch.rand(3, 7)
    assert sharing.own == range(7)
    assert torch.equal(sharing.whole_batch(rows), rows)
    assert torch.equal(sharing.own_features(sharing.all_features(rows[0])), rows[0])
    assert torch.equal(sharing.sum_over_features(rows), rows)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_processes_have_features_in_order_that_differ_by_one_in_number(monkeypatch, index):
    monkeypatch.setattr("bae_lens.distributed.exchange.n_processes", lambda: 3)
    monkeypatch.setattr("bae_lens.distributed.exchange.process_index", lambda: index)
    sharing = SharedFeatures(8)
    assert sharing.own == [range(3), range(3, 6), range(6, 8)][index]
    assert sharing.own_features(torch.arange(8.0)).tolist() == list(sharing.own)


@pytest.mark.usefixtures("of_nine")
def test_more_processes_than_features_are_refused():
    check_processes("mine", TrainingBAEConfig(d_in=4, d_sae=9), shard_features=True)
    with pytest.raises(ValueError, match=r"9 processes cannot share the 8 features of mine, .* start at most 8"):
        check_processes("mine", TrainingBAEConfig(d_in=4, d_sae=8), shard_features=True)
    check_processes("mine", TrainingBAEConfig(d_in=4, d_sae=8))


def test_codes_that_are_optimized_in_training_are_refused():
    cfg = TrainingBAEConfig(d_in=4, d_sae=8, max_flips=4, optimized_start_step=5)
    with pytest.raises(ValueError, match=r"mine is trained on optimized codes from step 5 on, .* leave out --shard"):
        check_features_can_be_shared("mine", cfg)


def test_codes_of_the_largest_features_are_refused():
    cfg = TrainingBinaryTopKConfig(d_in=4, d_sae=8, k=2)
    with pytest.raises(ValueError, match=r"mine is a binary_topk dictionary, of whose .* leave out --shard-features"):
        check_features_can_be_shared("mine", cfg)


@pytest.mark.usefixtures("of_nine")
def test_features_are_not_shared_of_what_has_no_binary_code():
    topk = {"Top-k": Contender((Recipe(TopKTrainingSAEConfig(d_in=4, d_sae=8, k=2), lr=1e-3),))}
    experiment = Experiment("m", "text", "hook")
    check_hooks(topk, experiment, {"hook": 4}, share_steps=True, shard_features=False)
    with pytest.raises(ValueError, match="9 processes cannot share the steps of Top-k, a topk dictionary"):
        check_hooks(topk, experiment, {"hook": 4}, share_steps=True, shard_features=True)
