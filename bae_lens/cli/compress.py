"""`bae-lens compress`."""

from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from bae_lens.activations.cache import CachedActivations
from bae_lens.activations.vector_files import VectorFile
from bae_lens.cli.device import DEFAULT_DEVICE, check_device
from bae_lens.compression.codec import ROWS, compress
from bae_lens.saes.loading import load_bae
from bae_lens.saes.transcoder import hooks_of


@dataclass(frozen=True)
class Compress:
    """Write the code of activations to a .bae file: exact bits, entropy-coded, readable in part."""

    vectors: Path
    """A .npy, .pt or .safetensors file of one array (..., d_in), or a folder of activations that bae-lens cached,
    such as demo/activations/test, of which the content is taken at the dictionary's hook."""
    dictionary: Path
    """Folder of a saved BAE."""
    output: Path
    """The .bae file; what is there already stays until the new one is whole."""
    append: bool = False
    """Add to the file instead."""
    joint: bool = True
    """Code features given one another where that takes fewer bits; without it, writing and reading are faster, and the
    code can be read without the dictionary."""
    device: str = DEFAULT_DEVICE
    """Where the BAE runs."""

    def run(self) -> str:
        """Writes the file and returns its size and error.

        Raises ValueError for an output that does not end in .bae, and as `load_bae`, `VectorFile`, `CachedActivations`
        and `compress` do.
        """
        if self.output.suffix != ".bae":
            raise ValueError(f"the output must be a file that ends in .bae, got {self.output}")
        check_device(self.device)
        bae = load_bae(self.dictionary, self.device)
        if self.vectors.is_dir():
            batches = CachedActivations(self.vectors, hooks_of(bae)[0]).batches(ROWS)
        else:
            batches = VectorFile(self.vectors)
        with tqdm(batches, "compressing", unit="batch") as progress:
            report = compress(bae, iter(progress), self.output, append=self.append, joint=self.joint)
        explained = report.explained_variance
        codings = ", ".join(f"{n} by {coding}" for coding, n in (report.codings or {}).items())
        return (
            f"{report.n_vectors} vectors, {report.n_bytes} bytes: {report.bits:.1f} bits a vector "
            f"(entropy of the code {report.entropy_bits:.1f}, {report.joint_bits:.1f} jointly; "
            f"as 16-bit numbers {16 * report.d_in}); chunks coded: {codings}\n"
            f"explained variance {'undefined' if explained is None else f'{explained:.4f}'} when decompressed; "
            f"the code itself is exact"
        )
