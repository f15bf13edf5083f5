"""Images held out of a dataset."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from ..jobs.fingerprints import fingerprint
from .feature_cache import EMBEDS
from .rows import (
    PICTURE_ID,
    ROW_NUMBER,
    check_id,
    column_names,
    get_column,
    picture_bytes,
    read_row_numbers,
    select_columns,
)


_ID_TYPES = {"string", "large_string", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}


def hold_out(
    rows: datasets.Dataset, share: float, id_column: str | None = None, seed: int = 0
) -> tuple[datasets.Dataset, datasets.Dataset]:
    r"""
    Split rows into those to learn from and those of some held-out images. Both parts have a column `__row__` with the
    numbers of their rows in `rows`, by which [`ImageTextPairs`] names them.

    Args:
        rows (`datasets.Dataset`):
            The rows. `datasets` writes them anew if they were selected or shuffled before.
        share (`float`):
            Share of the images, or their number if it is 1 or more.
        id_column (`str`, *optional*):
            Column of integers or strings that are equal for rows of the same image. `None`: each row has an image of
            its own.
        seed (`int`, *optional*, defaults to 0):
            Seed of the choice.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: both parts.

    Raises:
        ValueError: if `share` is neither a share nor a number of images, or leaves none to learn from, or a row has no
            id, or an id that is neither an integer nor a string.
    """
    # Ids are not needed if no image is held out
    ids: Sequence[Any] = range(len(rows)) if id_column is None or share == 0 else _read_ids(rows, id_column)
    images = sorted(set(ids))
    count = _count_held_out(share, len(images))
    chosen = set(random.Random(seed).sample(images, count))
    parts: list[list[int]] = [[], []]
    for row, image in enumerate(ids):
        parts[image in chosen].append(row)
    rows = _with_row_numbers(rows)
    return rows.select(parts[0]), rows.select(parts[1])


def find_id_column(rows: datasets.Dataset | datasets.IterableDataset, image_column: str = "image") -> str | None:
    r"""
    Find the column that tells which picture a row is about: `image_id`, the `file_name` of a folder of pictures,
    `__picture__` of [`with_picture_ids`], or the pictures' own column if it has paths or numbers of rows. [`hold_out`]
    and [`ImageTextPairs`] take it as their `id_column`.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`):
            The rows.
        image_column (`str`, *optional*, defaults to `"image"`):
            Column of the pictures.

    Returns:
        `str` or `None`: the column, of integers or strings; `None` if there is none.
    """
    features = rows.features or {}
    for name in ("image_id", "file_name", PICTURE_ID, image_column):
        if isinstance(feature := features.get(name), datasets.Value) and feature.dtype in _ID_TYPES:
            return name
    return None


def with_picture_ids(rows: datasets.Dataset, image_column: str = "image") -> datasets.Dataset:
    r"""
    Add a column `__picture__` of hashes that are equal for rows of the same picture: of the bytes of an embedded
    picture, of the name and the beginning of a file. All embedded pictures are read.

    Args:
        rows (`datasets.Dataset`):
            The rows. `datasets` writes them anew if they were selected or shuffled before.
        image_column (`str`, *optional*, defaults to `"image"`):
            Column of the pictures.

    Returns:
        `datasets.Dataset`: the rows, as they are if they have the column already, or no column of pictures.
    """
    names = column_names(rows) or []
    is_there = image_column in names or image_column.partition(".")[0] in names
    if not isinstance(rows, datasets.Dataset) or not is_there or PICTURE_ID in names or EMBEDS in names:
        return rows
    pictures = select_columns(rows.with_format(None), [image_column])
    ids = [_picture_id(get_column(row, image_column), number) for number, row in enumerate(pictures)]
    return _with_column(rows, PICTURE_ID, ids)


def _picture_id(value: Any, number: int) -> str:
    has_none = value is None or (isinstance(value, Mapping) and value.get("bytes") is value.get("path") is None)
    # Rows without a picture are not about the same one
    return f"row {number}" if has_none else fingerprint([picture_bytes(value)])


def count_pictures(rows: datasets.Dataset, id_column: str | None) -> int:
    """Return the number of pictures of rows, by the column of their ids: that of the rows if there is none."""
    return len(rows) if id_column is None else len(set(map(repr, _read_column(rows, id_column))))


def _read_column(rows: datasets.Dataset, column: str) -> list[Any]:
    selected = select_columns(rows.with_format(None), [column])
    (name,) = selected.column_names
    return [get_column({name: value}, column) for value in selected[:][name]]


def _read_ids(rows: datasets.Dataset, column: str) -> list[int | str]:
    values = _read_column(rows, column)
    if missing := [number for number, value in enumerate(values) if value is None]:
        raise ValueError(
            f"{len(missing):,} rows, the first of which is row {missing[0]}, have no id in column {column!r}. They "
            "could show images that are held out. Give each of them an id, or leave them out of the data."
        )
    return [check_id(value, f"Row {number}", column) for number, value in enumerate(values)]


def _count_held_out(share: float, num_images: int) -> int:
    if not 0 <= share < math.inf or (share >= 1 and share != int(share)):
        raise ValueError(
            f"{share} of the images are to be held out; a share below 1, or a whole number, was expected."
        )
    count = int(share if share >= 1 else share * num_images)
    if count and count >= num_images:
        raise ValueError(
            f"{count} images are to be held out, but the data have {num_images}, and at least one has to remain to "
            "learn from. Hold out fewer, or give other data to validate on."
        )
    return count


def _with_row_numbers(rows: datasets.Dataset) -> datasets.Dataset:
    if read_row_numbers(rows) is not None:
        return rows
    if ROW_NUMBER in rows.column_names:
        rows = rows.remove_columns(ROW_NUMBER)
    return _with_column(rows, ROW_NUMBER, np.arange(len(rows)))


def _with_column(rows: datasets.Dataset, name: str, values: Any) -> datasets.Dataset:
    # Adding a column removes the format
    form = rows.format
    columns = [*form["columns"], name]
    rows = rows.add_column(name, values)
    return rows.with_format(form["type"], columns, form["output_all_columns"], **form["format_kwargs"])


__all__ = ["find_id_column", "hold_out", "with_picture_ids"]
