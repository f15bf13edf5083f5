"""Datasets by the name that a user gives, and images held out of them."""

import glob
import math
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..jobs.picture_files import find_picture_files
from .feature_cache import load_cached_features
from .folders import find_picture_names, has_metadata, load_picture_folder
from .picture_paths import find_pictures
from .rows import ROW_NUMBER, check_id, get_column, read_row_numbers, select_columns
from .shards import find_shards, load_shards
from .splits import split_by_folder
from .tables import ENDINGS, errors_that_name, find_annotated_splits, load_tables, table_ending


_ID_TYPES = {"string", "large_string", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}
# What opens the folders that `cache_features` and `Dataset.save_to_disk` write, by a file in them
_FOLDERS = {"cache.json": load_cached_features, "dataset_info.json": datasets.load_from_disk}
_SHARDS_OF_THE_HUB = "data/*-*-of-*.parquet"  # as `push_to_hub` and CapFilt name them


def load_rows(
    data: str | os.PathLike,
    split: str | None = None,
    streaming: bool = False,
    *,
    config: str | None = None,
    image_column: str | None = None,
    image_root: str | os.PathLike | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    r"""
    Load rows from a folder of pictures, a file, a folder of files, a folder that [`cache_features`] or
    `Dataset.save_to_disk` wrote, or a dataset of the Hub.

    The rows of a folder of pictures have the columns `image` and `file_name`, the path inside the folder, and those of
    its files `metadata.jsonl`, `.csv` or `.parquet`, in which `file_name` is the path from the folder of that file. If
    there is no text in them, the texts of `.txt` or `.caption` files beside the pictures are the column `caption`. If
    all pictures lie in the folders `train`, `validation` (or `valid`, `val`, `dev`) and `test`, these are splits.

    A file may be a table (`.parquet`, `.json`, `.jsonl`, `.csv`, `.tsv`, `.arrow`), WebDataset's `.tar`, COCO's or
    Karpathy's captions, or Flickr8k's `captions.txt`. `*` stands for any characters. A relative path of a picture
    starts from the folder of the file that names it or, if it is not there, from `image_root`.

    Args:
        data (`str` or `os.PathLike`):
            Name of the folder, the file or the dataset. The name of a dataset of the Hub, or of a folder with splits,
            may end in a split, or in a configuration and a split: `"me/ds:validation"`, `"me/ds:train[:1000]"`,
            `"me/ds:english:validation"`. A path that exists is always taken as a path.
        split (`str`, *optional*):
            Split of data whose name ends in none, or a part of it, such as `"train[:1000]"`; by default `"train"`.
            Data without splits are called `"train"`.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read the rows one after the other.
        config (`str`, *optional*):
            Configuration of a dataset of the Hub, or of a folder of files.
        image_column (`str`, *optional*):
            Column of the pictures, in which relative paths are looked for; by default `"image"`.
        image_root (`str` or `os.PathLike`, *optional*):
            Folder from which relative paths of pictures start.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` with `streaming`.

    Raises:
        ValueError: if a file has an unknown ending or is broken, if a folder has neither pictures nor files with rows,
            if pictures are not where paths lead, or if an argument has no use for the data.
        FileNotFoundError: if there is no such file or folder.
    """
    name, own_config, own_split = _read_name(str(data))
    if split is not None and own_split is not None:
        raise ValueError(f"The split {split!r} was given, but the name {str(data)!r} ends in {own_split!r}. Give one.")
    if config is not None and own_config is not None:
        raise ValueError(f"The configuration {config!r} was given, but the name is {str(data)!r}. Give one.")
    config, split = config or own_config, split or own_split or "train"
    path = Path(name)
    if path.is_dir():
        return _load_folder(path, config, split, streaming, image_column, image_root)
    if not _is_hub_name(name):
        if config is not None:
            raise ValueError(f"The configuration {config!r} was given, but {name} has none. Leave it out.")
        return load_tables(name, split, streaming, image_column or "image", image_root)
    rows = datasets.load_dataset(name, config, split=split, streaming=streaming)
    return rows if image_root is None else find_pictures(rows, image_column or "image", None, image_root, name)


def _load_folder(
    path: Path,
    config: str | None,
    split: str,
    streaming: bool,
    image_column: str | None,
    image_root: str | os.PathLike | None,
) -> datasets.Dataset | datasets.IterableDataset:
    for mark, load in _FOLDERS.items():
        if (path / mark).exists():
            _refuse(path, config=config, image_root=image_root)
            if split != "train":
                raise ValueError(f"{path} has no splits, but {split!r} was asked for. Give the name alone.")
            rows = load(path)
            return rows.to_iterable_dataset() if streaming else rows
    if not _is_picture_folder(path):
        return _load_files(path, config, split, streaming, image_column or "image", image_root)
    _refuse(path, config=config, image_root=image_root)
    rows = load_picture_folder(path, find_picture_names(path), split)
    if image_column is not None and image_column not in rows.column_names:
        raise ValueError(
            f"{path} is a folder of pictures, without a column {image_column!r} (--image-column). Its columns are "
            f"{rows.column_names}."
        )
    return rows.to_iterable_dataset() if streaming else rows


def _is_picture_folder(path: Path) -> bool:
    if any(path.glob(_SHARDS_OF_THE_HUB)):
        return False
    return has_metadata(path) or bool(find_picture_files(path))


def _refuse(path: Path, **arguments: object):
    """Refuse arguments that have no use for a folder."""
    if unused := [name for name, value in arguments.items() if value is not None]:
        option = unused[0].replace("_", "-")
        raise ValueError(f"{unused[0]} (--{option}) was given, but {path} has no use for it. Leave it out.")


def _load_files(
    path: Path,
    config: str | None,
    split: str,
    streaming: bool,
    image_column: str,
    image_root: str | os.PathLike | None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load a folder of files with rows, whose splits `datasets` finds by their names."""
    if not any(table_ending(name) for _, _, names in os.walk(path) for name in names):
        raise ValueError(
            f"{path} is a folder without pictures and without files of rows ({ENDINGS}). Give a folder of pictures, "
            "or such a file."
        )
    with errors_that_name(str(path)):
        if shards := find_shards(path):
            files = datasets.load_dataset_builder(str(path), config).config.data_files
            return load_shards(files, shards, split, streaming)
        rows = datasets.load_dataset(str(path), config, split=split, streaming=streaming)
    return find_pictures(rows, image_column, path, image_root, str(path))


def find_splits(data: str | os.PathLike, config: str | None = None) -> list[str] | None:
    r"""
    Find the splits of local data, without loading all of it.

    Args:
        data (`str` or `os.PathLike`):
            The data, as for [`load_rows`].
        config (`str`, *optional*):
            Configuration of a folder of files.

    Returns:
        `list[str]` or `None`: the names, none if there are no splits; `None` if the data are on the Hub.
    """
    name, own_config, _ = _read_name(str(data))
    path = Path(name)
    if not path.is_dir():
        return None if _is_hub_name(name) else find_annotated_splits(name)
    if any((path / mark).exists() for mark in _FOLDERS):
        return []
    if _is_picture_folder(path):
        return list(split_by_folder(find_picture_names(path)))
    found = list(datasets.load_dataset_builder(str(path), config or own_config).config.data_files)
    return [] if found == ["train"] else found


def _is_hub_name(name: str) -> bool:
    """Tell whether a name that is no folder is that of a dataset on the Hub, and refuse a path that leads nowhere."""
    if "://" in name:
        return table_ending(name) is None
    if table_ending(name) or os.path.exists(name) or glob.has_magic(name):
        return False
    owner, slash, _ = name.partition("/")
    if name.count("/") != 1 or owner in ("", ".", "..", "~") or os.path.isdir(owner) or "\\" in name:
        hint = "" if slash else f" A dataset on the Hub is named with its owner, such as me/{name}."
        raise FileNotFoundError(f"{name}: no such file or folder. Check the path.{hint}")
    return True


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
    name, config, split = _read_name(str(data))
    return os.path.realpath(name) if os.path.exists(name) else name, config, split or "train"


def _read_name(data: str) -> tuple[str, str | None, str | None]:
    """Split `name:configuration:split`, `name:split` or a name alone into name, configuration and split."""
    # The colon of a protocol has slashes after it
    name, *ends = re.split(r":(?!//)", data, maxsplit=1)
    if not ends or os.path.exists(data) or table_ending(data):
        return data, None, None
    path = Path(name)
    if path.is_file() or table_ending(name) or any((path / mark).exists() for mark in _FOLDERS):
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
    [`ImageTextPairs`]: `image_id`, the `file_name` of a folder of pictures, or the pictures' own column if it has
    paths or numbers of rows.

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


__all__ = ["check_held_out", "find_id_column", "find_splits", "hold_out", "load_rows"]
