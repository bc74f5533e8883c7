"""What does a hidden state cost on disk, how fast is it written and read, and what does the model lose?

python benchmarks/compression.py                        # codes of known rates: size against H(p), speed
python benchmarks/compression.py --run-folder demo      # and a real dictionary's, in the folder of a comparison
"""

import json
import pickle
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import tyro
from machine import machine
from sae_lens import SAE
from torch import Tensor
from tqdm import tqdm

from bae_lens import (
    BAE,
    CachedActivations,
    bits_at,
    compress,
    decompress,
    load_demo_model,
    marginal_entropy,
    pca_quantization,
    read_code,
)
from bae_lens.compression.code_file import CodeFile
from bae_lens.compression.code_writer import CodeWriter
from bae_lens.evaluation.model_loss import LossMeter
from bae_lens.functional.rate_distortion import covariance
from bae_lens.storage import write_text

KEY = bytes(16)


@dataclass(frozen=True)
class Compression:
    """Sizes and speeds for given densities; with a run, sizes and the model's loss on real activations."""

    run_folder: Path | None = None
    """Folder of a comparison with a dictionary BAE, such as demo."""
    d_sae: int = 2304
    densities: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    n_vectors: int = 32_768
    rounds: int = 3
    n_contexts: int = 32
    """Held-out contexts on which the model's loss is measured."""
    pca_vectors: int = 32_768
    """Training vectors that PCA is fitted on."""
    output: Path = field(default=Path(__file__).parent / "results" / "compression.json")

    def run(self) -> None:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x.bae"
            rows = [self._known_rates(density, path) for density in tqdm(self.densities, "densities")]
            real = None if self.run_folder is None else self._real(self.run_folder, path)
        write_text(self.output, json.dumps({**machine(), "known_rates": rows, "real": real}, indent=1))

    def _known_rates(self, density: float, path: Path) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        rate = np.clip(rng.exponential(density, self.d_sae), 0, 0.5)  # rare features and common ones, as in real codes
        rate *= density / rate.mean()
        packed = np.packbits(rng.random((self.n_vectors, self.d_sae), np.float32) < rate, axis=1)
        row = {"density": density, **_sizes(packed, self.d_sae, path)}
        blobs = {"zlib": zlib.compress(packed.tobytes()), "lists": pickle.dumps(_index_lists(packed, self.d_sae))}
        jobs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            ".bae, features alone": (lambda: _write(path, packed, self.d_sae), lambda: read_code(path, packed=True)),
            ".bae": (lambda: _write(path, packed, self.d_sae, True), lambda: read_code(path, packed=True)),
            "zlib": (lambda: zlib.compress(packed.tobytes()), lambda: zlib.decompress(blobs["zlib"])),
            "lists": (
                lambda: pickle.dumps(_index_lists(packed, self.d_sae)),
                lambda: _dense(blobs["lists"], self.d_sae),
            ),
        }
        seconds: dict[str, list[list[float]]] = {name: [[], []] for name in jobs}
        for _ in range(self.rounds):
            for name, (there, back) in jobs.items():
                for i, job in enumerate((there, back)):
                    start = time.process_time()
                    job()
                    seconds[name][i].append(time.process_time() - start)
        assert np.array_equal(read_code(path, packed=True).numpy(), packed)
        speed = {name: [self.n_vectors / statistics.median(s) for s in both] for name, both in seconds.items()}
        tqdm.write(json.dumps(row | {"vectors_per_second": speed}))
        return row | {"vectors_per_second": speed}

    def _real(self, folder: Path, path: Path) -> dict[str, Any]:
        bae = SAE.load_from_disk(folder / "dictionaries" / "BAE")
        assert isinstance(bae, BAE)
        hook_name = str(bae.cfg.metadata.hook_name)
        train, test = (CachedActivations(folder / "activations" / split, hook_name) for split in ("train", "test"))
        x = test.rows(test.content)
        some = train.content[:: max(1, len(train.content) // self.pca_vectors)]
        known = train.rows(some)
        start = time.process_time()
        report = compress(bae, x, path)
        middle = time.process_time()
        back = decompress(path, bae)
        speed = [len(x) / (middle - start), len(x) / (time.process_time() - middle)]
        packed = read_code(path, sae=bae, packed=True).numpy()
        curve = pca_quantization(known, x)
        codecs = {
            "BAE, .bae file": (report.bits, lambda x: _there_and_back(bae, x, path)),
            "PCA at these bits": _pca_at(report.bits, known, x),
            "int8": (8 * x.shape[1] + 16, _int8),
            "fp8 (e4m3)": (8 * x.shape[1] + 16, _fp8),
            "fp16": (16 * x.shape[1], lambda x: x.half().float()),
        }
        stand_ins: Any = {name: StandIn(hook_name, codec) for name, (_, codec) in codecs.items()}
        losses = LossMeter(load_demo_model(), test, self.n_contexts)(stand_ins)
        variance = (x - x.mean(0)).double().square().sum()
        rows = []
        for name, (bits, codec) in codecs.items():
            explained = 1 - ((codec(x) - x).double().square().sum() / variance).item()
            loss = losses[name]
            rows.append({"code": name, "bits": bits, "explained_variance": explained, "ce": loss.with_sae})
            rows[-1] |= {"kl": loss.kl_with_sae, "ce_recovered": loss.recovered, "n_tokens": loss.n_tokens}
            tqdm.write(json.dumps(rows[-1]))
        first = next(iter(losses.values()))
        return {
            "report": report.to_dict(),
            "bits": report.bits,
            "vectors_per_second": speed,
            "decompressed_is_what_the_dictionary_gives": bool(torch.allclose(back, bae(x), rtol=1e-4, atol=1e-3)),
            "sizes": _sizes(packed, bae.cfg.d_sae, path.with_suffix(".sizes")),
            "pca_bits_at_this_explained_variance": bits_at(curve, report.explained_variance or 0.0),
            "ce_clean": first.clean,
            "ce_zeros": first.ablated,
            "codes": rows,
        }


def _sizes(packed: np.ndarray, d_sae: int, path: Path) -> dict[str, float]:
    """Bits per vector of a code in various forms."""
    n = len(packed)
    _write(path, packed, d_sae, joint=True)
    joint = 8 * path.stat().st_size / n
    _write(path, packed, d_sae)
    rate = np.unpackbits(packed, axis=1, count=d_sae).mean(0)
    mode = rate > 0.5
    differing = int(sum((part != mode).sum() for part in _unpacked(packed, d_sae)))
    with CodeFile(path) as file:
        side = sum(8 * (2 * d_sae + 40) for _ in file.chunks())
    return {
        "entropy": marginal_entropy(torch.from_numpy(rate)).item(),
        "side_information": side / n,
        ".bae, features alone": 8 * path.stat().st_size / n,
        ".bae": joint,
        "packed bits": 8 * packed.shape[1],
        "zstd of packed bits": 8 * len(pa.Codec("zstd", 19).compress(packed.tobytes())) / n,
        "zlib of packed bits": 8 * len(zlib.compress(packed.tobytes())) / n,
        "lists of indices, pickled": 8 * len(pickle.dumps(_index_lists(packed, d_sae))) / n,
        "lists of indices, 16 bits each": 16 * differing / n,
    }


def _unpacked(packed: np.ndarray, d_sae: int) -> list[np.ndarray]:
    return [np.unpackbits(part, axis=1, count=d_sae) for part in np.array_split(packed, -(-len(packed) // 4096))]


def _index_lists(packed: np.ndarray, d_sae: int) -> list[list[int]]:
    """The authors' form: for each vector, which bits differ from the more frequent value."""
    parts = _unpacked(packed, d_sae)
    mode = sum(part.sum(0, dtype=np.int64) for part in parts) > len(packed) / 2
    return [np.flatnonzero(row != mode).tolist() for part in parts for row in part]


def _dense(blob: bytes, d_sae: int) -> np.ndarray:
    lists = pickle.loads(blob)
    code = np.zeros((len(lists), d_sae), bool)
    for row, indices in zip(code, lists, strict=True):
        row[indices] = True
    return np.packbits(code, axis=1)


def _write(path: Path, packed: np.ndarray, d_sae: int, joint: bool = False) -> None:
    with CodeWriter(path, d_sae, KEY, joint=joint) as writer:
        for part in np.array_split(packed, -(-len(packed) // 4096)):
            writer.write(part)


def _there_and_back(bae: BAE, x: Tensor, path: Path) -> Tensor:
    compress(bae, x, path)
    return decompress(path, bae)


def _int8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True).div(127).half().float()
    return (x / scale).round().clamp(-127, 127) * scale


def _fp8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True).div(torch.finfo(torch.float8_e4m3fn).max).half().float()
    largest = torch.finfo(torch.float8_e4m3fn).max
    return (x / scale).clamp(-largest, largest).to(torch.float8_e4m3fn).float() * scale


class Quantizer:
    """PCA and scalar quantization with one step, as in `rate_distortion.pca_quantization`, as a function of vectors."""

    def __init__(self, known: Tensor, basis: Tensor, step: float) -> None:
        self.mean, self.basis, self.step = known.mean(0), basis, step
        coefficients = self.coefficients(known)
        symbols = (coefficients / step).round()
        self.reach = int(symbols.abs().max())
        index = self.index(symbols)
        size = (2 * self.reach + 1) * known.shape[1]
        count = torch.bincount(index.flatten(), minlength=size)
        sums = torch.bincount(index.flatten(), weights=coefficients.flatten().double(), minlength=size)
        middle = torch.arange(-self.reach, self.reach + 1).mul(step).repeat(known.shape[1]).double()
        self.values = torch.where(count > 0, sums / count.clamp(min=1), middle).float()

    def coefficients(self, x: Tensor) -> Tensor:
        return (x - self.mean) @ self.basis

    def index(self, symbols: Tensor) -> Tensor:
        own = symbols.clamp(-self.reach, self.reach).long() + self.reach
        return own + torch.arange(symbols.shape[1]) * (2 * self.reach + 1)

    def __call__(self, x: Tensor) -> Tensor:
        return self.values[self.index((self.coefficients(x) / self.step).round())] @ self.basis.T + self.mean

    def bits(self, x: Tensor) -> float:
        """Sum over components of the empirical entropy of their symbols."""
        index = self.index((self.coefficients(x) / self.step).round())
        share = torch.bincount(index.flatten(), minlength=len(self.values)).double() / len(x)
        return -torch.xlogy(share, share).sum().item() / np.log(2)


def _pca_at(bits: float, known: Tensor, x: Tensor) -> tuple[float, Quantizer]:
    """The step at which the vectors x need so many bits, by bisection, and the bits reached."""
    basis = torch.linalg.eigh(covariance(known))[1].float()
    low, high = 0.1, 1000.0
    for _ in range(12):
        step = (low * high) ** 0.5
        low, high = (low, step) if Quantizer(known, basis, step).bits(x) < bits else (step, high)
    quantizer = Quantizer(known, basis, high)
    return quantizer.bits(x), quantizer


class StandIn:
    """Puts a codec where `LossMeter` expects a dictionary."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, hook_name: str, codec: Callable[[Tensor], Tensor]) -> None:
        self.cfg = SimpleNamespace(metadata=SimpleNamespace(hook_name=hook_name, hook_name_out=None))
        self.codec = codec

    def __call__(self, x: Tensor) -> Tensor:
        return self.codec(x.flatten(0, 1)).view_as(x)


if __name__ == "__main__":
    tyro.cli(Compression).run()
