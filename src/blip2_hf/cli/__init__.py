"""The command `blip2-hf`."""

import argparse
from collections.abc import Sequence

from . import cache_features, capfilt, caption, convert, evaluate, export, index, look, search


COMMANDS = (cache_features, capfilt, caption, convert, evaluate, export, index, look, search)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `run` of what it returns is the function that runs one."""
    parser = argparse.ArgumentParser(prog="blip2-hf", description="BLIP-2 for the Hugging Face stack.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None):
    """
    Runs the command.

    Args:
        arguments (`list[str]`, *optional*):
            What follows the name of the command; `None` takes it from the command line.
    """
    options = make_parser().parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
