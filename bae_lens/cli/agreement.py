"""`bae-lens agreement`: do ComSem's score and the others say the same of the same features?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bae_lens.comsem.agreement import compare_scores
from bae_lens.comsem.exports import RESULT_FILE
from bae_lens.comsem.results import ComSemReport
from bae_lens.report.agreement import write_agreement_report
from bae_lens.storage import read_json, write_json

AGREEMENT_FILE = "agreement.json"


@dataclass(frozen=True)
class Agreement:
    """Compare the scores of runs of bae-lens comsem: with one another, with themselves where seed, text or judge
    differ, and with explanations that are not right.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders that bae-lens comsem has written, or runs that hold one."""
    output: Path = Path("agreement")
    """Folder for the page and the numbers."""

    def run(self) -> str:
        """The tables."""
        reports = {name: _read(folder) for name, folder in _named(self.folders).items()}
        found = compare_scores(reports)
        self.output.mkdir(parents=True, exist_ok=True)
        write_json(self.output / AGREEMENT_FILE, found)
        page = write_agreement_report(found, self.output)
        return f"{found.table()}\n\nthe page is {page}"


def _named(folders: tuple[Path, ...]) -> dict[str, Path]:
    """Folders by the last part of their path that says which they are, or else by all of it."""
    if not folders:
        raise ValueError("name the folders that bae-lens comsem has written")
    short = [folder.resolve().parent.name if folder.name == "comsem" else folder.resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"a folder is named twice among {', '.join(names)}; name each once")
    return dict(zip(names, folders, strict=True))


def _read(folder: Path) -> ComSemReport:
    for path in (folder / RESULT_FILE, folder / "comsem" / RESULT_FILE):
        if path.exists():
            return ComSemReport.from_dict(read_json(path))
    raise ValueError(f"{folder} holds no {RESULT_FILE}; choose what bae-lens comsem wrote")
