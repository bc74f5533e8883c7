"""The command line: `bae-lens` and its subcommands."""

import sys
import warnings
from typing import Annotated

import tyro

from bae_lens.commands.compare import Compare
from bae_lens.commands.compress import Compress
from bae_lens.commands.comsem import Comsem
from bae_lens.commands.decompress import Decompress
from bae_lens.commands.demo import Demo
from bae_lens.commands.dynamics import Dynamics
from bae_lens.commands.entropy import Entropy
from bae_lens.commands.train import Train


def main() -> None:
    """Runs a command; errors of the user's making end with one line and exit status 2."""
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
        print(command.run())
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
