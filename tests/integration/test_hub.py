import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pytest_httpserver import HTTPServer
from sae_lens.saes.sae import SAEMetadata
from werkzeug import Request, Response

from bae_lens import BAE, BAEConfig, write_cards, write_pictures

README = (Path(__file__).parents[2] / "bae_lens" / "saes" / "README.md").read_text()
HOOK = "blocks.10.hook_resid_post"
REPOSITORY = "you/baes"
MAIN = "0" * 40  # the only commit
BEFORE = """
from bae_lens import BAE

bae = BAE.load_from_disk("bae")
"""
AFTER = """
bae.save_model("loaded")
"""


class Hub:
    """The part of the Hugging Face hub's protocol that uploading to a repository of models and loading from it takes.

    `files` are the repository's by path, `in_lfs` those of them that went through Git LFS, as weights do.
    """

    def __init__(self, server: HTTPServer):
        self.server = server
        self.exists = False
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.in_lfs: set[str] = set()
        server.expect_request(re.compile(".*")).respond_with_handler(self.answer)

    def answer(self, request: Request) -> Response:
        path = request.path.removeprefix("/")
        if request.method in ("POST", "PUT"):
            return self.change(path, request)
        if path == f"api/models/{REPOSITORY}":
            return answer({"id": REPOSITORY, "siblings": []}) if self.exists else missing("RepoNotFound")
        return self.download(path.removeprefix(f"{REPOSITORY}/resolve/main/"))

    def change(self, path: str, request: Request) -> Response:
        if path.startswith("lfs/"):
            self.objects[path.removeprefix("lfs/")] = request.data
            return answer({})
        assert request.headers["Authorization"] == "Bearer hf_stub"
        if path == "api/repos/create":
            self.exists = True
            return answer({"url": self.server.url_for(REPOSITORY)})
        if path == "api/validate-yaml":
            return answer({"errors": [], "warnings": []})
        if path == f"api/models/{REPOSITORY}/preupload/main":
            assert self.exists
            return answer({"files": [self.upload_mode(file["path"]) for file in request.get_json()["files"]]})
        if path == f"{REPOSITORY}.git/info/lfs/objects/batch":
            return answer({"objects": [self.place(entry) for entry in request.get_json()["objects"]]})
        assert path == f"api/models/{REPOSITORY}/commit/main"
        for line in request.data.splitlines():
            self.commit(**json.loads(line))
        return answer({"commitUrl": self.server.url_for(f"{REPOSITORY}/commit/{MAIN}"), "commitOid": MAIN})

    def upload_mode(self, path: str) -> dict[str, object]:
        return {
            "path": path,
            "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
            "shouldIgnore": False,
        }

    def place(self, entry: dict[str, object]) -> dict[str, object]:
        return {**entry, "actions": {"upload": {"href": self.server.url_for(f"lfs/{entry['oid']}")}}}

    def commit(self, key: str, value: dict[str, str]) -> None:
        if key == "file":
            self.files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            self.files[value["path"]] = self.objects[value["oid"]]
            self.in_lfs.add(value["path"])

    def download(self, path: str) -> Response:
        if path not in self.files:
            return missing("EntryNotFound")
        response = Response(self.files[path])
        response.headers["ETag"] = hashlib.sha256(self.files[path]).hexdigest()
        response.headers["X-Repo-Commit"] = MAIN
        return response


def answer(content: object) -> Response:
    return Response(json.dumps(content), content_type="application/json")


def missing(what: str) -> Response:
    return Response(status=404, headers={"X-Error-Code": what})


@pytest.fixture
def hub(httpserver: HTTPServer) -> Hub:
    return Hub(httpserver)


def run_in_new_process(arguments: list[str], folder: Path, hub: Hub) -> str:
    """What Python prints, run as by a user who has a token, with the hub where the stub is and an empty cache."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.server.url_for("").rstrip("/"),
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_stub",
    }
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_readme_uploads_a_bae_and_loads_it_again(hub, tmp_path):
    (example,) = re.findall(r"```python\n([^`]*upload_saes_to_huggingface.*?)```", README, re.DOTALL)
    bae = BAE(BAEConfig(d_in=4, d_sae=8, metadata=SAEMetadata(hook_name=HOOK, model_name="smollm2")))
    bae.W_enc.data.normal_()
    bae.prior.uniform_()
    bae.save_model(tmp_path / "bae")

    run_in_new_process(["-c", BEFORE + example + AFTER], tmp_path, hub)

    assert set(hub.files) == {"README.md", f"{HOOK}/cfg.json", f"{HOOK}/sae_weights.safetensors"}
    assert hub.in_lfs == {f"{HOOK}/sae_weights.safetensors"}
    loaded = BAE.load_from_disk(tmp_path / "loaded")
    assert (loaded.cfg.metadata.hook_name, loaded.cfg.metadata.model_name) == (HOOK, "smollm2")
    expected = bae.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
def test_command_uploads_a_run_with_its_cards_and_pictures(hub, make_comparison, tmp_path):
    comparison = make_comparison(("BAE", "Top-k"))
    for home in ("dictionaries/BAE", "seeds/1/dictionaries/BAE", "dictionaries/Top-k", "seeds/1/dictionaries/Top-k"):
        BAE(BAEConfig(d_in=4, d_sae=8)).save_model(tmp_path / "run" / home)
    write_pictures(comparison, tmp_path / "run")
    write_cards(comparison, tmp_path / "run")
    command = ["-m", "bae_lens", "upload", "run", REPOSITORY]

    said = run_in_new_process(command, tmp_path, hub)

    names = ["BAE", "Top-k", "BAE_seed1", "Top-k_seed1"]
    assert said == f"uploaded to {REPOSITORY}: {', '.join(names)}\n"
    files = ("README.md", "cfg.json", "explained_variance_by_bits.png", "sae_weights.safetensors")
    assert set(hub.files) == {"README.md", *(f"{name}/{file}" for name in names for file in files)}
    card = hub.files["BAE_seed1/README.md"].decode()
    assert f'sae = SAE.from_pretrained("{REPOSITORY}", "BAE_seed1")' in card
    assert card.partition("# BAE")[2].partition("![")[0] in hub.files["README.md"].decode()

    hub.files["README.md"] = b"mine"
    said = run_in_new_process(command, tmp_path, hub)

    assert said.endswith("; its README.md was there and stays\n")
    assert hub.files["README.md"] == b"mine"


def test_command_uploads_a_dictionary_without_a_card(hub, tmp_path):
    BAE(BAEConfig(d_in=4, d_sae=8)).save_model(tmp_path / "bae")

    run_in_new_process(["-m", "bae_lens", "upload", "bae", REPOSITORY], tmp_path, hub)

    assert set(hub.files) == {"README.md", "bae/cfg.json", "bae/sae_weights.safetensors"}
    assert b"- bae" in hub.files["README.md"]
