import json
import os
import subprocess
import sys
from unittest import mock

import pytest
from huggingface_hub import ModelCard
from sae_lens.saes.sae import SAEMetadata

from bae_lens import BAE, BAEConfig
from bae_lens.cli import upload as command
from bae_lens.cli.main import main
from bae_lens.cli.upload import REQUEST_ERRORS, copied_without_folders, dictionaries_in, repository_card


def test_dictionaries_of_a_run_and_a_dictionary_by_itself(tmp_path):
    for home in ("dictionaries/BAE", "dictionaries/Top-k", "seeds/1/dictionaries/BAE", "dictionaries/.BAE.1.partial"):
        BAE(BAEConfig(d_in=2, d_sae=4)).save_model(tmp_path / home)
    (tmp_path / "dictionaries" / "half").mkdir()
    (tmp_path / "dictionaries" / "half" / "cfg.json").touch()

    assert dictionaries_in(tmp_path) == {
        "BAE": tmp_path / "dictionaries" / "BAE",
        "Top-k": tmp_path / "dictionaries" / "Top-k",
        "BAE_seed1": tmp_path / "seeds" / "1" / "dictionaries" / "BAE",
    }
    assert dictionaries_in(tmp_path / "dictionaries" / "BAE") == {"BAE": tmp_path / "dictionaries" / "BAE"}


def test_card_of_a_repository_joins_those_of_its_dictionaries():
    one = "---\nlibrary_name: saelens\ntags:\n- bae\n- x\n---\n\n# BAE\n\n![chart](explained_variance_by_bits.png)\n"
    two = one.replace("BAE", "Top-k transcoder").replace("- bae", "- topk_transcoder")

    card = ModelCard(repository_card({"BAE": one, "Top-k transcoder": two}))

    assert card.data.to_dict() == {"library_name": "saelens", "tags": ["bae", "x", "topk_transcoder"]}
    assert card.text.split() == [
        *("#", "BAE", "![chart](BAE/explained_variance_by_bits.png)"),
        *("#", "Top-k", "transcoder", "![chart](Top-k%20transcoder/explained_variance_by_bits.png)"),
    ]


def test_local_folders_are_not_uploaded(tmp_path):
    model, text = str(tmp_path / "llama"), str(tmp_path / "words.jsonl")
    metadata = {"model_name": model, "dataset_path": text, "hook_name": "a.b"}
    BAE(BAEConfig(d_in=2, d_sae=4, metadata=SAEMetadata(**metadata))).save_model(tmp_path / "bae")
    copy = copied_without_folders(tmp_path / "bae", tmp_path / "copy")
    before, after = (json.loads((folder / "cfg.json").read_text()) for folder in (tmp_path / "bae", copy))
    assert before["metadata"]["model_name"] == model
    shown = {**before["metadata"], "model_name": "llama", "dataset_path": "words.jsonl"}
    assert after == {**before, "metadata": shown}
    assert (copy / "sae_weights.safetensors").read_bytes() == (tmp_path / "bae/sae_weights.safetensors").read_bytes()


@pytest.fixture
def upload(monkeypatch, tmp_path, capsys):
    """What `bae-lens upload` says in a folder with a dictionary, `bae`, when it ends with status 2."""
    BAE(BAEConfig(d_in=2, d_sae=4)).save_model(tmp_path / "bae")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bae-lens", "upload", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        return capsys.readouterr().err

    return run


def test_folder_without_dictionaries(upload, tmp_path):
    (tmp_path / "empty").mkdir()
    assert upload("empty", "you/baes") == (
        "error: no dictionary is in empty; name the folder of one, with cfg.json and sae_weights.safetensors, or the "
        "--output of train, compare or demo\n"
    )


def test_repository_without_a_name(upload):
    said = upload("bae")
    assert "Missing from bae-lens upload:" in said
    assert "REPO_ID" in said


def test_repository_with_a_name_that_cannot_be(upload):
    assert upload("bae", "you/b/c").startswith("error: Repo id must be in the form 'repo_name' or ")


@pytest.mark.parametrize("kind", sorted(set(REQUEST_ERRORS), key=str))
def test_hub_that_refuses_or_cannot_be_reached(upload, monkeypatch, kind):
    """By both kinds of errors that its client raises."""
    monkeypatch.setattr(command, "upload_saes_to_huggingface", mock.Mock(side_effect=kind("401\n\nInvalid name.")))
    assert upload("bae", "you/baes") == (
        "error: you/baes could not be uploaded: 401 Invalid name.; check the connection, the name and the login "
        "(hf auth login), and run the same command again\n"
    )


def test_network_that_is_not_there(tmp_path):
    BAE(BAEConfig(d_in=2, d_sae=4)).save_model(tmp_path / "bae")
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_stub"}
    result = subprocess.run(
        [sys.executable, "-m", "bae_lens", "upload", "bae", "you/baes"],
        cwd=tmp_path,
        env={**os.environ, **nowhere, "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: you/baes could not be uploaded: ")
    assert "Traceback" not in result.stderr
