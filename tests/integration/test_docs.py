"""Every public name says what it is."""

import ast
import importlib
import inspect
import pkgutil
import pydoc
import re
from pathlib import Path
from typing import Any

import pytest

import bae_lens

UNSTYLED: Any = pydoc.plaintext  # pyright: ignore[reportAttributeAccessIssue]
MODULES = ["bae_lens", *(found.name for found in pkgutil.walk_packages(bae_lens.__path__, "bae_lens."))]
MODULES.remove("bae_lens.__main__")
PLAIN = {"to_dict", "from_dict"}


def definitions(module):
    """The public classes, functions and methods that a module's source defines, by name.

    Those that say it all are left out: `to_dict`, `from_dict`, and questions such as `is_transcoder`.
    """
    tree = ast.parse(Path(module.__file__).read_text())
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node
            for part in node.body if isinstance(node, ast.ClassDef) else ():
                if (
                    isinstance(part, ast.FunctionDef)
                    and not part.name.startswith(("_", "is_"))
                    and part.name not in PLAIN
                ):
                    yield f"{node.name}.{part.name}", part


def decorators(node):
    return {ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list}


def undocumented_fields(node):
    """Fields of a dataclass, of two or more, that neither a docstring under them nor the class's docstring names."""
    described = ast.get_docstring(node) or ""
    for part, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if not documented and not re.search(rf"\b{part.target.id}\b", described):
                yield part.target.id


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_is_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__
    missing = [
        defined
        for defined, node in definitions(module)
        if not ast.get_docstring(node) and "override" not in decorators(node)
    ]
    fields = [
        f"{defined}.{field}"
        for defined, node in definitions(module)
        if isinstance(node, ast.ClassDef) and "dataclass" in decorators(node)
        for field in undocumented_fields(node)
    ]
    assert missing + fields == []


@pytest.mark.parametrize("name", MODULES)
def test_pydoc_shows_each_module(name):
    module = importlib.import_module(name)
    text = pydoc.render_doc(module, renderer=UNSTYLED)
    assert inspect.cleandoc(module.__doc__ or "").splitlines()[0] in text


@pytest.mark.parametrize("name", bae_lens.__all__)
def test_pydoc_shows_each_public_name_with_words_of_our_own(name):
    thing = getattr(bae_lens, name)
    assert thing.__module__.startswith("bae_lens.")
    first = inspect.cleandoc(thing.__doc__).splitlines()[0]
    assert not first.startswith(f"{name}(")  # what dataclasses are given that have no docstring
    assert first in pydoc.render_doc(f"bae_lens.{name}", renderer=UNSTYLED)
