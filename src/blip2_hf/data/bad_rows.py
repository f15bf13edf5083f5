"""Rows that can't be used for training: errors that name them, a check before training, a report."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from PIL import Image
from transformers.utils import logging

from ..jobs.atomic_files import atomic_file
from ..jobs.errors import printable
from ..jobs.state_files import json_line
from ..models.image_loading import ImageLoadError
from .rows import open_frames, open_image


if TYPE_CHECKING:
    from .pairs import ImageTextPairs


PICTURE_MISSING = "picture missing"
PICTURE_UNREADABLE = "picture unreadable"
TEXT_MISSING = "text missing"
TEXT_EMPTY = "text empty"
TEXT_UNREADABLE = "text unreadable"
TEXT_TOO_LONG = "text too long"
ID_MISSING = "id missing"
NOTHING_TO_LEARN = "nothing to learn"

_LONGEST_PATH = 256  # characters; a longer string is a picture in base64
_SHOWN = 5  # rows that a report tells of


class RowName(str):
    """
    The name of a row in messages, such as `row 17 of coco (dogs/17.jpg)`: its number in the dataset `source`, and the
    file from which it comes.
    """

    number: int
    file: str | None
    source: str | None

    def __new__(cls, number: int, file: str | None = None, source: str | None = None):
        of_source = "" if source is None else f" of {source}"
        name = super().__new__(cls, f"row {number}{of_source}" + ("" if file is None else f" ({file})"))
        name.number, name.file, name.source = number, file, source
        return name

    def __getnewargs__(self) -> tuple:
        return self.number, self.file, self.source

    @property
    def at_start(self) -> str:
        """Return the name at the start of a sentence; `capitalize` would change the file."""
        return f"R{self[1:]}"


class BadRowError(ValueError):
    r"""
    A row that can't be used for training. The message names the row and its file, what it has and what was expected.

    Args:
        message (`str`):
            The message.
        name (`str`, *optional*):
            The `row` of an item.
        kind (`str`, *optional*, defaults to `"other"`):
            `"picture missing"`, `"picture unreadable"`, `"text missing"`, `"text empty"`, `"text unreadable"`,
            `"text too long"`, `"id missing"` or `"nothing to learn"`.

    Attributes:
        row (`int`, *optional*):
            Number of the row. A worker of a `DataLoader` passes on none of these attributes.
        file (`str`, *optional*):
            Path or address of the picture, or shard and key of a row of WebDataset.
        kind (`str`):
            The given kind.
    """

    # All but the message are optional, because a DataLoader makes the error of a worker again from it alone
    def __init__(self, message: str, name: str | None = None, kind: str = "other"):
        super().__init__(message)
        self.row: int | None = getattr(name, "number", None)
        self.file: str | None = getattr(name, "file", None)
        self.kind = kind


class BadPictureError(BadRowError, ImageLoadError):
    """A [`BadRowError`] of a picture, for those who expect an [`~image_loading.ImageLoadError`]."""


@dataclass
class BadRow:
    r"""
    A row that [`check_pairs`] has found.

    Args:
        row (`int`):
            Number of the row in the dataset.
        file (`str`, *optional*):
            Path or address of the picture, or shard and key of a row of WebDataset.
        reason (`str`):
            The message of the [`BadRowError`].
        kind (`str`):
            Its kind.
    """

    row: int
    file: str | None
    reason: str
    kind: str


def check_pairs(pairs: "ImageTextPairs", collator: Callable | None = None, show_progress: bool = True) -> list[BadRow]:
    r"""
    Read every row once, to find those at which training would stop. Lengths are those of the text, and of the split,
    that the current epoch draws.

    Args:
        pairs ([`ImageTextPairs`]):
            The rows.
        collator (`Callable`, *optional*):
            Called with each row alone. [`LanguageModelCollator`] finds texts that are too long, or that are cut until
            nothing is left to learn.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `list[BadRow]`: the bad rows, for [`report_bad_rows`] and [`ImageTextPairs.without`]; empty if there are none.

    Example:

    ```python
    >>> bad = check_pairs(pairs, collator)
    >>> print(report_bad_rows(bad, "bad_rows.jsonl"))
    >>> pairs = pairs.without(bad)
    ```"""
    bad = []
    for index in logging.tqdm(range(len(pairs)), desc="Rows", unit="row", disable=not show_progress):
        try:
            item = pairs[index]
            if collator is not None:
                collator([item])
        except BadRowError as error:
            bad.append(BadRow(pairs.row_number(index), error.file, str(error), error.kind))
    return bad


def report_bad_rows(bad: Sequence[BadRow], path: str | os.PathLike | None = None) -> str:
    r"""
    Say how many rows of which kind are bad, and why the first few are.

    Args:
        bad (`list[BadRow]`):
            The bad rows, from [`check_pairs`].
        path (`str` or `os.PathLike`, *optional*):
            File for all of them, with one JSON object (`row`, `file`, `reason`, `kind`) in each line.

    Returns:
        `str`: the report.
    """
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.writelines(json_line(asdict(row)) for row in bad)
    if not bad:
        return "No bad rows."
    lines = [f"{len(bad):,} bad {'row' if len(bad) == 1 else 'rows'}: {count_kinds(Counter(r.kind for r in bad))}."]
    lines += [f"  {row.reason}" for row in bad[:_SHOWN]]
    if len(bad) > _SHOWN:
        lines.append(f"  ... and {len(bad) - _SHOWN:,} more" + ("." if path is None else f", all of them in {path}."))
    return "\n".join(lines)


def leave_out_bad_rows(
    pairs: "ImageTextPairs", collator: Callable | None = None, path: str | os.PathLike | None = None
) -> "ImageTextPairs":
    r"""
    Leave out the rows that [`check_pairs`] finds, and print [`report_bad_rows`] in the first process.

    Args:
        pairs ([`ImageTextPairs`]):
            The rows.
        collator (`Callable`, *optional*):
            The collator of their batches.
        path (`str` or `os.PathLike`, *optional*):
            File for the list of bad rows.

    Returns:
        [`ImageTextPairs`]: the rows that are not bad.
    """
    is_first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    bad = check_pairs(pairs, collator, show_progress=is_first)
    if is_first:
        print(report_bad_rows(bad, path))
    return pairs.without(bad)


def count_kinds(counts: Counter) -> str:
    """Return a text such as `3 text empty, 1 picture missing`."""
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common())


def open_row_picture(
    value: Any,
    name: RowName,
    column: str,
    allow_urls: bool | Sequence[str] = False,
    num_frames: int | None = None,
) -> Any:
    """
    Open the picture that a row has in a column or, with `num_frames`, the frames of its video. A [`BadPictureError`]
    names the row and the file.
    """
    is_record = isinstance(value, Mapping)
    if value is None or (is_record and value.get("bytes") is None and value.get("path") is None):
        raise BadPictureError(f"{name.at_start} has no picture in column {column!r}.", name, PICTURE_MISSING)
    try:
        row = RowName(name.number, source=name.source)
        if num_frames is not None:
            return open_frames(value, row, num_frames, allow_urls)
        return open_image(value, row, allow_urls)
    except ImageLoadError as error:
        message = str(error)
        if name.file is not None and repr(name.file) not in message:
            message = f"{name.file}: {message}"
        raise BadPictureError(message, name, PICTURE_UNREADABLE) from error


def find_file(row: Mapping, picture: Any) -> str | None:
    """Return where a row comes from: shard and key of WebDataset, or path or address of its picture, if known."""
    if row.get("__key__") is not None:
        return printable("::".join(str(row[name]) for name in ("__url__", "__key__") if row.get(name) is not None))
    if isinstance(picture, Image.Image):
        picture = getattr(picture, "filename", None)
    elif isinstance(picture, Mapping):
        picture = picture.get("path")
    if not isinstance(picture, (str, os.PathLike)):
        return None
    path = str(picture)
    return printable(path) if 0 < len(path) <= _LONGEST_PATH and not path.startswith("data:") else None
