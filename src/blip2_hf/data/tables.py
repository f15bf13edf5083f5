"""Files with rows: which endings are read, and how."""

import csv
import glob
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

from ..jobs.errors import CollectionError
from .annotations import read_json_annotations, read_text_annotations
from .picture_paths import Rows, find_pictures, without_decoding
from .shards import load_shards
from .splits import select_split, split_by_column


# A caption or an answer may be "None" or "NA"
_CSV = {"keep_default_na": False, "na_values": [""]}
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {  # of `datasets`, and their arguments
    ".parquet": ("parquet", {}),
    ".pq": ("parquet", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", _CSV | {"sep": "\t"}),
    ".arrow": ("arrow", {}),
    ".tar": ("webdataset", {}),
}
_COMPRESSED = {".csv", ".json", ".jsonl", ".ndjson", ".tsv"}  # read with .gz, too
_TEXTS = {".txt", ".token"}
ENDINGS = ", ".join([*_BUILDERS, "Flickr8k's .txt and .token"])
_WRONG_SPLIT = re.compile("Unknown split|Bad split|Unrecognized instruction|BuilderConfig")  # of `datasets`
_COCO = re.compile(r"captions_(\w+)\.json")


def table_ending(name: str | os.PathLike) -> str | None:
    """Return the ending of a file that has rows, in lower case and without `.gz`, or `None` if it is no such file."""
    stem, ending = os.path.splitext(str(name).lower())
    if ending == ".gz":
        ending = os.path.splitext(stem)[1]
        return ending if ending in _COMPRESSED else None
    return ending if ending in _BUILDERS or ending in _TEXTS else None


def is_table(name: str) -> bool:
    """Tell by the name of a file in a folder whether `datasets` reads it as rows."""
    return name[0] != "." and table_ending(name) in _BUILDERS


def load_tables(
    name: str,
    split: str,
    streaming: bool,
    image_column: str | None = None,
    image_root: str | os.PathLike | None = None,
) -> Rows:
    """Load the rows of a file, or of several (`*`), as [`load_rows`] does."""
    if "://" in name:
        rows = _load(_check_ending(name), name, split, streaming, name)
        return find_pictures(rows, image_column, None, image_root, name)
    paths = _find_files(name)
    endings = {_check_ending(path) for path in paths}
    if len(endings) > 1:
        raise ValueError(f"{name} are files with the endings {', '.join(sorted(endings))}. Give files of one ending.")
    (ending,) = endings
    if (annotations := _read_annotations(paths, ending)) is not None:
        rows = concatenate({path: _make_rows(Path(path), found, image_root) for path, found in annotations.items()})
        splits = split_by_column(rows["split"]) if "split" in rows.column_names else {}
        rows = select_split(rows, splits, split, name)
        return rows.to_iterable_dataset() if streaming else rows
    if streaming and split != "train":
        raise ValueError(f"{name} has no splits, but {split!r} was asked for with streaming. Leave the split out.")
    rows = concatenate(dict(_load_groups(paths, ending, streaming, image_column, image_root, name)))
    return rows if streaming else select_split(rows, {}, split, name)


def concatenate(parts: Mapping[str, Any]) -> Any:
    """Put the rows of files together, by what errors call each of them."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    types: dict[str, tuple[Any, str]] = {}
    found = {name: _with_plain_strings(part) for name, part in parts.items()}
    for name, part in found.items():
        for column, feature in (part.features or {}).items():
            other, where = types.setdefault(column, (feature, name))
            if _is_empty(found[where], column):
                types[column] = feature, name
            elif feature != other and not _is_empty(part, column):
                raise ValueError(
                    f"The column {column!r} is {other} in {where}, and {feature} in {name}. Give it one type."
                )
    for name, part in found.items():
        # CSV takes what is empty for numbers
        guessed = [column for column, feature in (part.features or {}).items() if feature != types[column][0]]
        found[name] = part.remove_columns(guessed)
    return datasets.concatenate_datasets(list(found.values()))


def _with_plain_strings(rows: Rows) -> Rows:
    """Return rows whose texts have the type that JSON gives them."""
    for name, feature in (rows.features or {}).items():
        if feature == datasets.Value("large_string"):
            rows = rows.cast_column(name, datasets.Value("string"))
    return rows


def _is_empty(rows: Rows, column: str) -> bool:
    return isinstance(rows, datasets.Dataset) and rows.data.column(column).null_count == len(rows.data)


def _make_rows(path: Path, rows: list[dict[str, Any]], image_root: str | os.PathLike | None) -> Rows:
    """Make rows of a file of annotations, with the paths of their pictures."""
    own = _COCO.fullmatch(path.name)
    # COCO's file lies in annotations/, beside train2017/, and Flickr8k's beside Images/
    subfolders = ("", own[1], f"../{own[1]}") if own else ("", "Images")
    return find_pictures(datasets.Dataset.from_list(rows), "image", path.parent, image_root, str(path), subfolders)


def _load_groups(
    paths: list[str],
    ending: str,
    streaming: bool,
    image_column: str | None,
    image_root: str | os.PathLike | None,
    name: str,
) -> Iterator[tuple[str, Rows]]:
    """Yield the rows of tables, together those of files in one folder, from which their pictures' paths start."""
    if ending == ".tar":
        with errors_that_name(name):
            yield name, load_shards([glob.escape(path) for path in paths], paths, "train", streaming)
        return
    for folder, group in itertools.groupby(paths, os.path.dirname):
        files = list(group)
        rows = _load(ending, [glob.escape(path) for path in files], "train", streaming, name)
        yield files[0], find_pictures(rows, image_column, Path(folder), image_root, name)


def _load(ending: str, files: str | list[str], split: str, streaming: bool, name: str) -> Rows:
    builder, kwargs = _BUILDERS[ending]
    with errors_that_name(name):
        rows = datasets.load_dataset(builder, data_files=files, split=split, streaming=streaming, **kwargs)
        if streaming:
            columns = list(next(iter(without_decoding(rows))))
        else:
            rows.data.validate(full=True)  # Arrow reads JSON without a look at its encoding
            columns = rows.column_names
        if builder == "csv" and any(column.startswith("__index_level_") for column in columns):
            # pandas takes them for the names of the rows
            raise ValueError("Expected as many fields as the header has, saw more in the first row")
        return rows


def _read_annotations(paths: Sequence[str], ending: str) -> dict[str, list[dict[str, Any]]] | None:
    """Return the rows of files of annotations, by their paths, or `None` if they are tables."""
    if ending not in (".json", *_TEXTS):
        return None
    read = read_json_annotations if ending == ".json" else read_text_annotations
    found = {}
    for path in paths:
        try:
            rows = read(Path(path))
        except (UnicodeDecodeError, EOFError, csv.Error) as error:
            raise _unreadable(path, str(error)) from error
        if rows is not None:
            found[path] = rows
    if found and len(found) < len(paths):
        raise ValueError(f"{next(iter(found))} has annotations, and other files beside it are tables. Give one kind.")
    return found or None


def find_annotated_splits(name: str) -> list[str]:
    """Return the splits of a file of annotations, such as Karpathy's."""
    if table_ending(name) != ".json" or not os.path.isfile(name):
        return []
    rows = read_json_annotations(Path(name)) or []
    return list(split_by_column(row["split"] for row in rows if "split" in row))


@contextmanager
def errors_that_name(name: str) -> Iterator[None]:
    """Turn what `datasets` raises about a broken file into one line, which is an error that names the file."""
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error says the same
    try:
        yield
    except (CollectionError, ImportError, MemoryError):
        raise
    except Exception as error:  # the readers of `datasets` raise whatever they like
        reason = error.__cause__ if isinstance(error, datasets.exceptions.DatasetBuildError) else error
        if isinstance(reason, OSError) and reason.errno is not None:  # a full disk, or no permission
            raise
        if _WRONG_SPLIT.match(str(reason)):
            raise ValueError(f"{name}: {_first_line(reason)}") from error
        is_empty = isinstance(reason, StopIteration) or "corresponds to no data" in str(reason)
        raise _unreadable(name, "there are no rows in it" if is_empty else str(reason)) from error
    finally:
        datasets.logging.set_verbosity(level)


def _unreadable(name: str, reason: str) -> ValueError:
    line = _first_line(reason or "it is empty").rstrip(".")
    is_ragged = "fields" in line and "saw" in line  # of pandas
    hint = (
        "Put texts that have the separator in them in quotes." if is_ragged else "Is the file complete, and in UTF-8?"
    )
    return ValueError(f"{name} can't be read: {line}. {hint}")


def _first_line(text: object) -> str:
    return str(text).strip().partition("\n")[0]


def _check_ending(name: str) -> str:
    if (ending := table_ending(name)) is None:
        raise ValueError(
            f"{name}: a file with one of the endings {ENDINGS} was expected, or a folder of pictures. Tables of text "
            "may also be compressed (.gz)."
        )
    return ending


def _find_files(name: str) -> list[str]:
    """Return the paths of the files that a name means, in which `*` may stand for any characters."""
    if os.path.isfile(name):
        return [name]
    if not (paths := sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))):
        raise FileNotFoundError(f"no file is called {name}.")
    return paths
