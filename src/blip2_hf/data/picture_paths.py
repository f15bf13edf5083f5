"""Pictures that rows name by relative paths: where their files are."""

import itertools
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import datasets

from ..jobs.picture_files import is_picture_or_video_name
from .rows import default_image_column, select_columns


_FIRST = 10  # paths of which at least one has to be found
_FILES = ("file_name", "file")  # columns of metadata files, and of what `caption` writes
_LONGEST_PATH = 1024  # characters; a longer string is a picture in base64

Rows: TypeAlias = "datasets.Dataset | datasets.IterableDataset"


def find_pictures(
    rows: Rows,
    column: str | None,
    folder: Path | None,
    image_root: str | os.PathLike | None,
    name: str,
    subfolders: Sequence[str] = ("",),
) -> Rows:
    """
    Replace relative paths in a column of pictures by absolute ones, of files in `folder` or, if they are not there,
    under `image_root`, in the first of `subfolders` there that has them. Other strings, and pictures of other types,
    stay. Errors call the data `name`. The column is `image`, or `video`, if none is given. Rows without it, and
    without other pictures, get it from `file_name` or `file`.
    """
    if image_root is not None and not Path(image_root).is_dir():
        raise ValueError(f"image_root (--image-root) {image_root}: no such folder. Give the folder of the pictures.")
    if column is None:
        rows = _add_images(rows)
        column = default_image_column(rows)
    if not _has_paths(rows, column):
        return rows
    bases = [base for base in (folder, image_root) if base is not None]
    places = [os.path.abspath(Path(base, subfolder)) for base in bases for subfolder in subfolders]
    if not places:
        return rows
    is_stream = isinstance(rows, datasets.IterableDataset)
    if is_stream:
        values = [row.get(column) for row in without_decoding(rows).take(_FIRST)]
    else:
        values = select_columns(rows.with_format(None), [column])[:][column]
    paths = (path for value in values if (path := _relative_path(value)) is not None)
    if not (first := list(itertools.islice(paths, _FIRST))):
        return rows
    _check_first(first, places, name)
    find = partial(_find, places=places)
    if is_stream:
        return rows.map(partial(_replace, find=find, column=column), features=rows.features)
    columns = rows.column_names
    features = datasets.Features({column: rows.features[column]})
    changed = datasets.Dataset.from_dict({column: list(map(find, values))}, features=features)
    rows = datasets.concatenate_datasets([rows.remove_columns(column), changed], axis=1)
    return rows.select_columns(columns)


def refuse_root(image_root: str | os.PathLike | None, reason: str):
    """Refuse a folder from which paths of pictures start, where there are no such paths."""
    if image_root is not None:
        raise ValueError(f"image_root (--image-root) was given, but {reason}. Leave it out.")


def _add_images(rows: Rows) -> Rows:
    """Add the column `image` to rows that have no pictures, but names of files."""
    features = rows.features or {}
    columns = rows.column_names or list(next(iter(rows), {}))  # a stream of text knows its columns by its rows
    named = next((name for name in _FILES if name in columns and _has_paths(rows, name)), None)
    has_pictures = "image" in columns or any(isinstance(feature, datasets.Image) for feature in features.values())
    if named is None or has_pictures:
        return rows
    if isinstance(rows, datasets.Dataset):
        return rows.add_column("image", rows[named][:])
    with_image = datasets.Features(features | {"image": features[named]}) if features else None
    return rows.map(partial(_copy, name=named), features=with_image)


def _copy(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {"image": row[name]}


def without_decoding(rows: datasets.IterableDataset) -> datasets.IterableDataset:
    """Return rows whose pictures are not opened."""
    return rows.decode(False) if rows.features else rows


def _has_paths(rows: Rows, column: str) -> bool:
    if rows.features is None:  # of a stream, whose rows tell
        return True
    feature = rows.features.get(column)
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("string", "large_string")
    if isinstance(feature, datasets.Image) and isinstance(rows, datasets.Dataset):
        table = rows.data.column(column)
        return all(chunk.field("bytes").null_count == len(chunk) for chunk in table.chunks)
    return False


def _check_first(paths: Sequence[str], places: Sequence[str], name: str):
    """Refuse the first relative paths of pictures if none of them is found."""
    named = [path for path in paths if is_picture_or_video_name(path)]
    if named and not any(os.path.exists(_find(path, places)) for path in paths):
        raise ValueError(
            f"{name} names the picture {named[0]!r}, which is not in {' and not in '.join(places)}. Name the folder "
            "that the paths start from with image_root (--image-root)."
        )


def _relative_path(value: Any) -> str | None:
    """Return a string that is no URL, no absolute path and no picture itself."""
    path = value.get("path") if isinstance(value, Mapping) and value.get("bytes") is None else value
    if not isinstance(path, str) or not 0 < len(path) <= _LONGEST_PATH or "://" in path or path.startswith("data:"):
        return None
    return None if os.path.isabs(path) else path


def _find(value: Any, places: Sequence[str]) -> Any:
    """Return the absolute path of a relative one."""
    if (path := _relative_path(value)) is None:
        return value
    candidates = [os.path.normpath(os.path.join(place, path)) for place in places]
    found = next(filter(os.path.exists, candidates), None)
    if found is None:
        if os.path.exists(path) or not is_picture_or_video_name(path):
            return value
        found = candidates[0]  # so that the error about the picture says where it was looked for
    return found if isinstance(value, str) else {"bytes": None, "path": found}


def _replace(row: dict[str, Any], find: Any, column: str) -> dict[str, Any]:
    return {column: find(row[column])}
