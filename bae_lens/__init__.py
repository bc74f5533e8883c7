"""Binary autoencoders (arXiv 2509.20997) for SAELens and TransformerLens.

The public names stand in `__init__.pyi` and are imported when they are asked for. Wherever SAELens is imported, before
or after this package, the architecture `"bae"` and trainable transcoders are registered with it.
"""

from types import ModuleType
from typing import Any

import lazy_loader
from wrapt import when_imported

from bae_lens.extras import naming_the_command

__version__ = "0.1.0"

_public_name, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    """A public name, imported. Raises ImportError, with the command that helps, if it needs an extra."""
    with naming_the_command():
        return _public_name(name)


@when_imported("sae_lens")
def _register(_: ModuleType) -> None:
    """Importing `bae_lens.saes` registers the architectures."""
    import bae_lens.saes  # noqa: F401
