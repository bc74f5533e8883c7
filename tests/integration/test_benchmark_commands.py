"""Commands of benchmarks that the documentation names are ones that their scripts take."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
PAGES = [
    ROOT / "README.md",
    *BENCHMARKS.glob("*.md"),
    *(ROOT / "bae_lens").rglob("README.md"),
    *BENCHMARKS.glob("*.py"),
]
COMMAND = re.compile(r"python benchmarks/(\w+)\.py((?:[^\n`\\]|\\\n)*)")
# these import what is in an environment of its own
ELSEWHERE = {"absorption", "saebench", "sparse_probing", "read_by_circuit_tracer"}
OTHERS = {"plan"}  # takes what `bae-lens compare` does
WORKER = "memory"  # asks for a part of a benchmark, which takes no settings


def documented() -> list[tuple[str, tuple[str, ...]]]:
    """Scripts and their arguments."""
    found = [match.groups() for page in PAGES for match in COMMAND.finditer(page.read_text())]
    commands = {(name, tuple(shlex.split(flags.replace("\\\n", " "), comments=True))) for name, flags in found}
    return sorted(command for command in commands if command[0] not in ELSEWHERE | OTHERS and WORKER not in command[1])


def settings_class(name: str) -> str:
    """The class that a script hands to tyro."""
    calls = (
        node for node in ast.walk(ast.parse((BENCHMARKS / f"{name}.py").read_text())) if isinstance(node, ast.Call)
    )
    [given] = [call.args[0] for call in calls if ast.unparse(call.func) == "tyro.cli"]
    return ast.unparse(given)


@pytest.mark.parametrize(
    ("name", "arguments"), documented(), ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_a_documented_command_is_taken(name: str, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = importlib.import_module(name)
    tyro.cli(getattr(script, settings_class(name)), args=arguments)


def test_the_documentation_names_benchmarks() -> None:
    assert len(documented()) > 20
    assert {name for name, _ in documented()} <= {path.stem for path in BENCHMARKS.glob("*.py")}
