"""`bae-lens export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bae_lens.saes.circuit_tracer import export_to_circuit_tracer
from bae_lens.saes.loading import load_dictionary
from bae_lens.saes.transcoder import TopKTranscoder


@dataclass(frozen=True)
class Export:
    """Write transcoders, one for each layer of a model from the first on, as files of circuit-tracer."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER [FOLDER ...]")]
    """Folders of saved transcoders, in any order."""
    output: Path = Path("circuit_tracer")
    """Folder for the files."""

    def run(self) -> str:
        """Writes them, and says how circuit-tracer loads them. Raises as `load_dictionary` and the export do."""
        transcoders = [load_dictionary(folder) for folder in self.folders]
        folder = export_to_circuit_tracer(transcoders, self.output)
        loads = "load_transcoders(yaml.safe_load(open(...))) of circuit_tracer.utils.hf_utils takes its config.yaml"
        first = transcoders[0]
        if isinstance(first, TopKTranscoder):
            loads += f"; then set activation_function = TopK({first.cfg.k}) of every transcoder, which files cannot say"
        return f"{len(transcoders)} transcoders: {folder}\n{loads}"
