"""The command line: `bae-lens` and its subcommands."""

import io
import sys
import warnings
from contextlib import redirect_stdout
from typing import Annotated

import tyro

from bae_lens.cli.compare import Compare
from bae_lens.cli.compress import Compress
from bae_lens.cli.comsem import Comsem
from bae_lens.cli.decompress import Decompress
from bae_lens.cli.demo import Demo
from bae_lens.cli.dynamics import Dynamics
from bae_lens.cli.entropy import Entropy
from bae_lens.cli.train import Train
from bae_lens.distributed import launch_index, n_launched

STARTING_OVER = {"entropy", "compress", "decompress"}  # what these write is there whole or not at all


def main() -> None:
    """Runs a command; errors of the user's making end with one line and exit status 2.

    Of several processes, the first alone says what all have to say.
    """
    with redirect_stdout(io.StringIO() if launch_index() > 0 else sys.stdout):
        _run()


def _run() -> None:
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    subcommand, arguments = sys.argv[1:2], sys.argv[2:]
    try:
        compare = Compare.defaults(arguments if subcommand == ["compare"] else [])
        command = tyro.cli(
            Annotated[Demo, tyro.conf.subcommand("demo")]
            | Annotated[Train, tyro.conf.subcommand("train")]
            | Annotated[Compare, tyro.conf.subcommand("compare", default=compare)]
            | Annotated[Entropy, tyro.conf.subcommand("entropy")]
            | Annotated[Dynamics, tyro.conf.subcommand("dynamics")]
            | Annotated[Comsem, tyro.conf.subcommand("comsem")]
            | Annotated[Compress, tyro.conf.subcommand("compress")]
            | Annotated[Decompress, tyro.conf.subcommand("decompress")],
            prog="bae-lens",
            description="Binary autoencoders for language models",
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
        if n_launched() > 1 and not isinstance(command, Train):
            name = type(command).__name__.lower()
            raise ValueError(f"torchrun started {n_launched()} processes, but only train shares them; run {name} alone")
        print(command.run())
    except KeyboardInterrupt:
        if launch_index() == 0:
            again = "starts over" if STARTING_OVER.intersection(subcommand) else "goes on from here"
            print(f"interrupted; the same command {again}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:
        process = f" in process {launch_index()}" if launch_index() > 0 else ""
        print(f"error{process}: {error}", file=sys.stderr)
        sys.exit(2)
