"""Rows of datasets of every kind: their columns, their pictures, and the randomness that belongs to each."""

import hashlib
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import fsspec
import numpy as np
import torch
from PIL import Image

from ..models.image_loading import as_load_error, load_image


ROW_NUMBER = "__row__"  # column of a part of a dataset: which row of the whole each row is


def stable_hash(text: str) -> int:
    """Return a hash of 63 bits that is the same in every process and on every machine."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seeded_generator(*parts: int) -> torch.Generator:
    """Return a generator of its own for each tuple of integers, such as (seed, epoch, row)."""
    return torch.Generator().manual_seed(stable_hash(repr(parts)))


def get_column(row: Mapping, column: str) -> Any:
    """Return the value of a column or, if none is called `json.caption`, of the field `caption` of `json`."""
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise ValueError(f"The rows have no column {column!r}; theirs are {sorted(map(str, row))}.")
        value = value[name]
    return value


def check_id(value: Any, name: str, column: str) -> int | str:
    """
    Return the id of an image, which is the same in all of its rows: an integer or a string, or else a `ValueError`
    that calls the row `name`.
    """
    if isinstance(value, str):
        return value
    try:
        return operator.index(value)
    except TypeError:
        hint = " Floats round large ids, and are NaN for a missing one: cast the column." * isinstance(value, float)
        raise ValueError(
            f"{name} has the id {value!r} in column {column!r}; an integer or a string was expected.{hint}"
        ) from None


def check_dataset(dataset: Any, added: Iterable[str]):
    """Refuse anything but a dataset with rows, and one that has a column already which is to be added."""
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(
            f"A datasets.Dataset was expected, got a {type(dataset).__name__}. Load one split, without streaming; "
            "datasets.Dataset.from_list makes one of other rows."
        )
    if len(dataset) == 0:
        raise ValueError("The dataset has no rows.")
    if taken := [name for name in added if name in dataset.column_names]:
        raise ValueError(f"The dataset has a column {taken[0]!r} already. Rename it, or remove it.")


def select_columns(dataset: Any, columns: Iterable[str], image_column: str | None) -> Any:
    """
    Return the columns of a dataset that are read, with pictures as they are stored: `open_image` decodes them, and can
    say whose picture is broken. What is no dataset of `datasets`, or makes its rows on the fly, stays as it is.
    """
    names = column_names(dataset)
    if names is None:
        return dataset
    wanted = [column if column in names else column.split(".")[0] for column in columns]
    if missing := [name for name in wanted if name not in names]:
        raise ValueError(f"The dataset has no column {missing[0]!r}; its columns are {sorted(names)}.")
    dataset = dataset.select_columns(list(dict.fromkeys(wanted)))
    if image_column is not None and isinstance(dataset.features.get(image_column), datasets.Image):
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    return dataset


def column_names(dataset: Any) -> list[str] | None:
    """Return the names of the columns if they can be known without a row."""
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.column_names
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom":
        return dataset.column_names
    return None


def read_row_numbers(dataset: Any) -> np.ndarray | None:
    """Return which row of the whole each row of a part of a dataset is, or `None` if that is not known."""
    if not isinstance(dataset, datasets.Dataset) or ROW_NUMBER not in dataset.column_names:
        return None
    numbers = np.asarray(dataset.with_format(None).select_columns(ROW_NUMBER)[:][ROW_NUMBER])
    # Parts of several datasets that were put together have some numbers twice, which are then of no use
    return numbers if len(np.unique(numbers)) == len(numbers) else None


def open_image(value: Any, name: str) -> Image.Image:
    """
    Open a picture of a row: anything that [`~image_loading.load_image`] takes, or a file that `datasets` refers to. If
    the picture can't be read, an `ImageLoadError` calls it `name`, such as `row 3`.
    """
    path = value.get("path") if isinstance(value, Mapping) and value.get("bytes") is None else None
    if not isinstance(path, str) or "://" not in path:
        return load_image(value, name)
    if path.startswith(("http://", "https://")):
        return load_image(path, name)
    try:
        # A file on the Hub, or inside an archive
        with fsspec.open(path, "rb") as file:
            data = file.read()
    except MemoryError:
        raise
    except Exception as error:  # each file system of fsspec has errors of its own, and may lack its package
        raise as_load_error(error, value, name) from error
    return load_image({"bytes": data, "path": path}, name)
