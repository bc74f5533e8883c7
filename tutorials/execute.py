"""Makes the notebooks: runs the tutorials that are named and writes each beside its text, with what it printed."""

import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

SECONDS = 1200  # for a cell


def execute(text: Path) -> float:
    """Runs a tutorial in an empty folder and writes its notebook, without progress bars and warnings; seconds."""
    notebook = jupytext.read(text)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(
            notebook, timeout=SECONDS, kernel_name="python3", resources=resources, coalesce_streams=True
        ).execute()
    seconds = time.monotonic() - start
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    nbformat.write(notebook, text.with_suffix(".ipynb"))
    return seconds


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(f"{argument}: {execute(Path(argument)):.0f} s", flush=True)
