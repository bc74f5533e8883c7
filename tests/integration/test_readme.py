import re
import runpy
from pathlib import Path

import pytest
from sae_lens import SAE

from bae_lens import TopKTranscoder

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_ci_runs_the_test_command_of_the_readme():
    (command,) = [block for block in code_blocks("bash") if "pytest" in block]
    assert command.strip() == 'pip install "torch==2.13.0" -e ".[dev]" && pytest'
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    install, test = command.strip().split(" && ")
    assert script.index(install) < script.index(test)


def test_map_of_the_house_names_every_module_and_package():
    files = {path.name for path in (ROOT / "bae_lens").glob("*.py")} - {"__init__.py", "__main__.py"}
    packages = {f"{path.parent.name}/" for path in (ROOT / "bae_lens").glob("*/__init__.py")}
    assert files | packages == set(re.findall(r"^\| `([\w/.]+)`", README, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples:UserWarning")
def test_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    transcoder, bae, compression, steering, _ = code_blocks("python")  # test_hub.py runs the last
    for name, example in (("transcoder.py", transcoder), ("bae.py", bae)):
        (tmp_path / name).write_text(example)
    runpy.run_path(str(tmp_path / "transcoder.py"))
    assert isinstance(SAE.load_from_disk(tmp_path / "transcoders" / "mlp"), TopKTranscoder)
    names = runpy.run_path(str(tmp_path / "bae.py"))
    assert names["code"].unique().tolist() == [0, 1]
    assert names["features"].shape == (*names["code"].shape[:2], 10)
    (tmp_path / "compression.py").write_text(compression)
    (tmp_path / "steering.py").write_text(steering)
    compressed = runpy.run_path(str(tmp_path / "compression.py"), init_globals=names)
    assert compressed["first_codes"].equal(names["bae"].encode(compressed["states"])[:2])
    assert compressed["reconstructions"].shape == compressed["states"].shape
    steered = runpy.run_path(str(tmp_path / "steering.py"), init_globals=names)
    assert steered["edited"].startswith("My fellow Americans")
    assert len(steered["effects"].up) == len(steered["effects"].down) == 8
