import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_ci_runs_the_test_command_of_the_readme():
    (command,) = [block for block in code_blocks("bash") if "pytest" in block]
    assert command.strip() == 'pip install "torch==2.13.0" -e ".[dev]" && pytest'
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    install, test = command.strip().split(" && ")
    assert script.index(install) < script.index(test)


def test_map_of_the_house_names_every_module():
    package = ROOT / "bae_lens"
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py") if not path.stem.startswith("__")}
    assert modules == set(re.findall(r"^\| `([\w/]+\.py)`", README, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples:UserWarning")
def test_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = code_blocks("python")
    (tmp_path / "example.py").write_text(example)
    names = runpy.run_path(str(tmp_path / "example.py"))
    assert names["code"].unique().tolist() == [0, 1]
    assert names["features"].shape == (*names["code"].shape[:2], 10)
