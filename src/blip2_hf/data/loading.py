"""Datasets by the name that a user gives, and images held out of them."""

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
from .rows import ROW_NUMBER, check_id, get_column, read_row_numbers, select_columns


_BUILDERS = {  # of `datasets`, by the ending of a file
    ".arrow": "arrow",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".tar": "webdataset",
}
_ID_TYPES = {"string", "large_string", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}
# What opens the folders that `cache_features` and `Dataset.save_to_disk` write, by a file in them
_FOLDERS = {"cache.json": load_cached_features, "dataset_info.json": datasets.load_from_disk}


def load_rows(
    data: str | os.PathLike, split: str = "train", streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    r"""
    Load rows for training: from a file (parquet, json, csv, arrow, WebDataset's tar; `*` stands for any characters), a
    folder that [`cache_features`] or `Dataset.save_to_disk` wrote, or a dataset of the Hub.

    Args:
        data (`str` or `os.PathLike`):
            Name of the file, the folder or the dataset. The name of a dataset of the Hub, or of another folder, may
            end in a split, or in a configuration and a split: `"me/ds:validation"`, `"me/ds:train[:1000]"`,
            `"me/ds:english:validation"`. A path that exists is always taken as a path.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a dataset whose name ends in none, or a part of files, such as `"train[:1000]"`.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read the rows one after the other.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` with `streaming`.

    Raises:
        ValueError: if a split is given for data without splits, or a file has an unknown ending.
    """
    name, config, split = _read_name(str(data), split)
    path = Path(name)
    for mark, load in _FOLDERS.items():
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
    Refuse to validate on the data to learn from, as far as their names tell.

    Args:
        data (`str` or `os.PathLike`):
            Name of the data to learn from, as in [`load_rows`].
        held_out (`str` or `os.PathLike`, *optional*):
            Names of data to validate or test on.

    Raises:
        ValueError: if both are the same data.
    """
    for other in held_out:
        if other is not None and _same_name(other) == _same_name(data):
            raise ValueError(
                f"{str(other)!r} was given to validate or test on, which is what is learned from, {str(data)!r}. Give "
                "other data. The name of a dataset of the Hub may end in a split, such as me/data:validation."
            )


def _same_name(data: str | os.PathLike) -> tuple[str, str | None, str]:
    """Return a key that is equal for all names of one dataset."""
    name, config, split = _read_name(str(data), "train")
    return os.path.realpath(name) if os.path.exists(name) else name, config, split


def _read_name(data: str, split: str) -> tuple[str, str | None, str]:
    """Split `name:configuration:split`, `name:split` or a name alone into name, configuration and split."""
    # The colon of a protocol has slashes after it
    name, *ends = re.split(r":(?!//)", data, maxsplit=1)
    if not ends or Path(data).exists() or Path(data).suffix in _BUILDERS:
        return data, None, split
    path = Path(name)
    if path.is_file() or path.suffix in _BUILDERS or any((path / mark).exists() for mark in _FOLDERS):
        raise ValueError(
            f"{data!r} has {ends[0]!r} after {name!r}, which has no splits: a dataset of the Hub, or a folder with "
            "files of several splits, was expected. Give the name alone."
        )
    config, _, rest = ends[0].partition(":")
    # A colon in brackets is that of a slice
    return (name, config, rest) if rest and "[" not in config else (name, None, ends[0])


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
    Find the column that tells which picture a row is about, for the `id_column` of [`hold_out`] and
    [`ImageTextPairs`]: `image_id`, the `file_name` of a folder of pictures, or the pictures' own column if it has paths
    or numbers of rows.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`):
            The rows.
        image_column (`str`, *optional*, defaults to `"image"`):
            Column of the pictures.

    Returns:
        `str` or `None`: the column, of integers or strings; `None` if there is none.
    """
    features = rows.features or {}
    for name in ("image_id", "file_name", image_column):
        if isinstance(feature := features.get(name), datasets.Value) and feature.dtype in _ID_TYPES:
            return name
    return None


def _read_ids(rows: datasets.Dataset, column: str) -> list[int | str]:
    selected = select_columns(rows.with_format(None), [column])
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
            f"{count} images are to be held out, but the data have {num_images}, and at least one has to remain to "
            "learn from. Hold out fewer, or give other data to validate on."
        )
    return count


def _with_row_numbers(rows: datasets.Dataset) -> datasets.Dataset:
    if read_row_numbers(rows) is not None:
        return rows
    if ROW_NUMBER in rows.column_names:
        rows = rows.remove_columns(ROW_NUMBER)
    # Adding a column removes the format
    form = rows.format
    columns = [*form["columns"], ROW_NUMBER]
    rows = rows.add_column(ROW_NUMBER, np.arange(len(rows)))
    return rows.with_format(form["type"], columns, form["output_all_columns"], **form["format_kwargs"])


__all__ = ["check_held_out", "find_id_column", "hold_out", "load_rows"]
