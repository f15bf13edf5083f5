"""A folder of pictures or videos as rows: these, and the texts beside them or in a metadata file."""

import os
import posixpath
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import datasets
from transformers.utils import logging

from ..jobs.errors import printable
from ..jobs.picture_files import find_beside, find_pictures_or_videos, has_pictures_or_videos
from .splits import select_split, split_by_folder
from .tables import concatenate, is_table, load_tables


logger = logging.get_logger(__name__)

_SAVED = (  # what `cache_features`, `save_to_disk`, `push_to_hub` and CapFilt write
    "cache.json",
    "dataset_info.json",
    "dataset_dict.json",
    "*-*-of-*.parquet",
    "data/*-*-of-*.parquet",
)
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_TEXT_ENDINGS = (".txt", ".caption")
_FILE = "file_name"


def load_picture_folder(folder: Path, split: str = "train") -> datasets.Dataset:
    """
    Load the pictures of a folder, or the videos if it has no pictures. Rows have `image`, `file_name`, the path inside
    the folder, and the columns of the metadata files. If those have no texts, `caption` has the texts beside the
    pictures.
    """
    names = find_picture_names(folder)
    tables = {str(path): _read_metadata(folder, path, set(names)) for path in _find_metadata(folder, names)}
    described = {name for table in tables.values() for name in table[_FILE]}
    others = [name for name in names if name not in described]
    if others or not tables:
        tables[str(folder)] = _make_rows(folder, others)
    rows = _add_texts(folder, concatenate(tables))
    parts = split_by_folder(rows[_FILE][:])
    return select_split(rows, parts, split, str(folder))


def find_picture_names(folder: Path) -> list[str]:
    """Return the paths of the pictures in a folder, or of the videos if it has none, which a table can hold."""
    names = find_pictures_or_videos(folder)
    for name in names:
        if printable(name) != name:
            raise ValueError(f"{folder}: the name of the file {printable(name)} is not in UTF-8. Rename it.")
    return names


def is_picture_folder(folder: Path) -> bool:
    """Tell whether a folder has pictures or videos, or metadata, and is no dataset that was saved in files."""
    if not folder.is_dir() or any(any(folder.glob(name)) for name in _SAVED):
        return False
    return any((folder / name).is_file() for name in _METADATA) or has_pictures_or_videos(folder)


def _find_metadata(folder: Path, names: Iterable[str]) -> list[Path]:
    """Return the metadata files beside the pictures and above them, of which a folder may have one."""
    found = []
    for inner in sorted({".", *(str(parent) for name in names for parent in PurePosixPath(name).parents)}):
        paths = [path for name in _METADATA if (path := folder / inner / name).is_file()]
        if len(paths) > 1:
            raise ValueError(
                f"{folder / inner} has {' and '.join(path.name for path in paths)}, one of which was expected. Remove "
                "the others."
            )
        found += paths
    return found


def _read_metadata(folder: Path, path: Path, names: set[str]) -> datasets.Dataset:
    """Read a metadata file as `datasets` does: `file_name` names the picture, `x_file_name` one for the column `x`."""
    table = load_tables(str(path), "train", streaming=False, image_column="")
    main = next((name for name in (_FILE, f"image_{_FILE}") if name in table.column_names), None)
    if main is None:
        raise ValueError(
            f"{path} has no column {_FILE!r}, but {table.column_names}. Name the pictures in it, by their paths from "
            f"the folder {path.parent}, or rename the file."
        )
    inner = path.parent.relative_to(folder).as_posix()
    columns = {
        name: [_picture_name(inner, value, path) for value in table[name]]
        for name in table.column_names
        if name == main or name.endswith(f"_{_FILE}")
    }
    gone = [row for row, named in enumerate(zip(*columns.values(), strict=True)) if not names.issuperset(named)]
    if gone:
        _tell_of_gone(path, table[main][gone[0]], len(gone), len(table))
        left = sorted(set(range(len(table))).difference(gone))
        table = table.select(left)
        columns = {name: [own[row] for row in left] for name, own in columns.items()}
    pictures = {"image" if name == main else name.removesuffix(f"_{_FILE}"): own for name, own in columns.items()}
    others = table.remove_columns([name for name in table.column_names if name in columns or name in pictures])
    made = _make_rows(folder, pictures.pop("image"), **pictures)
    return datasets.concatenate_datasets([made, others], axis=1) if others.column_names else made


def _picture_name(inner: str, value: object, path: Path) -> str:
    """Return the path from the folder of a picture that a metadata file in the folder `inner` names."""
    if not isinstance(value, str):
        raise ValueError(f"{path} names the picture {value!r}. Give the path of each picture, or take the row out.")
    return posixpath.normpath(posixpath.join(inner, value.replace("\\", "/")))


def _tell_of_gone(path: Path, first: str, gone: int, rows: int):
    """Say that rows are left out because their pictures are not there, and refuse a file of such rows alone."""
    if gone == rows:
        raise ValueError(
            f"{path} names the picture {first!r}, which is not in the folder {path.parent}, nor are the others. "
            "Give the path of each picture from that folder, or remove the file."
        )
    logger.warning(
        f"{path}: {gone:,} of {rows:,} rows are left out, because their pictures are not there, the first {first!r}."
    )


def _make_rows(folder: Path, names: Sequence[str], **others: Sequence[str]) -> datasets.Dataset:
    """Make rows of pictures. `others` are the names of pictures in other columns."""
    columns = {"image": names, **others}
    features = datasets.Features({**dict.fromkeys(columns, datasets.Image()), _FILE: datasets.Value("string")})
    paths = {column: [os.path.abspath(folder / name) for name in own] for column, own in columns.items()}
    return datasets.Dataset.from_dict({**paths, _FILE: list(names)}, features=features)


def _add_texts(folder: Path, rows: datasets.Dataset) -> datasets.Dataset:
    """Add the texts beside the pictures as the column `caption`, if there are any and the metadata have none."""
    names = rows[_FILE][:]
    found = {name: path for name in names if (path := _find_text(folder, name)) is not None}
    if texts := [name for name in rows.column_names if _has_texts(rows, name)]:
        if found:
            logger.warning(
                f"{folder}: the texts beside the pictures are not read, because the metadata have the column "
                f"{texts[0]!r}. Remove the metadata, or the texts."
            )
        return rows
    if not found:
        _tell_of_tables(folder)
        return rows
    read = {name: _read_text(path) for name, path in found.items()}
    return rows.add_column("caption", [read.get(name) for name in names])


def _tell_of_tables(folder: Path):
    """Say that tables in a folder of pictures are not read."""
    if tables := [name for name in sorted(os.listdir(folder)) if is_table(name) or name == "captions.txt"]:
        logger.warning(
            f"{folder} is read as a folder of pictures, without texts. To read {tables[0]}, name that file."
        )


def _has_texts(rows: datasets.Dataset, name: str) -> bool:
    feature = rows.features[name]
    feature = feature.feature if isinstance(feature, (datasets.List, datasets.LargeList)) else feature
    is_text = isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
    return name == "caption" or (is_text and name != _FILE)


def _find_text(folder: Path, name: str) -> Path | None:
    paths = (find_beside(folder / name, ending) for ending in _TEXT_ENDINGS)
    return next((path for path in paths if path.is_file()), None)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error.reason}). Save the text anew, in UTF-8.") from error
