import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from sae_lens import SAE, HookedSAETransformer, StandardSAE, TopKSAE, TopKSAEConfig

from bae_lens import BAE, BAEConfig, BinaryTranscoder, BinaryTranscoderConfig
from bae_lens.activations.fingerprint import model_fingerprint
from bae_lens.activations.models import load_model
from bae_lens.cli import dashboard as dashboard_module
from bae_lens.cli.dashboard import Dashboard
from bae_lens.report import saedashboard

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def saved(tiny_model_folder, tmp_path):
    """Saves a dictionary that reads the tiny model, and returns its folder."""

    def save(kind="bae", hook_name_out=None, **metadata):
        sae: SAE
        if kind == "bae":
            sae = BAE(BAEConfig(d_in=16, d_sae=40))
        elif kind == "topk":
            sae = TopKSAE(TopKSAEConfig(d_in=16, d_sae=40, k=4))
        else:
            sae = BinaryTranscoder(BinaryTranscoderConfig(d_in=16, d_sae=40, d_out=16))
        torch.nn.init.normal_(sae.W_enc)
        sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = HOOK, str(tiny_model_folder)
        sae.cfg.metadata.hook_name_out = hook_name_out
        for key, value in metadata.items():
            setattr(sae.cfg.metadata, key, value)
        sae.save_model(tmp_path / kind)
        return tmp_path / kind

    return save


@pytest.fixture
def words(tiny_dataset, tmp_path):
    path = tmp_path / "words.jsonl"
    path.write_text("\n".join(json.dumps({"text": " ".join(tiny_dataset["text"][i : i + 9])}) for i in range(30)))
    return path


@pytest.fixture
def show(words, tmp_path, monkeypatch):
    """Runs the command with SAEDashboard's environment replaced, and returns what it says and was handed."""
    handed = {}

    def run(command, **_):
        assert command[:3] == [Path(sys.executable), "-I", dashboard_module.SCRIPT]
        job = json.loads(command[3].read_text())
        handed.update(job, sae=SAE.load_from_disk(job["sae"]), tokens=np.load(job["tokens"]))
        Path(job["output"]).mkdir()
        (Path(job["output"]) / "dashboard.html").touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(dashboard_module.subprocess, "run", run)

    def show(source, **options):
        settings = {"python": Path(sys.executable), "dataset": str(words), "output": tmp_path / "shown", **options}
        return Dashboard(str(source), **settings).run(), handed

    return show


def test_the_graded_view_and_whole_contexts_are_handed_over(saved, show, tiny_model_folder, tmp_path):
    folder = saved()
    said, job = show(folder, contexts=5, features=(3, 1, 3))
    assert said.startswith("2 features of bae on 5 contexts: the page to open (it takes the internet) is ")
    assert type(job["sae"]) is StandardSAE
    assert torch.equal(job["sae"].W_enc, BAE.load_from_disk(folder).W_enc)
    assert job["tokens"].shape == (5, 128)
    assert (job["tokens"][:, 0] == 0).all()  # BOS
    assert (job["features"], job["model"], job["sae_set"]) == ([3, 1], str(tiny_model_folder), "bae")
    assert (tmp_path / "shown" / "dashboard.html").exists()


