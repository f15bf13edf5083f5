"""Data sets by the name that a user gives, and images held out of them."""

import os
import random
import re
from pathlib import Path
from typing import Any

import datasets

from .feature_cache import load_cached_features


_BUILDERS = {".tar": "webdataset", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
# What `cache_features` and `Dataset.save_to_disk` leave in a folder
_MARKS = ("cache.json", "dataset_info.json")


def load_rows(
    data: str | os.PathLike, split: str = "train", streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    r"""
    Rows for training: from a file (parquet, json, csv, WebDataset's tar; `*` stands for any characters), a folder that
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
        ValueError: if a split is given of what has no splits.
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
    Splits rows into those to learn from and those of some images that are held out.

    Args:
        rows (`datasets.Dataset`):
            The rows.
        share (`float`):
            Share of the images, or their number if it is 1 or more.
        id_column (`str`, *optional*):
            Column that tells which rows show the same image. `None`: each row is an image of its own.
        seed (`int`, *optional*, defaults to 0):
            Seed of the choice.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: both parts.
    """
    ids: Any = rows[id_column] if id_column else range(len(rows))
    images = sorted(set(ids))
    count = int(share if share >= 1 else share * len(images))
    chosen = set(random.Random(seed).sample(images, count))
    parts: list[list[int]] = [[], []]
    for row, image in enumerate(ids):
        parts[image in chosen].append(row)
    return rows.select(parts[0]), rows.select(parts[1])


__all__ = ["check_held_out", "hold_out", "load_rows"]
