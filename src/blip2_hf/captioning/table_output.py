"""Captions in one file, a table."""

import heapq
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

from ..data.text import has_text
from ..jobs.errors import CollectionError
from .caption_output import BEFORE, CAPTION, CONFIDENCE, CaptionOutput, with_position, without_broken
from .caption_tables import TABLES
from .pictures import Pictures


METADATA = {f"metadata.{ending}" for ending in TABLES}  # names that `datasets` looks for in a folder of pictures

_CAPTIONED_AGAIN = "Restore it, or delete the file or that line: its pictures are captioned again."
_MEND = "Mend it, or give another output (--output)."


class CaptionFile(CaptionOutput):
    """
    Captions in one file, JSON lines, CSV or Parquet, that appears when the run is finished. If it is a `metadata` file
    of a folder of pictures, it may be the user's, with captions, rows and columns that stay.
    """

    def __init__(
        self,
        path: Path,
        output_format: str,
        pictures: Pictures,
        existing: str,
        num_captions: int,
        with_confidence: bool = False,
    ):
        self.is_metadata = path.name in METADATA
        # `datasets` reads no hidden files
        base = path.with_name(f".{path.name}") if self.is_metadata else path
        super().__init__(path, base, pictures, existing, num_captions)
        self.written: dict[str, Any] = {CAPTION: list if self.is_list else str}
        if with_confidence:
            self.written[CONFIDENCE] = list[float] if self.is_list else float
        self.table = TABLES[output_format](path, pictures.columns, _MEND if self.is_metadata else _CAPTIONED_AGAIN)
        self._before: dict[int, Any] | None = None

    def results(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of the result. A row without a caption, or with an empty one, has `None`."""
        kind = list if self.is_list else str
        for row in self.table.read():
            if CAPTION in row and not has_text(row[CAPTION]):
                row[CAPTION] = None
            found = row.get(CAPTION)
            if found is not None and not isinstance(found, kind):
                expected = "a list of captions" if self.is_list else "one text"
                raise CollectionError(
                    f"{self.place} has captions such as {found!r}, and {expected} was expected for each picture "
                    "(num_captions, --captions-per-image). Give another output (--output)."
                )
            yield row

    def check(self, settings: Mapping[str, Any]):
        super().check(settings)
        for _ in self.results():  # what does not fit is told before anything is written
            pass

    def has_captions(self) -> bool:
        # Without settings, metadata are those of the user
        return self.has_parts() or (bool(self._found) if self.is_metadata else self.place.exists())

    def captioned(self) -> Iterator[int]:
        return self._positions(row for row in self.results() if row.get(CAPTION) is not None)

    def named(self) -> Iterator[int]:
        return self._positions(self.results())

    def _positions(self, rows: Iterable[dict[str, Any]]) -> Iterator[int]:
        return (position for row in rows if (position := self.pictures.position(row)) is not None)

    def before(self, index: int) -> Any:
        if self._before is None:
            found = ((self.pictures.position(row), row.get(CAPTION)) for row in self.results())
            self._before = {position: text for position, text in found if position is not None}
        return self._before.get(index)

    def join(self, parts: list[Path], broken: list[dict[str, Any]]):
        # What is overwritten goes, also of pictures that are gone, unless there may be more than captions
        stays = self.is_metadata or self.existing != "overwrite"
        there = {self.key(row) for row in self.results()} if stays else set()
        written = (record for part in parts for record in self.read(part) if CAPTION in record)
        updates = {key: record for record in written if (key := self.key(record)) in there}
        new = (record for record in self.in_order(*map(self.read, parts)) if self.key(record) not in updates)
        new = map(_as_row, without_broken(new, broken))
        old = (self._updated(row, updates.get(self.key(row))) for row in (self.results() if stays else ()))
        sources = [with_position(source, self.pictures) for source in (old, new)]
        rows = (row for _, row in heapq.merge(*sources, key=itemgetter(0)))
        self.table.write(rows, self.written)

    def _updated(self, row: dict[str, Any], record: dict[str, Any] | None) -> dict[str, Any]:
        """Return a row with its new caption, unless it has that already, or another one that was not known."""
        if record is None or (self.existing != "overwrite" and row.get(CAPTION) != record.get(BEFORE)):
            return row
        return {**row, **{name: record[name] for name in self.written}}


def _as_row(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record of a part as a row."""
    return {name: value for name, value in record.items() if name != BEFORE}
