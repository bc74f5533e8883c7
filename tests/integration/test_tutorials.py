from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

TUTORIALS = Path(__file__).parents[2] / "tutorials"
SOURCES = sorted(TUTORIALS.glob("[0-9]_*.py"))
SECONDS = 1200  # for a cell, on a machine that does other things as well
MOST_BYTES = 1_000_000
NOWHERE = "http://127.0.0.1:9"  # the port of the discard service, where nothing answers


def sources(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_index_lists_every_tutorial_in_order():
    index = (TUTORIALS / "README.md").read_text()

    places = [index.find(f"({source.stem}.ipynb)") for source in SOURCES]
    assert [source.name[0] for source in SOURCES] == ["1", "2", "3", "4", "5"]
    assert -1 not in places
    assert places == sorted(places)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebook_is_the_executed_text(source):
    path = source.with_suffix(".ipynb")
    notebook = nbformat.read(path, as_version=4)

    assert sources(notebook) == sources(jupytext.read(source))
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"] == []
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < MOST_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom_without_a_network(source, tmp_path, monkeypatch):
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, NOWHERE)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    notebook = jupytext.read(source)

    NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()

    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
