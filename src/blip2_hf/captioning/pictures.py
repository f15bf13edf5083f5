"""Collections of pictures: a folder, WebDataset's tar files, the rows of a dataset."""

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from transformers.utils import logging

from ..data.rows import find_image_column, get_column, open_image, picture_bytes, select_columns
from ..data.shards import read_members, split_member
from ..jobs.errors import CollectionError
from ..jobs.fingerprints import fingerprint, sampled_rows
from ..jobs.picture_files import find_pictures_or_videos, is_picture_name
from ..models.image_loading import load_image
from ..models.video_loading import is_video, is_video_name


logger = logging.get_logger(__name__)


class Pictures(torch.utils.data.Dataset, ABC):
    """
    A collection whose entries are pictures or videos, and what tells each of them from the others in the output.
    """

    columns: Mapping[str, type]  # of the output, without the caption

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Any:
        """Return the picture, or raise an [`~image_loading.ImageLoadError`] that names it; a video as it is stored."""

    @abstractmethod
    def identity(self, index: int) -> dict[str, Any]:
        """Return the values of `columns`."""

    @abstractmethod
    def position(self, record: Mapping[str, Any]) -> int | None:
        """Return the index of the picture that a record of the output is about; `None` if the picture is gone."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what must stay as it is so that records of an earlier run are about the same pictures."""


class _NamedPictures(Pictures):
    """Pictures that names tell apart, so that more of them may join later."""

    @functools.cached_property
    def _positions(self) -> dict[tuple, int]:
        return {tuple(self.identity(index).values()): index for index in range(len(self))}

    def position(self, record: Mapping[str, Any]) -> int | None:
        return self._positions.get(tuple(record[name] for name in self.columns))


class FolderPictures(_NamedPictures):
    r"""
    Every picture in a folder and the folders inside it, by the endings of their names, or every video if there are no
    pictures. Names that begin with a dot are passed over, links to folders are not followed.

    Args:
        folder (`str` or `os.PathLike`):
            The folder.
        names (`list[str]`, *optional*):
            Paths inside the folder, if only these pictures and videos are meant.

    Raises:
        CollectionError: if there is no such folder.
    """

    columns = {"file": str}
    _way = ""  # to the folder, in front of each name in the output

    def __init__(self, folder: str | os.PathLike, names: Sequence[str] | None = None):
        self.folder = Path(folder)
        self.names = find_pictures_or_videos(self.folder) if names is None else sorted(set(names))

    def named_from(self, folder: Path) -> "FolderPictures":
        """Return the same pictures with the names that `metadata.jsonl` has for them in a folder above them."""
        try:
            way = self.folder.resolve().relative_to(folder.resolve()).as_posix()
        except ValueError:
            raise CollectionError(
                f"A metadata file in {folder} does not find the pictures of {self.folder} by `file_name`. Write it "
                f"into {self.folder}, or into a folder above."
            ) from None
        pictures = FolderPictures(self.folder, self.names)
        pictures.columns, pictures._way = {"file_name": str}, "" if way == "." else f"{way}/"
        return pictures

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Image.Image | Path:
        path = self.folder / self.names[index]
        return path if is_video_name(path) else load_image(path)

    def identity(self, index: int) -> dict[str, Any]:
        return {name: _as_utf8(self._way + self.names[index]) for name in self.columns}

    def describe(self) -> dict[str, Any]:
        # Metadata move with their pictures
        return {} if "file_name" in self.columns else {"data": str(self.folder.resolve())}


