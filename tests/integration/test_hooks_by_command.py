"""What a command accepts of a hook works through to the end in every command; all else is refused before any work."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sae_lens import SAE

from bae_lens.activations.cache import CachedActivations
from bae_lens.cli import main as cli
from tests.cli.test_comsem import LetterJudge

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:the text gave:UserWarning"),
    pytest.mark.filterwarnings("ignore:run_with_cache. skipped:UserWarning"),
]
SMALL = "--cached-tokens 600 --held-out-tokens 300 --context-size 16 --training-tokens 640 --batch-size 32"
SIZES = SMALL.split()
EVERYWHERE = (
    "blocks.1.hook_resid_mid",
    "blocks.1.hook_resid_post",
    "blocks.1.hook_attn_out",
    "blocks.1.hook_mlp_out",
    "blocks.1.hook_in",
    "blocks.1.hook_out",
    "blocks.1.attn.hook_in",
    "blocks.1.attn.hook_out",
    "blocks.1.attn.hook_z",
    "blocks.1.attn.hook_q",
    "blocks.1.attn.hook_k",
    "blocks.1.mlp.hook_in",
    "blocks.1.mlp.hook_pre",
    "blocks.1.mlp.hook_post",
    "blocks.1.mlp.hook_out",
    "blocks.1.ln1.hook_normalized",
    "blocks.1.ln2.hook_scale",
    "ln_final.hook_normalized",
    "unembed.hook_in",
    "hook_embed",
    "embed.hook_out",
    "blocks.1.attn.hook_pattern",
    "blocks.1.attn.hook_result",
)
# What is refused, on a hooked model and on a bridge: by what the model is, never after any work.
REFUSED = {
    "hooked": {
        "blocks.1.mlp.hook_out",
        "embed.hook_out",
        "blocks.1.hook_in",
        "blocks.1.hook_out",
        "blocks.1.attn.hook_in",
        "blocks.1.attn.hook_out",
        "blocks.1.attn.hook_q",
        "blocks.1.attn.hook_k",
        "blocks.1.attn.hook_pattern",
        "blocks.1.attn.hook_result",
    },
    "bridge": {
        "hook_embed",
        "blocks.1.ln1.hook_normalized",
        "blocks.1.ln2.hook_scale",
        "ln_final.hook_normalized",
        "blocks.1.attn.hook_pattern",
        "blocks.1.attn.hook_result",
    },
}


@pytest.fixture
def words(tmp_path: Path, tiny_dataset: Dataset) -> Path:
    path = tmp_path / "words.jsonl"
    path.write_text("\n".join(json.dumps({"text": text + "."}) for text in tiny_dataset["text"][:600]))
    return path


@pytest.fixture(params=["hooked", "bridge"])
def kind(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    def refuse(_folder: str) -> None:
        raise NotImplementedError

    if request.param == "bridge":
        monkeypatch.setattr("bae_lens.saes.saelens_compat.convert_hf_model_config", refuse)
    monkeypatch.setattr("bae_lens.cli.comsem.OfflineJudge", LetterJudge)
    return request.param


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command in this process; its status and what it wrote."""

    def run(*arguments: Any) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["bae-lens", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0), capsys.readouterr().err.splitlines()[-1]
        return 0, capsys.readouterr().out

    return run


@pytest.mark.parametrize("hook", EVERYWHERE)
def test_every_command_at_a_hook(command, kind, hook, words, tiny_model_folder, tmp_path):
    run = tmp_path / "run"
    given = ["--model", tiny_model_folder, "--dataset", words]
    status, said = command("train", *given, "--hook-name", hook, "--output", run, *SIZES, "--set", "target_l0", 2)
    if hook in REFUSED[kind]:
        assert (status, said.startswith("error: ")) == (2, True)
        assert not run.exists()
        return
    assert (status, "\nbae " in said) == (0, True), said

    folder = run / "dictionaries" / "bae"
    trained = SAE.load_from_disk(folder)
    cached = CachedActivations(run / "activations" / "test", str(trained.cfg.metadata.hook_name))
    vectors = cached.rows(cached.content).numpy()
    np.save(tmp_path / "x.npy", vectors)
    assert command("entropy", "--vectors", tmp_path / "x.npy", "--dictionary", folder)[0] == 0

    code = tmp_path / "x.bae"
    assert (
        command("compress", "--vectors", run / "activations" / "test", "--dictionary", folder, "--output", code)[0] == 0
    )
    again = ["--file", code, "--dictionary", folder, "--output", tmp_path / "y.npy"]
    assert command("decompress", *again)[0] == 0
    trained.turn_off_forward_pass_hook_z_reshaping()
    expected = trained(torch.from_numpy(vectors)).detach().numpy()
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=1e-4, atol=1e-4)

    judged = ["--offline-judge", "--accept-failing-judge", "--max-features", 2, "--n-tokens", 600]
    status, said = command("comsem", run, *judged)
    assert (status, "| bae" in said) == (0, True), said


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("hook", ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z", "blocks.1.mlp.hook_pre"])
def test_dictionaries_side_by_side_at_a_hook(command, hook, words, tiny_model_folder, tmp_path):
    names = ["bae", "standard", "topk", "gated", "jumprelu", "batchtopk", "topk_transcoder"]
    given = ["--model", tiny_model_folder, "--dataset", words, "--l0", 4, "--architectures", *names, *SIZES]
    status, said = command("compare", *given, "--hook-name", hook, "--output", tmp_path / "run")
    assert status == 0, said
    rows = re.search(r"^-[- ]+\n(.*?)\n\n", said, re.DOTALL | re.MULTILINE)
    assert rows is not None
    assert len(rows[1].splitlines()) == len(names)


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize(
    "hooks",
    [
        ("mlp.hook_in", "hook_mlp_out"),
        ("hook_resid_pre", "mlp.hook_post"),
        ("attn.hook_z", "hook_attn_out"),
        ("hook_mlp_out", "mlp.hook_in"),
    ],
)
def test_transcoder_between_hooks(command, hooks, words, tiny_model_folder, tmp_path):
    source, target = (f"blocks.1.{hook}" for hook in hooks)
    given = ["--model", tiny_model_folder, "--dataset", words, "--architecture", "binary_transcoder", *SIZES]
    given += ["--hook-name", source, "--hook-name-out", target]
    status, said = command("train", *given, "--output", tmp_path / "run")
    if hooks[0] in ("attn.hook_z", "hook_mlp_out"):
        assert (status, said.startswith("error: ")) == (2, True)
        assert not (tmp_path / "run").exists()
        return
    assert status == 0, said
    folder, code = tmp_path / "run" / "dictionaries" / "binary_transcoder", tmp_path / "x.bae"
    test = tmp_path / "run" / "activations" / "test"
    status, said = command("compress", "--vectors", test, "--dictionary", folder, "--output", code)
    assert (status, "a transcoder's code does not stand for its input" in said) == (2, True)
    assert not code.exists()
    judged = ["--offline-judge", "--accept-failing-judge", "--max-features", 2, "--n-tokens", 600]
    status, said = command("comsem", tmp_path / "run", *judged)
    assert status == 0, said


def test_dynamics(command, kind, words, tiny_model_folder, tmp_path):
    given = ["--model", tiny_model_folder, "--dataset", words, "--max-position", 8, "--windows", 320, "--steps", 8]
    status, said = command("dynamics", *given, "--batch-size", 64, "--layers", 0, 1, "--output", tmp_path / "run")
    assert status == 0, said
    assert ("blocks.1.hook_out" if kind == "bridge" else "blocks.1.hook_resid_post") in said
