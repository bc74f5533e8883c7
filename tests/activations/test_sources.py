from typing import Any

import pytest
from datasets import Dataset
from sae_lens import HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

from bae_lens.activations import sources
from bae_lens.activations.sources import load_model, load_text, resolve_hook


def texts(name: Any) -> list[str]:
    dataset: Any = load_text(str(name))
    return [row["text"] for row in dataset]


def test_local_folder_becomes_a_hooked_model_with_transformers_logits(tiny_model_folder):
    model = load_model(str(tiny_model_folder))
    assert isinstance(model, HookedSAETransformer)
    from bae_lens.activations.demo_model import _check_logits

    _check_logits(tiny_model_folder)


def test_conversion_with_other_logits_is_not_kept(tiny_model_folder, monkeypatch):
    from bae_lens.activations import demo_model

    def broken(folder):
        model = load_model(str(folder))
        model.unembed.W_U.data *= 1.5
        return model

    monkeypatch.setattr(demo_model, "load_hooked", broken)
    with pytest.raises(RuntimeError, match="logits differ"):
        demo_model._check_logits(tiny_model_folder)


def test_architecture_that_transformer_lens_does_not_convert_becomes_a_bridge(tiny_model_folder, monkeypatch):
    def refuse(folder):
        raise NotImplementedError(folder)

    monkeypatch.setattr("transformer_lens.loading_from_pretrained.convert_hf_model_config", refuse)
    model = load_model(str(tiny_model_folder))
    assert isinstance(model, SAETransformerBridge)
    assert resolve_hook(model, "blocks.1.hook_resid_post") == "blocks.1.hook_out"


@pytest.mark.parametrize(("name", "loader"), [("gpt2", "hooked"), ("someone/unlisted-model", "bridge")])
def test_hub_names_go_to_the_loader_that_knows_them(name, loader, monkeypatch):
    monkeypatch.setattr(HookedSAETransformer, "from_pretrained_no_processing", lambda name, **_: ("hooked", name))
    monkeypatch.setattr(SAETransformerBridge, "boot_transformers", lambda name, **_: ("bridge", name))
    assert load_model(name) == (loader, name)


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"needs a config.json"):
        load_model(str(tmp_path))


def test_unknown_hook_names_near_ones(tiny_model):
    assert resolve_hook(tiny_model, "blocks.0.hook_resid_post") == "blocks.0.hook_resid_post"
    with pytest.raises(ValueError, match=r"no hook 'blocks.0.hook_resid_pots'; near ones: blocks.0.hook_resid_post"):
        resolve_hook(tiny_model, "blocks.0.hook_resid_pots")
    with pytest.raises(ValueError, match="near ones: none"):
        resolve_hook(tiny_model, "?")


def test_text_file_has_a_document_a_paragraph(tmp_path):
    (tmp_path / "one.txt").write_text("first line\nsecond line\n\nanother paragraph\n")
    assert [text.strip() for text in texts(tmp_path / "one.txt")] == [
        "first line\nsecond line",
        "another paragraph",
    ]


def test_folder_has_a_document_a_file(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"file {name}\n\nstill {name}")
    assert texts(tmp_path) == ["file a\n\nstill a", "file b\n\nstill b"]


def test_jsonl_file_has_a_document_a_line(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert texts(path) == ["one", "two"]


def test_text_that_is_none_is_refused(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text('{"content": "one"}\n')
    with pytest.raises(ValueError, match=r"has no column 'text' of strings; choose its text column among content"):
        load_text(str(path))
    with pytest.raises(ValueError, match="found no text"):
        load_text(str(tmp_path / "missing.txt"))
    (tmp_path / "book.pdf").write_text("")
    with pytest.raises(ValueError, match=r"must end in one of .txt"):
        load_text(str(tmp_path / "book.pdf"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="holds no documents"):
        load_text(str(tmp_path / "empty.txt"))


def test_text_can_be_in_another_column(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "no", "body": "one"}\n{"text": "no", "body": "two"}\n')
    dataset: Any = load_text(str(path), column="body")
    assert list(dataset) == [{"text": "one"}, {"text": "two"}]


def test_hub_dataset_is_streamed(monkeypatch):
    def stream(name, split, streaming):
        return Dataset.from_dict({"text": [f"{name} {split} {streaming}"]})

    monkeypatch.setattr(sources, "load_dataset", stream)
    assert texts("someone/texts") == ["someone/texts train True"]