def test_other_dictionaries_are_handed_over_as_they_are(saved, show):
    _, job = show(saved("topk"))
    assert type(job["sae"]) is TopKSAE
    assert job["features"] == list(range(40))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": (40,)}, "numbered from 0 to 39, got 40"),
        ({"contexts": 0}, "contexts must be at least 1, got 0"),
        ({"python": Path("no/python")}, "there is no Python at no/python; SAEDashboard needs an older"),
        ({"dictionary": "bae"}, "those of a run, got bae; give the folders that you mean"),
        ({"output": Path(__file__).parent}, "holds something already; choose an empty one"),
    ],
)
def test_what_cannot_be_shown_is_refused(saved, show, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        show(saved(), **options)
    assert not (tmp_path / "shown").exists()


def test_transcoders_are_refused(saved, show):
    with pytest.raises(ValueError, match=r"transcoder reads blocks.0.hook_resid_post and writes blocks.1.hook_mlp_out"):
        show(saved("transcoder", "blocks.1.hook_mlp_out"))


def test_a_dictionary_that_reads_in_no_layer_is_refused(saved, show):
    with pytest.raises(ValueError, match=r"read in a layer, .* and topk reads hook_embed; choose another"):
        show(saved("topk", hook_name="hook_embed"))


def test_another_model_than_the_runs_is_refused(saved, show, words, tiny_model_folder, tmp_path):
    shutil.copytree(saved(), tmp_path / "run" / "dictionaries" / "bae")
    weights = model_fingerprint(load_model(str(tiny_model_folder)))
    run = {"model": str(tiny_model_folder), "dataset": str(words), "text_column": "text", "dataset_split": "train"}
    run |= {"seed": 0, "contexts": {"context_size": 16}, "recipes": {"bae": {}}}
    (tmp_path / "run" / "run.json").write_text(json.dumps({**run, "model_weights": "of before"}))
    with pytest.raises(
        ValueError, match=f"run had {tiny_model_folder} with weights of before, and they are {weights} now; bring that"
    ):
        show(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps({**run, "model_weights": weights}))
    assert show(tmp_path / "run")[1]["model_options"] == {}


@pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty model_from_pretrained_kwargs")
def test_the_model_has_the_options_that_the_dictionary_was_trained_with(saved, show, tiny_model_folder, monkeypatch):
    options = {"center_writing_weights": True}
    _, job = show(saved(model_from_pretrained_kwargs=options))
    assert job["model_options"] == options
    monkeypatch.setattr(HookedSAETransformer, "from_pretrained_no_processing", lambda name, **given: (name, given))
    loaded = saedashboard._load_model(job["model"], "cpu", job["model_options"])
    assert loaded == (str(tiny_model_folder), {"device": "cpu", **options})


def test_text_without_a_whole_context_is_refused(saved, show, tmp_path):
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "w1 w2"}))
    with pytest.raises(ValueError, match=r"short.jsonl has no document of 128 tokens; choose longer text"):
        show(saved(), dataset=str(tmp_path / "short.jsonl"))


def test_without_an_environment_the_command_says_how_to_make_one(saved):
    with pytest.raises(
        ImportError, match=r"an environment of its own: python -m venv ENV; .* give --python ENV/bin/python"
    ):
        Dashboard(str(saved())).run()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            "Traceback\nModuleNotFoundError: No module named 'sae_dashboard'",
            "has no SAEDashboard; SAEDashboard needs an",
        ),
        ("Traceback\nValueError: too wide", "SAEDashboard could not show this: ValueError: too wide"),
        ("", "could not show this: exit status 1"),
    ],
)
def test_what_saedashboard_says_at_last_is_the_error_and_nothing_is_left(
    saved, show, tmp_path, monkeypatch, error, message
):
    ended = subprocess.CompletedProcess([], 1, stderr=error)
    monkeypatch.setattr(dashboard_module.subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(ValueError, match=message):
        show(saved(), output=tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_the_script_writes_a_page_and_batches(saved, tiny_model_folder, tmp_path, monkeypatch):
    class Runner:
        def __init__(self, config):
            self.config = config

        def run(self, encoder, model, tokens):
            assert torch.equal(model(tokens), load_model(str(tiny_model_folder))(tokens))
            return SimpleNamespace(feature_data_dict=dict.fromkeys(self.config.features, encoder.cfg.d_sae))

    modules = {
        "data_writing_fns": {"save_feature_centric_vis": lambda sae_vis_data, filename: Path(filename).touch()},  # noqa: ARG005
        "neuronpedia.neuronpedia_converter": {
            "NeuronpediaConverter": SimpleNamespace(
                convert_to_np_json=lambda _, data, config, words: json.dumps(
                    [list(data.feature_data_dict), config.layer, config.n_prompts_total, words[0]]
                )
            )
        },
        "neuronpedia.neuronpedia_runner_config": {"NeuronpediaRunnerConfig": SimpleNamespace},
        "sae_vis_data": {"SaeVisConfig": SimpleNamespace},
        "sae_vis_runner": {"SaeVisRunner": Runner},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"sae_dashboard.{name}", module)
    for name in ("sae_dashboard", "sae_dashboard.neuronpedia"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    np.save(tmp_path / "tokens.npy", np.array([[2, 4, 5]]))
    job = {"sae": str(saved("topk")), "tokens": str(tmp_path / "tokens.npy"), "model": str(tiny_model_folder)}
    job |= {"model_options": {}, "model_id": "tiny", "dataset": "words", "sae_set": "set", "device": "cpu"}
    saedashboard._main({**job, "features": [5, 1, 7], "batch_size": 2, "output": str(tmp_path / "out")})
    assert (tmp_path / "out" / "dashboard.html").exists()
    batches = [json.loads((tmp_path / "out" / "neuronpedia" / f"batch-{i}.json").read_text()) for i in (0, 1)]
    assert batches == [[[5, 1], 0, 1, "<bos>"], [[7], 0, 1, "<bos>"]]
