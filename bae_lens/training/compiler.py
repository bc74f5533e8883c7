"""What compiling a training step takes."""

import os
import shutil
import sys
from importlib.util import find_spec

import torch

DEFAULT_COMPILER = "clang++" if sys.platform == "darwin" else "g++"


def check_compiler(device: str) -> None:
    """Raises ValueError if no step can be compiled for a device: without C++ compiler, or for a GPU without triton."""
    compiler = os.environ.get("CXX", DEFAULT_COMPILER)
    if shutil.which(compiler) is None:
        raise ValueError(
            f"compiling a step takes a C++ compiler, and {compiler} is not there; install it, name another by the "
            "environment variable CXX, or leave out --compile"
        )
    if torch.device(device).type != "cpu" and find_spec("triton") is None:
        raise ValueError(
            f"compiling a step for {device} takes triton, which is not installed; pip install triton brings it, or "
            "leave out --compile"
        )
