"""Data sets by the name that a user gives, and images held out of them."""

import os
import random
from pathlib import Path
from typing import Any

import datasets

from .feature_cache import load_cached_features


_BUILDERS = {".tar": "webdataset", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_rows(
    data: str | os.PathLike, split: str = "train", streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    r"""
    Rows for training: from a file (parquet, json, csv, WebDataset's tar; `*` stands for any characters), a folder that
    [`cache_features`] or `Dataset.save_to_disk` wrote, or a data set of the Hub.

    Args:
        data (`str` or `os.PathLike`):
            Its name.
        split (`str`, *optional*, defaults to `"train"`):
            Of a data set of the Hub.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether the rows are read one after the other.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` with `streaming`.
    """
    path = Path(data)
    if (path / "cache.json").exists():
        rows = load_cached_features(path)
        return rows.to_iterable_dataset() if streaming else rows
    if (path / "dataset_info.json").exists():
        rows = datasets.load_from_disk(path)
        return rows.to_iterable_dataset() if streaming else rows
    builder = _BUILDERS.get(path.suffix)
    if builder is None:
        return datasets.load_dataset(str(data), split=split, streaming=streaming)
    return datasets.load_dataset(builder, data_files=str(data), split="train", streaming=streaming)


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


__all__ = ["hold_out", "load_rows"]
