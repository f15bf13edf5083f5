"""The command `blip2-hf`."""

import argparse
from collections.abc import Sequence

from . import ask, cache_features, capfilt, caption, convert, evaluate, export, index, look, search


COMMANDS = (ask, cache_features, capfilt, caption, convert, evaluate, export, index, look, search)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; `run` of what it returns is the function that runs one."""
    parser = argparse.ArgumentParser(prog="blip2-hf", description="BLIP-2 for the Hugging Face stack.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None):
    """Run the command that `arguments` name; `None` takes them from the command line."""
    options = make_parser().parse_args(arguments)
    options.run(options)
