"""WebDataset's tar files, also those in which pictures have several endings."""

import itertools
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from transformers.utils import logging

from ..jobs.errors import CollectionError
from ..jobs.picture_files import is_picture_name


logger = logging.get_logger(__name__)

_LOOKED_AT = 200  # files at the beginning of a tar file, by which its pictures' endings are known


class _MixedShards(WebDataset):
    """WebDataset with one column `image` for pictures of all endings."""

    IMAGE_EXTENSIONS = [*WebDataset.IMAGE_EXTENSIONS, "image"]

    @classmethod
    def _get_pipeline_from_tar(cls, tar_path: str, tar_iterator: Any) -> Iterator[dict[str, Any]]:
        for sample in super()._get_pipeline_from_tar(tar_path, tar_iterator):
            if len(pictures := [field for field in sample if is_picture_name(f"x.{field}")]) > 1:
                raise ValueError(f"{tar_path}: the sample {sample['__key__']!r} has several pictures, {pictures}.")
            yield {"image" if field in pictures else field: value for field, value in sample.items()}


def load_shards(data_files: Any, paths: Sequence[str], split: str, streaming: bool) -> Any:
    """
    Load tar files. Their pictures are in columns that are called as their endings or, if samples differ in those, in
    the column `image`. `data_files` are those of `datasets`, and `paths` the same files.
    """
    if not _are_mixed(paths):
        return datasets.load_dataset("webdataset", data_files=data_files, split=split, streaming=streaming)
    builder = _MixedShards(data_files=data_files)
    if streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _are_mixed(paths: Sequence[str]) -> bool:
    """Tell whether each sample has one picture, and their endings differ."""
    endings: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        for name, _, _ in itertools.islice(read_members(path), _LOOKED_AT):
            key, ending = split_member(name)
            if is_picture_name(f"x.{ending}"):
                endings.setdefault((path, key), []).append(ending)
    return all(len(found) == 1 for found in endings.values()) and len({*map(tuple, endings.values())}) > 1


def split_member(name: str) -> tuple[str, str]:
    """Return the key of a file in a tar file, and its ending, such as `("a/0001", "jpg")`."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return folder + slash + stem, ending


def read_members(path: str | os.PathLike) -> Iterator[tuple[str, int, int]]:
    """Yield the name, offset and size of each file in a tar file."""
    try:
        archive = tarfile.open(path, "r:")  # noqa: SIM115
    except tarfile.TarError as error:
        raise CollectionError(
            f"{path} is not a tar file that can be read ({error}). Give tar files that are not compressed."
        ) from error
    with archive:
        try:
            for member in archive:
                if member.isreg():
                    yield member.name, member.offset_data, member.size
        except tarfile.TarError as error:
            logger.warning(f"{path} is cut off ({error}). What stands before that is read. Fetch the file again.")


def find_shards(folder: Path) -> list[str]:
    """Return the tar files in a folder and the folders inside it."""
    return sorted(map(str, folder.rglob("*.tar")))
