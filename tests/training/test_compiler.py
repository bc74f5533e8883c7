import pytest

from bae_lens.cli import experiment
from bae_lens.cli.train import Train
from bae_lens.training import compiler
from bae_lens.training.compiler import check_compiler
from bae_lens.training.recipe import TrainingSettings


def test_a_missing_compiler_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ValueError, match=r"C\+\+ compiler, and no-such-compiler is not there; .* CXX, or leave out --comp"
    ):
        check_compiler("cpu")


def test_a_gpu_needs_triton_too(monkeypatch):
    monkeypatch.setattr(compiler.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(compiler, "find_spec", lambda package: {}.get(package))
    check_compiler("cpu")
    with pytest.raises(ValueError, match="for cuda:1 takes triton, which is not installed"):
        check_compiler("cuda:1")


def test_a_command_looks_for_the_compiler_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(experiment, "load_text", pytest.fail)
    settings = TrainingSettings(compile=True)
    with pytest.raises(ValueError, match="no-such-compiler"):
        Train(output=tmp_path / "run", hook_name="blocks.0.hook_resid_post", training=settings, device="cpu").run()
    assert not (tmp_path / "run").exists()
