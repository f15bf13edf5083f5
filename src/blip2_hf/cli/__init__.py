"""The command `blip2-hf`."""

from collections.abc import Sequence

from . import (
    ask,
    cache_features,
    capfilt,
    caption,
    convert,
    demo,
    evaluate,
    export,
    finetune,
    index,
    look,
    pretrain,
    search,
    serve,
)
from ._parser import Parser
from ._version import ShowVersion


COMMANDS = (
    *(ask, cache_features, capfilt, caption, convert, demo, evaluate),
    *(export, finetune, index, look, pretrain, search, serve),
)


def make_parser() -> Parser:
    """Return the parser of all commands; `run` of what it returns is the function that runs one."""
    parser = Parser(prog="blip2-hf", description="BLIP-2 for the Hugging Face stack.")
    parser.add_argument("--version", action=ShowVersion)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None):
    """
    Run the command that `arguments` name; `None` takes them from the command line. The command finds arguments that
    are not its own in `options.rest`, if it sets `takes_rest=True` with `set_defaults`.
    """
    options, _ = make_parser().parse_known_args(arguments)
    options.run(options)
