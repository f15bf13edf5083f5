"""Files that are never there in part, and their names in messages."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_file(path: Path, write: Callable[[BinaryIO], Any]):
    """Writes a file whole: under another name first, and on to the disk."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: Any, indent: int | None = None):
    """Writes JSON in ASCII; names of files that are not Unicode survive it."""
    write_file(path, lambda file: file.write(json.dumps(content, indent=indent).encode()))


def printable(text: str) -> str:
    """A text with names of files in it that need not be Unicode."""
    return text.encode("utf-8", "backslashreplace").decode()
