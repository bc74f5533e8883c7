import pytest
import torch
from sae_lens import SAE

from bae_lens.comsem.collect.dictionaries import informative, load_dictionaries, load_dictionary, ten_strongest


def test_a_dictionary_is_an_object_a_folder_or_a_name_on_the_hub(known_bae, known_sae, tmp_path, monkeypatch):
    known_bae.save_model(tmp_path / "mine")
    asked = []

    def from_pretrained(*arguments):
        asked.append(arguments)
        return known_sae

    monkeypatch.setattr(SAE, "from_pretrained", from_pretrained)
    sources = {"object": known_sae, "folder": str(tmp_path / "mine"), "hub": "gemma-scope-2b-pt-res/layer_3/width_16k"}
    loaded = load_dictionaries(sources)
    assert loaded["object"] is loaded["hub"] is known_sae
    assert torch.equal(loaded["folder"].W_enc, known_bae.W_enc)
    assert asked == [("gemma-scope-2b-pt-res", "layer_3/width_16k", "cpu")]


def test_a_single_dictionary_gets_a_name(known_bae, tmp_path):
    known_bae.save_model(tmp_path / "mine")
    assert list(load_dictionaries(known_bae)) == ["bae"]
    assert list(load_dictionaries(tmp_path / "mine")) == ["mine"]


def test_what_is_no_dictionary_is_refused(known_sae, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no saved dictionary in .*, which has no cfg\.json"):
        load_dictionary(tmp_path)
    known_sae.save_model(tmp_path / "damaged")
    (tmp_path / "damaged" / "sae_weights.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(ValueError, match="is a pointer of Git LFS"):
        load_dictionary(tmp_path / "damaged")
    with pytest.raises(ValueError, match="got 'nothing', which is neither"):
        load_dictionary("nothing")
    with pytest.raises(ValueError, match="there are no dictionaries"):
        load_dictionaries({})
    known_sae.cfg.metadata.hook_name = None
    with pytest.raises(ValueError, match="does not say which hook it reads"):
        load_dictionary(known_sae)


def test_bits_say_something_where_they_differ_from_the_prior(known_bae, known_sae):
    code = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    known_bae.prior.copy_(torch.tensor([0.1, 0.9, 0.1, 0.9]))
    assert informative(known_bae, code).tolist() == [[True, False, False, True]]
    assert informative(known_sae, torch.tensor([[2.0, 0.0, -1.0, 1e-6]])).tolist() == [[True, False, False, True]]


def test_ten_are_the_strongest_however_weak_and_of_equal_ones_the_first(known_sae, known_bae):
    weak = torch.zeros(2, 12)
    weak[0, 11], weak[1, 5] = 2.0, 1.0
    assert ten_strongest(known_sae, weak).tolist() == [[11, *range(9)], [5, 0, 1, 2, 3, 4, 6, 7, 8, 9]]
    code, prior = torch.tensor([[1.0, 0.0, 0.0, 1.0]]), torch.tensor([0.9, 0.8, 0.1, 0.2])
    assert ten_strongest(known_bae, code, prior).tolist() == [[1, 3, 0, 2]], "|h - p| is .1, .8, .1, .8"
