"""The command line: `bae-lens` and its commands, of which only the one that is asked for is imported."""

import io
import sys
import warnings
from argparse import REMAINDER, ArgumentParser, RawDescriptionHelpFormatter
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any, NoReturn

import bae_lens
from bae_lens.extras import naming_the_command

COMMANDS = {
    "demo": "five dictionaries side by side on a small language model and a text that come with it",
    "train": "train one dictionary on a language model's activations and measure it",
    "compare": "tune, train and measure dictionaries side by side",
    "upload": "upload dictionaries and their model cards to the Hugging Face hub",
    "export": "write the transcoders of a model's layers as files of circuit-tracer",
    "comsem": "explain features and ask a judge whether the explanations fit",
    "dashboard": "show features in SAEDashboard and as Neuronpedia's batches",
    "agreement": "compare ComSem's score with others of the same features, and between seeds, texts and judges",
    "entropy": "estimate the entropy of vectors in a file",
    "dynamics": "the entropy of a language model's activations by layer and position",
    "compress": "write the code of activations to a .bae file",
    "decompress": "write the vectors in a .bae file to a .npy file",
}
SHARED = ("demo", "train", "compare", "comsem", "dynamics")  # by the processes that torchrun starts
STARTING_OVER = {
    "agreement",
    "dashboard",
    "export",
    "entropy",
    "compress",
    "decompress",
}  # these write all of something, or nothing


def main() -> None:
    """Runs a command; errors of the user's making end with one line and exit status 2.

    Of several processes, the first alone says what all have to say.
    """
    given = _parser().parse_args()

    from bae_lens.distributed.connection import launch_index

    with redirect_stdout(io.StringIO() if launch_index() > 0 else sys.stdout):
        _run(given.command, given.arguments)


def _parser() -> ArgumentParser:
    width = max(map(len, COMMANDS)) + 2
    parser = ArgumentParser(
        prog="bae-lens",
        description="Binary autoencoders for language models",
        epilog="\n".join(["commands:", *(f"  {name:{width}}{does}" for name, does in COMMANDS.items())]),
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bae-lens {bae_lens.__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of the commands below")
    parser.add_argument("arguments", metavar="...", nargs=REMAINDER, help="bae-lens COMMAND --help lists them")
    return parser


def _run(name: str, arguments: list[str]) -> None:
    from bae_lens.distributed.connection import launch_index, n_launched

    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        if n_launched() > 1 and name not in SHARED:
            raise ValueError(
                f"torchrun started {n_launched()} processes, which share {', '.join(SHARED)}, but not {name}; run it "
                "without torchrun"
            )
        with naming_the_command():
            print(_command(name, arguments).run())
    except KeyboardInterrupt:
        if launch_index() == 0:
            again = "starts over" if name in STARTING_OVER else "goes on from here"
            print(f"interrupted; the same command {again}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:
        _end_with(str(error))
    except (MemoryError, RuntimeError) as error:
        from bae_lens.memory import is_shortage, shortage_sentence

        if not is_shortage(error):
            raise
        _end_with(shortage_sentence(error))


def _end_with(error: str) -> NoReturn:
    from bae_lens.distributed.connection import end, launch_index

    process = f" in process {launch_index()}" if launch_index() > 0 else ""
    print(f"error{process}: {error}", file=sys.stderr)
    end(2)


def _command(name: str, arguments: list[str]) -> Any:
    """The command's dataclass, filled from its flags; some have defaults that depend on the arguments."""
    import tyro

    kind = getattr(import_module(f"bae_lens.cli.{name}"), name.title())
    defaults = {"default": kind.defaults(arguments)} if hasattr(kind, "defaults") else {}
    return tyro.cli(kind, prog=f"bae-lens {name}", args=arguments, config=(tyro.conf.OmitArgPrefixes,), **defaults)
