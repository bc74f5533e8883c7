"""Whether circuit-tracer reads what `bae-lens export` writes; for its environment, so nothing of bae_lens is imported.

    python benchmarks/read_by_circuit_tracer.py traced expected.safetensors

The second file holds inputs `x` and outputs `y` of the exported transcoders, (layer, token, width) each.
"""

import sys
from pathlib import Path

import torch
import yaml
from circuit_tracer.transcoder.activation_functions import TopK
from circuit_tracer.utils.hf_utils import load_transcoders
from safetensors.torch import load_file

if __name__ == "__main__":
    config = yaml.safe_load((Path(sys.argv[1]) / "config.yaml").read_text())
    expected = load_file(sys.argv[2])
    transcoders = load_transcoders(config, torch.device("cpu"), torch.float32)
    if "k" in config:
        for transcoder in transcoders:
            transcoder.activation_function = TopK(config["k"])
    out = transcoders.decode(transcoders.encode(expected["x"]), expected["x"])
    parts = transcoders.compute_attribution_components(expected["x"])
    print(f"{len(transcoders)} layers, {parts['activation_matrix']._nnz()} features fire at all tokens but the first")
    print(f"largest difference {(out - expected['y']).abs().max():.2g} of {expected['y'].abs().max():.3g}")
