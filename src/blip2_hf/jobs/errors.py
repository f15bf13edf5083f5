"""Errors of jobs. Each message says what was given, what was expected and what to do."""

import contextlib
import difflib
import errno
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from safetensors import SafetensorError


_FULL = (errno.ENOSPC, errno.EDQUOT)
_LONGEST_VALUE = 80  # characters of a value that a message shows
SIMILAR = 0.7  # share of two names that is equal, from which one may be meant by the other
_LONGEST_SENTENCE = 160  # characters of another's message in ours


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


def did_you_mean(given: str, known: Iterable[str], form: str = "{}") -> str:
    """Return the end of a message about a name that is not known: the most similar one in a form, if there is one."""
    names = {name.lstrip("-"): name for name in known}  # the hyphens of options are no likeness
    found = difflib.get_close_matches(given.lstrip("-"), names, n=1, cutoff=SIMILAR)
    return f" Did you mean {form.format(names[found[0]])}?" if found else ""


@contextlib.contextmanager
def tell_errors(name: str) -> Iterator[None]:
    r"""
    Tell an error that users can mend in a line, in place of a traceback, and end with the exit code 1, or 130 after
    Ctrl-C. Scripts wrap their `main` in it.

    Args:
        name (`str`):
            Name of the program, with which the line begins.
    """
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(f"{name}: {printable(describe(error))}") from error
    except SafetensorError as error:
        raise SystemExit(f"{name}: a file of weights can't be read or written ({first_sentence(error)}).") from error
    except RuntimeError as error:
        if (text := _explain(error)) is None:
            raise
        raise SystemExit(f"{name}: {text}") from error
    except KeyboardInterrupt:
        print(f"{name}: stopped.", file=sys.stderr)
        raise SystemExit(130) from None


def _explain(error: RuntimeError) -> str | None:
    """Return what users can do about an error of torch, `None` if nothing."""
    from accelerate.utils.memory import should_reduce_batch_size

    if should_reduce_batch_size(error):
        return (
            "memory ran out. Make batches smaller, load the model in another dtype such as bfloat16, or take a device "
            "with more memory."
        )
    if "inline_container" in str(error) or "PytorchStreamWriter" in str(error):
        return f"a file can't be written whole ({first_sentence(error)}). Is the disk full?"
    return None


def describe(error: Exception) -> str:
    """Return what an error says: of one of the system the file first, and then what is the matter with it."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    advice = " Make room on the disk, or give an output on another one." if error.errno in _FULL else ""
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}.{advice}"
    return f"a file can't be read or written ({error.strerror}).{advice}"


def first_sentence(error: Exception) -> str:
    """Return how a long message of a library begins, without the full stop."""
    text = str(error).strip() or type(error).__name__
    return re.split(r"\n|\.(?=\s|$)", text, maxsplit=1)[0][:_LONGEST_SENTENCE]
