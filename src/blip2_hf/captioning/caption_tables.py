"""A table of captions in a file: JSON lines, CSV or Parquet. Columns that are there already stay."""

import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..jobs.atomic_files import atomic_file
from ..jobs.errors import StateFileError
from ..jobs.state_files import json_line, read_json_lines


_ROWS_PER_GROUP = 10_000  # of Parquet
_TYPES = {str: pa.string(), int: pa.int64(), list: pa.list_(pa.string())}
_TYPES |= {float: pa.float64(), list[float]: pa.list_(pa.float64())}


class CaptionTable(ABC):
    """
    A file of rows that have `columns`. `advice` is what the errors of a file that can't be read say to do, a sentence.
    """

    def __init__(self, path: Path, columns: Mapping[str, type], advice: str):
        self.path = path
        self.columns = columns
        self.advice = advice

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the rows that are there."""
        return self._read() if self.path.exists() else iter(())

    def write(self, rows: Iterable[dict[str, Any]], columns: Mapping[str, type]):
        """Write the file, whole: with the columns that it had, and `columns`, which are new or fill up."""
        with atomic_file(self.path) as file:
            self._write(file, rows, {**self.columns, **columns})

    @abstractmethod
    def _read(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of the file."""

    @abstractmethod
    def _write(self, file: IO[bytes], rows: Iterable[dict[str, Any]], columns: Mapping[str, type]):
        """Write rows to a new file, with the columns of the one that is there and `columns`."""

    def _check_columns(self, found: Iterable[str]):
        if missing := [name for name in self.columns if name not in found]:
            raise StateFileError(
                f"{self.path} has the columns {', '.join(found) or '(none)'}, and {', '.join(missing)} was expected. "
                f"{self.advice}"
            )

    def _unreadable(self, kind: str, error: Exception) -> StateFileError:
        return StateFileError(
            f"{self.path} can't be read as {kind} ({error}): it was cut off or changed. {self.advice}"
        )


class JsonLines(CaptionTable):
    """One object a line."""

    def _read(self) -> Iterator[dict[str, Any]]:
        expected = f"an object of JSON with {', '.join(self.columns)}"
        return read_json_lines(
            self.path,
            self.advice,
            expected,
            lambda row: isinstance(row, dict) and row.keys() >= {*self.columns},
            is_whole=True,
        )

    def _write(self, file: IO[bytes], rows: Iterable[dict[str, Any]], columns: Mapping[str, type]):
        file.writelines(map(_readable_line, rows))


class Csv(CaptionTable):
    """UTF-8, with commas; the first line has the names of the columns."""

    def _read(self) -> Iterator[dict[str, Any]]:
        try:
            with open(self.path, encoding="utf-8-sig", newline="") as file:  # spreadsheets write a mark in front
                reader = csv.DictReader(file)
                self._check_columns(reader.fieldnames or ())
                for row in reader:
                    if None in row:
                        raise ValueError(f"line {reader.line_num} has more cells than the first line")
                    if any(row[name] is None for name in self.columns):
                        raise ValueError(f"line {reader.line_num} has too few cells")
                    yield row | {name: kind(row[name]) for name, kind in self.columns.items()}
        except StateFileError:
            raise
        except (ValueError, TypeError, csv.Error) as error:
            raise self._unreadable("CSV", error) from error

    def _write(self, file: IO[bytes], rows: Iterable[dict[str, Any]], columns: Mapping[str, type]):
        names: list[str] = []
        if self.path.exists():
            with open(self.path, encoding="utf-8-sig", newline="") as found:
                names = list(csv.DictReader(found).fieldnames or ())
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.DictWriter(text, list(dict.fromkeys([*names, *columns])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text.detach()


class Parquet(CaptionTable):
    """Parquet, in groups of rows."""

    def _read(self) -> Iterator[dict[str, Any]]:
        try:
            with pq.ParquetFile(self.path) as file:
                self._check_columns(file.schema_arrow.names)
                for batch in file.iter_batches(_ROWS_PER_GROUP):
                    yield from batch.to_pylist()
        except pa.ArrowInvalid as error:
            raise self._unreadable("Parquet", error) from error

    def _write(self, file: IO[bytes], rows: Iterable[dict[str, Any]], columns: Mapping[str, type]):
        fields = {name: pa.field(name, _TYPES[kind]) for name, kind in columns.items()}
        # Without the metadata of the schema, in which `datasets` keeps the columns that there were
        found = list(pq.read_schema(self.path)) if self.path.exists() else []
        schema = pa.schema([*(fields.pop(field.name, field) for field in found), *fields.values()])
        rows = iter(rows)
        with pq.ParquetWriter(file, schema) as writer:
            while group := list(islice(rows, _ROWS_PER_GROUP)):
                writer.write_table(pa.Table.from_pylist(group, schema))


def _readable_line(row: dict[str, Any]) -> bytes:
    """Return a line in which people can read other letters than those of ASCII."""
    try:
        return f"{json.dumps(row, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:  # half a character
        return json_line(row)


TABLES: dict[str, type[CaptionTable]] = {"csv": Csv, "jsonl": JsonLines, "parquet": Parquet}
