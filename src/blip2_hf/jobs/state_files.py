"""Reading what an earlier run wrote: JSON, lines of JSON that a process was killed over, and other formats."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .atomic_files import named_in_errors
from .errors import StateFileError, shorten


def read_json(path: str | os.PathLike, advice: str, keys: Sequence[str] = ()) -> dict[str, Any]:
    """
    Read a file with one object, which has `keys`. A [`StateFileError`] names the file, and says what to do: `advice`,
    a sentence.
    """
    expected = f"an object of JSON with {', '.join(keys)}" if keys else "an object of JSON"
    return _parse(
        Path(path).read_bytes(), str(path), advice, expected, lambda x: isinstance(x, dict) and x.keys() >= set(keys)
    )


def read_json_lines(
    path: str | os.PathLike, advice: str, expected: str, fits: Callable[[Any], bool], is_whole: bool = False
) -> Iterator[Any]:
    """
    Yield what the lines of a file of JSON hold, each of which `fits`. A last line without its end, which a process
    that was killed leaves, is no line. With `is_whole` it is one, because people write such files, and empty lines are
    none. A [`StateFileError`] names the file and the line, and says what was `expected` and what to do: `advice`, a
    sentence.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip() if is_whole else line.endswith(b"\n"):
                yield _parse(line, f"{path}, line {number}", advice, expected, fits)


def read_whole(path: str | os.PathLike, read: Callable[[Path], Any], advice: str) -> Any:
    """
    Return what `read`, such as `numpy.load`, makes of a file. A [`StateFileError`] names the file, and says what to
    do: `advice`, a sentence.
    """
    try:
        return read(Path(path))
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # each format has errors of its own
        raise StateFileError(f"{path} can't be read ({error}): it was cut off or changed. {advice}") from error


@contextlib.contextmanager
def appended_lines(path: str | os.PathLike) -> Iterator[Callable[[Any], None]]:
    """
    Open a file of lines, which is made if it is not there, and yield a function that adds a line. The line is out of
    this process then, and stays if the process is killed. What such a process has left of a line is removed first. The
    error of a full disk names the file.
    """

    def add(record: Any):
        file.write(json_line(record))
        file.flush()

    with named_in_errors(Path(path)), open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        yield add


def json_line(record: Any) -> bytes:
    """Return a line for [`read_json_lines`]. It is ASCII, which names of files that are not Unicode survive."""
    return json.dumps(record).encode() + b"\n"


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as they are read from a file: tuples as lists, keys as strings."""
    return json.loads(json.dumps(settings))


def _parse(data: bytes, place: str, advice: str, expected: str, fits: Callable[[Any], bool]) -> Any:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise StateFileError(
            f"{place} can't be read as JSON ({len(data)} bytes; {error}): it was cut off or changed. {advice}"
        ) from error
    if not fits(found):
        raise StateFileError(f"{place}: {expected} was expected, got {shorten(found)}. {advice}")
    return found
