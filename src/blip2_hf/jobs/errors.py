"""Errors of jobs. Each message says what was given, what was expected and what to do."""

from typing import Any


_LONGEST_VALUE = 80  # characters of a value that a message shows


class CollectionError(ValueError):
    """A collection of pictures, or an output, that does not fit."""


class MadeOtherwiseError(CollectionError):
    """Results that other settings made than those that are given."""


class OutputInUseError(CollectionError):
    """An output that another run is writing to."""


class OutputLostError(OSError):
    """Results that were written and are not there any more."""


class StateFileError(ValueError):
    """A file in which an earlier run says what it has done, and which can't be read."""


def printable(text: str) -> str:
    """Return a text that can be printed, also if names of files in it are not Unicode."""
    return text.encode("utf-8", "backslashreplace").decode()


def shorten(value: Any) -> str:
    """Return what a message shows of a value: of a long one its beginning and its end, by which paths differ."""
    shown = repr(value)
    half = _LONGEST_VALUE // 2
    return shown if len(shown) <= _LONGEST_VALUE else f"{shown[:half]}...{shown[-half:]}"
