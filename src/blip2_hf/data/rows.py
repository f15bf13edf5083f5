"""Rows of datasets of every kind: their columns, their pictures, and the randomness that belongs to each."""

import dataclasses
import hashlib
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import datasets
import fsspec
import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image

from ..jobs.errors import CollectionError
from ..jobs.fingerprints import stable_repr
from ..models.image_fetching import FetchError, read_at_most
from ..models.image_loading import as_load_error, is_url, load_image
from ..models.video_loading import is_video, sample_frames


# File systems of fsspec that lead to no other machine, and the Hub
_OWN_FILE_SYSTEMS = {"file", "local", "zip", "tar", "gzip", "bz2", "xz", "lz4", "zstd", "hf"}
_TELLING_BYTES = 2**16  # at the beginning of a file, by which it is told from others
ROW_NUMBER = "__row__"  # column of a part of a dataset: which row of the whole each row is
PICTURE_ID = "__picture__"  # column of ids that are equal for rows of the same picture


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


def select_columns(dataset: Any, columns: Iterable[str]) -> Any:
    """
    Return the columns of a dataset that are read, with pictures as they are stored: `open_image` decodes them. It can
    say whose picture is broken, and fetches no URL unasked, which `datasets` would. A dataset that makes its rows on
    the fly (`with_transform`) keeps all columns. Its function gets opened pictures, except from a column that has
    files of other machines. What is no dataset of `datasets` stays as it is.
    """
    names = column_names(dataset)
    if names is not None:
        wanted = [column if column in names else column.split(".")[0] for column in columns]
        if missing := [name for name in wanted if name not in names]:
            raise ValueError(f"The dataset has no column {missing[0]!r}; its columns are {sorted(names)}.")
        dataset = dataset.select_columns(list(dict.fromkeys(wanted)))
    elif not isinstance(dataset, datasets.Dataset):
        return dataset
    for name, feature in dataset.features.items():
        stored = _without_decoding(feature)
        if stored != feature and (names is not None or _has_remote_files(dataset, name)):
            dataset = dataset.cast_column(name, stored)
    return dataset


def _has_remote_files(dataset: datasets.Dataset, name: str) -> bool:
    """Return whether `datasets` would open files of other machines to decode a column, or may do so inside of it."""
    if not isinstance(dataset.features[name], datasets.Image):
        return True
    column = dataset.data.column(name)
    paths = pc.struct_field(column, "path").filter(pc.struct_field(column, "bytes").is_null())
    return bool(pc.any(pc.match_substring(paths, "://")).as_py())


def _without_decoding(feature: Any) -> Any:
    """Return the type of a column, or of what is inside it, of which `datasets` opens no files."""
    if isinstance(feature, Mapping):
        return {name: _without_decoding(inner) for name, inner in feature.items()}
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return dataclasses.replace(feature, feature=_without_decoding(feature.feature))
    if isinstance(feature, datasets.Json) or getattr(feature, "decode", False) is not True:
        return feature  # texts of which some are lists are JSON, which refers to no file
    return dataclasses.replace(feature, decode=False)


def find_image_column(dataset: datasets.Dataset) -> str:
    """Return the only column of pictures, or else `image` or `video`."""
    found = [name for name, feature in (dataset.features or {}).items() if isinstance(feature, datasets.Image)]
    if len(found) > 1 and "image" not in found:
        raise CollectionError(
            f"The dataset has several columns of pictures, {found}. Say which with image_column (--image-column)."
        )
    return found[0] if len(found) == 1 else default_image_column(dataset)


def default_image_column(dataset: Any) -> str:
    """Return `image`, or `video` if there is only that."""
    names = dataset.column_names or []
    return "video" if "video" in names and "image" not in names else "image"


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


def open_image(value: Any, name: str, allow_urls: bool | Sequence[str] | None = False) -> Image.Image:
    """
    Open a picture of a row: anything that [`~image_loading.load_image`] takes, or a file that `datasets` refers to. If
    the picture can't be read, or is a URL that is not allowed, an `ImageLoadError` calls it `name`, such as `row 3`.
    `allow_urls` is that of [`~image_loading.load_image`]. Files of other machines that are not fetched by HTTP, such
    as `s3://bucket/x.png`, are opened only if their host or bucket is in the list.
    """
    path = value.get("path") if isinstance(value, Mapping) and value.get("bytes") is None else None
    if not isinstance(path, str) or "://" not in path:
        return load_image(value, name, allow_urls=allow_urls)
    if is_url(path):
        return load_image(path, name, allow_urls=allow_urls)
    try:
        for part in path.split("::"):
            _check_part(part, allow_urls)
        # A file on the Hub, or inside an archive
        with fsspec.open(path, "rb") as file:
            data = read_at_most(file)
    except MemoryError:
        raise
    except Exception as error:  # each file system of fsspec has errors of its own, and may lack its package
        raise as_load_error(error, value, name) from error
    return load_image({"bytes": data, "path": path}, name)


def open_frames(
    value: Any, name: str, num_frames: int, allow_urls: bool | Sequence[str] | None = False
) -> Image.Image | list[Image.Image]:
    """Open a picture of a row as `open_image` does, or, of a video ([`~video_loading.is_video`]), its frames."""
    if not is_video(value):
        return open_image(value, name, allow_urls)
    return [open_image(frame, name, allow_urls) for frame in sample_frames(value, num_frames, name)]


def picture_bytes(value: Any) -> bytes:
    """Return what tells the picture of a row from others: of a file its name and its beginning, not its folder."""
    if isinstance(value, Image.Image):
        return repr((value.mode, value.size)).encode() + value.tobytes()
    path = value.get("path") if isinstance(value, Mapping) and value.get("bytes") is None else value
    if isinstance(path, str) and os.path.isfile(path):
        with open(path, "rb") as file:
            name = f"{os.path.basename(path)} {os.path.getsize(path)} "
            return name.encode("utf-8", "surrogatepass") + file.read(_TELLING_BYTES)
    if isinstance(value, Mapping) and value.get("bytes") is not None:
        return value["bytes"]
    return stable_repr(value).encode("utf-8", "surrogatepass")


def _check_part(part: str, allow_urls: bool | Sequence[str] | None):
    """Refuse a part of a path such as `zip://a.png::https://example.com/x.zip` that leads where a row may not."""
    protocol, separator, rest = part.partition("://")
    if not separator or protocol in ("file", "local"):
        if not os.path.isfile(path := rest if separator else part):
            raise FetchError(f"{path} is no file, or a FIFO, a device or a socket. Check the path")
    elif protocol not in _OWN_FILE_SYSTEMS and allow_urls is not None:
        host = urlsplit(part).hostname
        hosts = [allow_urls] if isinstance(allow_urls, str) else allow_urls
        if isinstance(hosts, bool) or host not in hosts:
            raise FetchError(
                f"a file of another machine in a row of a dataset is opened only if its host or bucket is named: "
                f"allow_urls=[{host!r}] (--allow-urls {host}). Or download the pictures first"
            )
