"""Files of annotations as benchmarks' authors publish them, and pictures in a folder; errors name file and entry."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..jobs.errors import shorten
from ..jobs.state_files import read_json_lines
from .samples import check_list


_COCO_PICTURE = re.compile(r"COCO_(.+)_\d+\.jpg")


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """Return the object of JSON that a file holds."""
    return _read(path, dict, "an object")


def read_list(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
    """Yield the entries of the list of JSON that a file holds, each with what errors call it."""
    for number, entry in enumerate(_read(path, list, "a list")):
        yield f"{path}, [{number}]", entry


def _read(path: str | os.PathLike, kind: type, expected: str) -> Any:
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_object)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}). Is it complete, and unpacked?") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path}: {expected} was expected, got {type(content).__name__}. Is it the right file?")
    return content


def read_lines(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
    """Yield what the lines of a file hold, each with what errors call it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    advice = "Is it the right file, complete and unpacked?"
    lines = read_json_lines(path, advice, "an object of JSON", lambda line: isinstance(line, Mapping), is_whole=True)
    number = 0
    for number, entry in enumerate(lines, start=1):
        yield f"{path}, entry {number}", entry
    if not number:
        raise ValueError(f"{path} is empty. {advice}")


def paths_of(given: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str | os.PathLike]:
    """Return one path, or several, as a list."""
    return [given] if isinstance(given, (str, os.PathLike)) else list(given)


def coco_places(filename: str) -> Iterable[str]:
    """Return where a picture may lie: one of COCO's in the folder of its part, such as val2014, or as others."""
    part = _COCO_PICTURE.fullmatch(filename)
    return (f"{part[1]}/{filename}", filename) if part else (filename,)


def _object(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, and refuse one in which a name stands twice: its last field would hide the others."""
    content = dict(fields)
    if len(content) < len(fields):
        name = Counter(name for name, _ in fields).most_common(1)[0][0]
        raise ValueError(f"{name!r} stands twice in one object")
    return content


def entries_of(content: Any, name: str, path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a list, each with what errors call it."""
    for number, entry in enumerate(field_of(content, name, path, check_list)):
        yield f"{path}, {name}[{number}]", entry


def field_of(entry: Any, name: str, where: str | os.PathLike, check: Callable[[Any, str], None]) -> Any:
    """Return a field of an entry, and refuse one that is missing, or that does not pass a check."""
    if not isinstance(entry, Mapping) or name not in entry:
        found = sorted(map(str, entry))[:10] if isinstance(entry, Mapping) else shorten(entry)
        raise ValueError(f"{where} has no {name!r}, but {found}. Is it the right file?")
    check(entry[name], f"{where}: {name!r}")
    return entry[name]


class PictureFolder:
    """Finds pictures in a folder, and tells of all that are missing at once."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder} with pictures.")
        self.missing: list[str] = []

    def find(self, *names: str | Path) -> str:
        """Return the path of the first of some names of a picture that is there."""
        for name in names:
            if (self.folder / name).is_file():
                return str(self.folder / name)
        self.missing.append(" or ".join(dict.fromkeys(map(str, names))))
        return ""

    def check(self):
        if self.missing:
            raise FileNotFoundError(
                f"{self.folder} lacks {len(self.missing)} pictures, the first of them {self.missing[0]}. Give the "
                "folder that holds them."
            )