class TarPictures(_NamedPictures):
    r"""
    The pictures in tar files of WebDataset, in which files of one key are one sample. Headers are read at the start,
    each picture is read from its place.

    Args:
        paths (`list[str]` or `list[os.PathLike]`):
            The tar files, not compressed.
        field (`str`, *optional*):
            Ending that the pictures have behind their key, such as `"jpg"`. Needed if a sample has several.

    Raises:
        CollectionError: if a file is no tar file, if a sample has several pictures, or if a file stands twice in one.
    """

    columns = {"shard": str, "key": str}

    def __init__(self, paths: Sequence[str | os.PathLike], field: str | None = None):
        self.paths = [Path(path).absolute() for path in paths]
        self.folder = Path(os.path.commonpath([path.parent for path in self.paths]))
        self.field = field
        self.members = [
            (shard, *member)
            for shard in logging.tqdm(range(len(self.paths)), desc="Tar files", unit="file", leave=False)
            for member in _picture_members(self.paths[shard], field)
        ]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Image.Image:
        shard, key, ending, offset, size = self.members[index]
        with open(self.paths[shard], "rb") as file:
            file.seek(offset)
            return load_image(file.read(size), f"{key}.{ending} in {self.paths[shard]}")

    def identity(self, index: int) -> dict[str, Any]:
        shard, key = self.members[index][:2]
        return {"shard": _as_utf8(self.paths[shard].relative_to(self.folder).as_posix()), "key": _as_utf8(key)}

    def describe(self) -> dict[str, Any]:
        return {"data": str(self.folder.resolve()), "image_column": self.field}


def _picture_members(path: Path, field: str | None) -> Iterator[tuple[str, str, int, int]]:
    """Yield the key, ending, offset and size of each picture of a tar file."""
    endings: dict[str, str] = {}
    for name, offset, size in read_members(path):
        key, ending = split_member(name)
        if (ending.lower() != field.lower()) if field is not None else not is_picture_name(f"x.{ending}"):
            continue
        if endings.get(key) == ending:
            raise CollectionError(
                f"{path} has the file {name!r} twice, and captions are told apart by the names. Write the tar file "
                "again, with one of them or with other names."
            )
        if key in endings:
            raise CollectionError(
                f"{path}: the sample {key!r} has several pictures, {endings[key]!r} and {ending!r}. Say which are to "
                "be captioned with image_column (--image-column)."
            )
        endings[key] = ending
        yield key, ending, offset, size


class RowPictures(Pictures):
    r"""
    The pictures of a dataset of `datasets`.

    Args:
        dataset (`datasets.Dataset`):
            The rows.
        column (`str`, *optional*):
            Column of the pictures or videos: anything that [`~image_loading.load_image`] takes, files with the ending
            of a video, lists of pictures. Without it, the only column whose type is `datasets.Image`, or else
            `"image"`.
        allow_urls (`bool` or `list[str]`, *optional*, defaults to `False`):
            Which URLs in the rows are fetched: none, with `True` those of public addresses, with a list also those of
            the hosts in it.

    Raises:
        CollectionError: if there is no such column.
    """

    columns = {"row": int}

    def __init__(self, dataset: datasets.Dataset, column: str | None = None, allow_urls: bool | Sequence[str] = False):
        if not isinstance(dataset, datasets.Dataset):
            raise CollectionError(
                f"A datasets.Dataset was expected, got a {type(dataset).__name__}. Load one split, without streaming."
            )
        self.allow_urls = allow_urls
        self.column = find_image_column(dataset) if column is None else column
        try:
            self.rows = select_columns(dataset.with_format(None), [self.column])
        except ValueError as error:
            raise CollectionError(f"{error} Say which has the pictures with image_column (--image-column).") from error

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        value = get_column(self.rows[index], self.column)
        if isinstance(value, list):  # a video of pictures
            return [open_image(frame, f"row {index}", self.allow_urls) for frame in value]
        return value if is_video(value) else open_image(value, f"row {index}", self.allow_urls)

    def identity(self, index: int) -> dict[str, Any]:
        return {"row": index}

    def position(self, record: Mapping[str, Any]) -> int | None:
        return record["row"] if record["row"] < len(self) else None

    def describe(self) -> dict[str, Any]:
        """Return the number of rows and a hash of some, because rows have no names."""
        return {
            "rows": len(self),
            "image_column": self.column,
            "pictures": fingerprint(map(self._row_bytes, sampled_rows(len(self)))),
        }

    def _row_bytes(self, row: int) -> bytes:
        return picture_bytes(get_column(self.rows[row], self.column))


def _as_utf8(name: str) -> str:
    """Return a name that every format can hold. File systems and tar files have names in other encodings too."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


__all__ = ["CollectionError", "FolderPictures", "Pictures", "RowPictures", "TarPictures"]
