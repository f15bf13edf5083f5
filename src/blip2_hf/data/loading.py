"""Data sets by the name that a user gives, and images held out of them."""

import math
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from .feature_cache import load_cached_features
from .rows import ROW_NUMBER, check_id, get_column, select_columns


_BUILDERS = {  # of `datasets`, by the ending of a file
    **{f".{name}": name for name in ("arrow", "csv", "json", "parquet")},
    ".jsonl": "json",
    ".tar": "webdataset",
}
# What `cache_features` and `Dataset.save_to_disk` leave in a folder
_MARKS = ("cache.json", "dataset_info.json")


def load_rows(
    data: str | os.PathLike, split: str = "train", streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    r"""
    Load rows: from a file (parquet, json, csv, arrow, WebDataset's tar; `*` stands for any characters), a folder that
    [`cache_features`] or `Dataset.save_to_disk` wrote, or a data set of the Hub.

    Args:
        data (`str` or `os.PathLike`):
            Its name. That of a data set of the Hub, or of another folder, may have a split behind it, or a
            configuration and a split: `"me/ds:validation"`, `"me/ds:train[:1000]"`, `"me/ds:english:validation"`. A
            path that exists is that path.
        split (`str`, *optional*, defaults to `"train"`):
            Of a data set whose name has none behind it; of files a part, such as `"train[:1000]"`.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether the rows are read one after the other.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` with `streaming`.

    Raises:
        ValueError: if a split is given of what has no splits, or a file has another ending.
    """
    name, config, split = _read_name(str(data), split)
    path = Path(name)
    for mark, load in (("cache.json", load_cached_features), ("dataset_info.json", datasets.load_from_disk)):
        if (path / mark).exists():
            if split != "train":
                raise ValueError(f"{name} has no splits, but {split!r} was asked for. Give the name alone.")
            rows = load(path)
            return rows.to_iterable_dataset() if streaming else rows
    builder = _BUILDERS.get(path.suffix)
    if builder is None:
        if path.is_file():
            raise ValueError(f"{name}: a file with one of the endings {', '.join(_BUILDERS)} was expected.")
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    return datasets.load_dataset(builder, data_files=name, split=split, streaming=streaming)


def check_held_out(data: str | os.PathLike, *held_out: str | os.PathLike | None):
    r"""
    Whether data to validate on are others than those to learn from, as far as their names tell.

    Args:
        data (`str` or `os.PathLike`):
            What is learned from, as [`load_rows`] takes it.
        held_out (`str` or `os.PathLike`, *optional*):
            What is not.

    Raises:
        ValueError: if a name means the very same data.
    """
    for other in held_out:
        if other is not None and _same_name(other) == _same_name(data):
            raise ValueError(
                f"{str(other)!r} was given to validate or test on, which is what is learned from, {str(data)!r}. Give "
                "other data; a split of a data set of the Hub stands behind its name, such as me/data:validation."
            )


def _same_name(data: str | os.PathLike) -> tuple[str, str | None, str]:
    """What is equal for all names of one data set."""
    name, config, split = _read_name(str(data), "train")
    return os.path.realpath(name) if os.path.exists(name) else name, config, split


def _read_name(data: str, split: str) -> tuple[str, str | None, str]:
    """Name, configuration and split of a data set: `name:configuration:split`, `name:split` or the name alone."""
    # The colon of a protocol has slashes behind it
    name, *ends = re.split(r":(?!//)", data, maxsplit=1)
    if not ends or Path(data).exists() or Path(data).suffix in _BUILDERS:
        return data, None, split
    path = Path(name)
    if path.is_file() or path.suffix in _BUILDERS or any((path / mark).exists() for mark in _MARKS):
        raise ValueError(
            f"{data!r} has {ends[0]!r} behind {name!r}, which has no splits: a data set of the Hub, or a folder of "
            "files of several splits, was expected. Give the name alone."
        )
    config, _, rest = ends[0].partition(":")
    # A colon in brackets is that of a slice
    return (name, config, rest) if rest and "[" not in config else (name, None, ends[0])


def hold_out(
    rows: datasets.Dataset, share: float, id_column: str | None = None, seed: int = 0
) -> tuple[datasets.Dataset, datasets.Dataset]:
    r"""
    Split rows into those to learn from and those of some images that are held out. Both parts have a column `__row__`
    with the numbers of their rows in `rows`, by which [`ImageTextPairs`] names them.

    Args:
        rows (`datasets.Dataset`):
            The rows. `datasets` writes them anew if they were selected or shuffled before.
        share (`float`):
            Share of the images, or their number if it is 1 or more.
        id_column (`str`, *optional*):
            Column that tells which rows show the same image: integers or strings. `None`: each row is an image of its
            own.
        seed (`int`, *optional*, defaults to 0):
            Seed of the choice.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: both parts.

    Raises:
        ValueError: if `share` is neither a share nor a number of images, or leaves none to learn from, or a row has no
            id, or one that is neither an integer nor a string.
    """
    # Ids tell nothing if no image is held out
    ids: Sequence[Any] = range(len(rows)) if id_column is None or share == 0 else _read_ids(rows, id_column)
    images = sorted(set(ids))
    count = _count_held_out(share, len(images))
    chosen = set(random.Random(seed).sample(images, count))
    parts: list[list[int]] = [[], []]
    for row, image in enumerate(ids):
        parts[image in chosen].append(row)
    rows = _with_row_numbers(rows)
    return rows.select(parts[0]), rows.select(parts[1])


def _read_ids(rows: datasets.Dataset, column: str) -> list[int | str]:
    selected = select_columns(rows.with_format(None), [column], None)
    (name,) = selected.column_names
    values = [get_column({name: value}, column) for value in selected[:][name]]
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
            f"{count} images are to be held out, but the data have {num_images}, and one at least is to be learned "
            "from. Hold out fewer, or give other data to validate on."
        )
    return count


def _with_row_numbers(rows: datasets.Dataset) -> datasets.Dataset:
    if ROW_NUMBER in rows.column_names:
        numbers = rows.with_format(None).select_columns(ROW_NUMBER)[:][ROW_NUMBER]
        if len(set(numbers)) == len(numbers):
            return rows
        # Parts of several data sets that were put together
        rows = rows.remove_columns(ROW_NUMBER)
    # A column that is added takes the format away
    form = rows.format
    columns = [*form["columns"], ROW_NUMBER]
    rows = rows.add_column(ROW_NUMBER, np.arange(len(rows)))
    return rows.with_format(form["type"], columns, form["output_all_columns"], **form["format_kwargs"])


__all__ = ["check_held_out", "hold_out", "load_rows"]
