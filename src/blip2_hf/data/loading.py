"""Datasets by the name that a user gives."""

import os
import re
from pathlib import Path

import datasets

from ..jobs.names import is_dataset_id
from .feature_cache import load_cached_features
from .folders import find_picture_names, is_picture_folder, load_picture_folder
from .picture_paths import find_pictures
from .shards import find_shards, load_shards
from .splits import split_by_folder
from .tables import ENDINGS, errors_that_name, find_annotated_splits, is_table, load_tables, table_ending


# What opens the folders that `cache_features` and `Dataset.save_to_disk` write, by a file in them
_FOLDERS = {"cache.json": load_cached_features, "dataset_info.json": datasets.load_from_disk}
_DICT = "dataset_dict.json"  # of a `DatasetDict`


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
            Column of the pictures, in which relative paths are looked for; by default `"image"`. Rows of a file
            without pictures get it from their column `"file_name"` or `"file"`.
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
    if not _is_on_hub(name):
        _refuse_config(path, config)
        return load_tables(name, split, streaming, image_column, image_root)
    rows = datasets.load_dataset(name, config, split=split, streaming=streaming)
    return rows if image_root is None else find_pictures(rows, image_column, None, image_root, name)


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
            _refuse_config(path, config)
            if split != "train":
                raise ValueError(f"{path} has no splits, but {split!r} was asked for. Give the name alone.")
            rows = load(path)
            return rows.to_iterable_dataset() if streaming else rows
    if (path / _DICT).exists():
        _refuse_config(path, config)
        parts = datasets.load_from_disk(path)
        if split not in parts:
            raise ValueError(f"{path} has the splits {', '.join(parts)}, but {split!r} was asked for. Give one.")
        return parts[split].to_iterable_dataset() if streaming else parts[split]
    if not is_picture_folder(path):
        return _load_files(path, config, split, streaming, image_column, image_root)
    _refuse_config(path, config)
    rows = load_picture_folder(path, split)
    if image_column is not None and image_column not in rows.column_names:
        raise ValueError(
            f"{path} is a folder of pictures, without a column {image_column!r} (--image-column). Its columns are "
            f"{rows.column_names}."
        )
    return rows.to_iterable_dataset() if streaming else rows


def _refuse_config(path: Path, config: str | None):
    if config is not None:
        raise ValueError(f"The configuration {config!r} (--config) was given, but {path} has none. Leave it out.")


def _load_files(
    path: Path,
    config: str | None,
    split: str,
    streaming: bool,
    image_column: str | None,
    image_root: str | os.PathLike | None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load a folder of files with rows, whose splits `datasets` finds by their names."""
    _check_has_rows(path)
    with errors_that_name(str(path)):
        if shards := find_shards(path):
            files = datasets.load_dataset_builder(str(path), config).config.data_files
            return load_shards(files, shards, split, streaming)
        rows = datasets.load_dataset(str(path), config, split=split, streaming=streaming)
    return find_pictures(rows, image_column, path, image_root, str(path))


def _check_has_rows(path: Path):
    if not any(is_table(name) for _, _, names in os.walk(path) for name in names):
        raise ValueError(
            f"{path} is a folder without pictures and without files of rows ({ENDINGS}). Give a folder of pictures, "
            "or such a file."
        )


def find_splits(data: str | os.PathLike, config: str | None = None) -> list[str] | None:
    r"""
    Find the splits of local data, without loading all of it.

    Args:
        data (`str` or `os.PathLike`):
            The data, as for [`load_rows`].
        config (`str`, *optional*):
            Configuration of a folder of files.

    Returns:
        `list[str]` or `None`: the names; none if there are no splits, or `data` ends in one; `None` if the data are
        on the Hub.

    Raises:
        ValueError: if a folder has neither pictures nor files with rows.
        FileNotFoundError: if there is no such file or folder.
    """
    name, own_config, own_split = _read_name(str(data))
    path = Path(name)
    if own_split is not None:
        return []
    if not path.is_dir():
        return None if _is_on_hub(name) else find_annotated_splits(name)
    if any((path / mark).exists() for mark in _FOLDERS):
        return []
    if is_picture_folder(path):
        return list(split_by_folder(find_picture_names(path)))
    if (path / _DICT).exists():
        return list(datasets.load_from_disk(path))
    _check_has_rows(path)
    found = list(datasets.load_dataset_builder(str(path), config or own_config).config.data_files)
    return [] if found == ["train"] else found


def _is_on_hub(name: str) -> bool:
    """Tell whether data that are no folder are a dataset on the Hub, and refuse a path that leads nowhere."""
    return table_ending(name) is None if "://" in name else is_dataset_id(name)


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
    may_have_splits = table_ending(name) == ".json"  # Karpathy's file
    if ((path.is_file() or table_ending(name)) and not may_have_splits) or any(
        (path / mark).exists() for mark in _FOLDERS
    ):
        raise ValueError(
            f"{data!r} has {ends[0]!r} after {name!r}, which has no splits: a dataset of the Hub, or a folder with "
            "files of several splits, was expected. Give the name alone."
        )
    config, _, rest = ends[0].partition(":")
    # A colon in brackets is that of a slice
    return (name, config, rest) if rest and "[" not in config else (name, None, ends[0])


__all__ = ["check_held_out", "find_splits", "load_rows"]
