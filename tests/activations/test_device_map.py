import pytest
import torch

from bae_lens.activations.device_map import first_device, read_device_map


def test_names_and_objects_are_read(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert read_device_map(None) is None
    assert read_device_map("balanced") == "balanced"
    assert first_device("balanced") == "cuda"
    places = read_device_map('{"model.embed_tokens": 1, "model.layers": "cuda:0"}')
    assert places == {"model.embed_tokens": 1, "model.layers": "cuda:0"}
    assert places is not None
    assert first_device(places) == "cuda:1"
    assert first_device({"": "cpu"}) == "cpu"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("balanced", "balanced spreads a model over several GPUs, and 1 are here; leave out --device-map"),
        ("typo", "must be one of auto, .* or a JSON object .*, got 'typo'"),
        ("{}", "got '{}'"),
        ('{"": true}', "or a JSON object from parts of the model to devices"),
        ('["cpu"]', "or a JSON object"),
        ('{"a": 0, "b": "cpu"}', "devices of one kind .*, got a device map to cpu and cuda; map to GPUs alone"),
        ('{"": "disk"}', "got a device map to disk"),
    ],
)
def test_what_no_model_can_lie_on_is_refused(text, message, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=message):
        read_device_map(text)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr("bae_lens.activations.device_map.n_launched", lambda: 2)
    with pytest.raises(ValueError, match="of one process, and torchrun started 2; run it without torchrun"):
        read_device_map("auto")
