"""`bae-lens decompress`."""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm.auto import tqdm

from bae_lens.cli.device import DEFAULT_DEVICE, check_device
from bae_lens.compression.code_file import CodeFile
from bae_lens.compression.codec import reconstructions
from bae_lens.saes.loading import load_bae
from bae_lens.storage import locked_file, written_whole


@dataclass(frozen=True)
class Decompress:
    """Write the vectors in a .bae file, as the dictionary that made it reconstructs them, to a .npy file."""

    file: Path
    """The .bae file."""
    dictionary: Path
    """Folder of the BAE that made it."""
    output: Path
    """The .npy file, of float32 (n, d_in); what is there already stays until the new one is whole."""
    start: int = 0
    """The first vector that is wanted."""
    stop: int | None = None
    """The first that is not wanted any more; by default all to the end are."""
    skip_damaged: bool = False
    """Leave out damaged chunks, and say which, instead of stopping."""
    device: str = DEFAULT_DEVICE
    """Where the BAE runs."""

    def run(self) -> str:
        """Writes the vectors and returns how many, and which were damaged.

        Raises as `load_bae`, `decompress` and `locked_file`.
        """
        if self.output.suffix != ".npy":
            raise ValueError(f"the output must be a file that ends in .npy, got {self.output}")
        check_device(self.device)
        bae = load_bae(self.dictionary, self.device)
        with (
            CodeFile(self.file, self.skip_damaged) as file,
            locked_file(self.output),
            written_whole(self.output) as partial,
            partial.open("wb") as out,
            tqdm(desc="decompressing", unit="vector") as progress,
        ):
            write_header(out, 0, bae.cfg.d_in)
            for _, vectors in reconstructions(file, bae, slice(self.start, self.stop)):
                out.write(vectors.float().numpy().astype("<f4").tobytes())
                progress.update(len(vectors))
            out.seek(0)
            write_header(out, progress.n, bae.cfg.d_in)
        lost = "".join(f"\ndamaged and left out: vectors {rows.start} to {rows.stop - 1}" for rows in file.damaged)
        return f"{progress.n} vectors in {self.output}{lost}"


def write_header(out: BinaryIO, n: int, d_in: int) -> None:
    """The beginning of a .npy file, of the same length for any n, so that it can be set right in the end."""
    shape = {"descr": "<f4", "fortran_order": False, "shape": (n, d_in)}
    np.lib.format.write_array_header_1_0(out, shape)
