"""A parser of arguments that tells mistakes in a line, and guesses what was meant."""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..jobs.errors import did_you_mean


# Columns of captions are columns of texts in some commands
_OTHER_NAMES = {"--caption-column": "--text-column", "--text-column": "--caption-column"}


def number(kind: type, least: float | None = None, most: float | None = None, above: float | None = None) -> Callable:
    """Return a function that parses an `int` or a `float` within bounds."""
    bounds = [f"at least {least}"] if least is not None else []
    bounds += [f"more than {above}"] if above is not None else []
    bounds += [f"at most {most}"] if most is not None else []
    name = "a whole number" if kind is int else "a number"
    expected = " ".join([name, *([] if not bounds else ["of", " and ".join(bounds)])])

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        # Not a number is within no bounds
        is_within = (least is None or value >= least) and (above is None or value > above)
        if value != value or not is_within or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text!r} was given, {expected} was expected")
        return value

    return parse


positive = number(int, least=1)
at_least_zero = number(int, least=0)
probability = number(float, above=0, most=1)
above_zero = number(float, above=0)
seed = number(int, least=0, most=2**32 - 1)  # NumPy takes no other


def share_or_number(text: str) -> float:
    """Parse a share below 1, or a whole number."""
    value = number(float, least=0)(text)
    if value >= 1 and not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} was given, a share below 1 or a whole number was expected")
    return value


def repository(text: str) -> str:
    """Return the id of a repository on the Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} was given, a repository on the Hub such as me/captioner was expected"
        ) from error
    return text


def training_device(text: str) -> str:
    """Refuse devices that `Trainer` does not choose: it takes the GPUs that it sees."""
    if text != "cpu":
        raise argparse.ArgumentTypeError(
            f"{text!r} was given, and only cpu can be: a training takes the GPU that it sees. Leave --device out, or "
            "choose a GPU by CUDA_VISIBLE_DEVICES"
        )
    return text


def to_write(text: str) -> str:
    """Return the name of a file or a folder that can be written: nothing is in its way, and the disk takes files."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name was given")
    path = Path(text)
    folder = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if folder.is_file() and folder != path:
        raise argparse.ArgumentTypeError(f"{text} can't be written, because {folder} is a file and no folder")
    try:
        tempfile.TemporaryFile(dir=folder if folder.is_dir() else folder.parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} can't be written ({error.strerror}): give another place") from error
    return text


def folder_to_write(text: str) -> str:
    """Return the name of a folder that can be written."""
    if Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} is a file, and a folder was expected")
    return to_write(text)


def file_to_write(text: str) -> str:
    """Return the name of a file that can be written."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder, and a file was expected")
    return to_write(text)


class Parser(argparse.ArgumentParser):
    r"""
    Parser of a command. Options may be written with underscores in place of hyphens, but not cut short.

    Args:
        example (`str`, *optional*):
            Line for the end of the help.
        group_titles (`Sequence[str]`, *optional*):
            Titles of the groups that options are in, in the order of the help.
        kwargs:
            Arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, *args, example: str | None = None, group_titles: Sequence[str] = (), **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.example = example
        self.groups = {title: self.add_argument_group(title) for title in group_titles}

    def format_help(self) -> str:
        # Not argparse's epilog, which is broken into lines
        return super().format_help() + (f"\nexample:\n  {self.example}\n" if self.example else "")

    def parse_known_args(self, args=None, namespace=None):
        """Parse arguments. What is not known is an error, unless the command sets `takes_rest`."""
        if args is not None and self._subparsers is None:
            args = self._correct(list(args))
        options, rest = super().parse_known_args(args, namespace)
        if rest and not getattr(options, "takes_rest", False):
            self.error(f"{rest[0]!r} was given, and nothing like it is expected.")
        options.rest = rest
        return options, rest

    def _correct(self, args: list[str]) -> list[str]:
        """Write options as they are called here, and refuse those that are not known."""
        end = args.index("--") if "--" in args else len(args)
        for position, arg in enumerate(args[:end]):
            name, sign, value = arg.partition("=")
            if not name.startswith("--") or " " in name or name in self._option_string_actions:
                continue
            hyphenated = name.replace("_", "-")
            if hyphenated not in self._option_string_actions:
                hyphenated = _OTHER_NAMES.get(hyphenated, hyphenated)
            if hyphenated in self._option_string_actions:
                args[position] = hyphenated + sign + value
            elif not self.get_default("takes_rest"):
                self.error(f"there is no option {name}.{did_you_mean(hyphenated, self._option_string_actions)}")
        return args

    def _check_value(self, action: argparse.Action, value: Any):
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            message = f"{value!r} was given, one of {', '.join(known)} was expected."
            raise argparse.ArgumentError(action, message + did_you_mean(str(value), known))

    def error(self, message: str) -> NoReturn:
        """Tell a mistake in a line, without the usage, and exit with 2."""
        sentence = message if message.endswith((".", "?")) else f"{message}."
        self.exit(2, f"{self.prog}: {sentence} See {self.prog} --help.\n")
