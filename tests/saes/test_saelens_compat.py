import ast
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import sae_lens
import transformer_lens

import bae_lens
from bae_lens.saes import saelens_compat

PACKAGE = Path(bae_lens.__file__).parent
# The other runs with hosts of an environment of its own, whose versions are fixed.
PLACES = ("saes/saelens_compat.py", "report/saedashboard.py")
SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if str(path.relative_to(PACKAGE)) not in PLACES]
HOSTS = {"sae_lens": sae_lens, "transformer_lens": transformer_lens}


def internals(source: str) -> Iterator[str]:
    """What a source imports from the inside of SAELens or TransformerLens."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = (name.name for name in node.names)
            yield from (module for module in modules if module.partition(".")[0] in HOSTS and "." in module)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in HOSTS:
            for name in node.names:
                if "." in node.module or isinstance(getattr(HOSTS[node.module], name.name, None), ModuleType):
                    yield f"{node.module}.{name.name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_internals_of_the_hosts_are_imported_in_one_place(path):
    assert not list(internals(path.read_text()))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from sae_lens import SAE", []),
        ("import sae_lens, transformer_lens", []),
        ("import sae_lens_vis.x", []),
        ("def f():\n    from sae_lens.util import get_special_token_ids", ["sae_lens.util.get_special_token_ids"]),
        ("import transformer_lens.hook_points as hooks", ["transformer_lens.hook_points"]),
        ("from transformer_lens import loading_from_pretrained", ["transformer_lens.loading_from_pretrained"]),
    ],
)
def test_what_is_internal(source, found):
    assert list(internals(source)) == found


def test_nothing_is_passed_on_that_sae_lens_exports():
    assert not set(saelens_compat.__all__) & set(sae_lens.__all__)
    assert all(hasattr(saelens_compat, name) for name in saelens_compat.__all__)
