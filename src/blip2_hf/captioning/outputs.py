"""
Files of captions, safe to be killed over: while a run lasts, each process appends to a part of its own; at the end the
parts become one file.
"""

import heapq
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..jobs.atomic_files import atomic_file, remove_leftovers, write_json, write_text
from ..jobs.errors import CollectionError, StateFileError
from ..jobs.fingerprints import check_settings_file
from ..jobs.output import raise_lost
from ..jobs.state_files import appended_lines, json_line, read_json_lines
from .captions import PictureCaption
from .pictures import FolderPictures, Pictures


CAPTION = "caption"
REASON = "reason"  # of a picture that can't be read

_ROWS_PER_GROUP = 10_000  # of Parquet
_TYPES = {str: pa.string(), int: pa.int64()}
_OTHERWISE = (
    "Give the same options to go on with these captions, another output (--output), or overwrite=True (--overwrite) "
    "to delete them."
)


class CaptionOutput(ABC):
    """
    What a run writes: the result at `place`, and beside it `settings.json`, `broken.jsonl` and, until the run is
    finished, the parts. The names of these files begin with `base`.
    """

    def __init__(self, place: Path, base: Path, pictures: Pictures):
        self.place = place
        self.base = base
        self.pictures = pictures
        self.settings = _beside(base, "settings.json")
        self.broken = _beside(base, "broken.jsonl")
        self.lock = base.with_name(f".{base.name}.lock")

    @abstractmethod
    def remove_captions(self): ...

    @abstractmethod
    def has_captions(self) -> bool:
        """Tell whether there are captions whose settings count. A run that failed at its first pictures has none."""

    def check(self, settings: Mapping[str, Any]):
        """Refuse captions that other settings made."""
        if self.has_captions():
            check_settings_file(self.settings, settings, self.place, _OTHERWISE, free=("model",))

    def results(self) -> Iterator[dict[str, Any]]:
        """Yield the records of a result that is one file."""
        return iter(())

    def done(self) -> set[int]:
        """Return the pictures that have a caption, or were found broken in a run that was not finished."""
        records = chain(self.results(), *map(self.read, self.parts()))
        positions = {self.pictures.position(record) for record in records}
        return {position for position in positions if position is not None}

    def parts(self) -> list[Path]:
        pattern = re.compile(re.escape(self.base.name) + r"\.part-\d{5,}\.jsonl")
        return sorted(path for path in self.base.parent.glob("*") if pattern.fullmatch(path.name))

    def has_parts(self) -> bool:
        """Tell whether a run that was not finished has left something in its parts."""
        return any(path.stat().st_size for path in self.parts())

    def next_part(self) -> int:
        numbers = [int(path.name.rpartition(".part-")[2].partition(".")[0]) for path in self.parts()]
        return max(numbers, default=-1) + 1

    def open_part(self, number: int) -> AbstractContextManager[Callable[[Any], None]]:
        # A part of its own for each process of each run: within one, pictures stand in their order
        return appended_lines(_beside(self.base, f"part-{number:05d}.jsonl"))

    def write(self, add: Callable[[Any], None], caption: PictureCaption):
        """Keep a caption, also if this process is killed after that."""
        value = {CAPTION: caption.text} if caption.error is None else {REASON: caption.error}
        add(self.pictures.identity(caption.index) | value)

    def prepare(self, settings: Mapping[str, Any]):
        """Remove what runs that were killed left unfinished, and say what the captions are made with."""
        for folder in self.folders():
            remove_leftovers(folder)
        write_json(self.settings, settings)

    def folders(self) -> set[Path]:
        """Return the folders that are written to."""
        return {self.base.parent}

    def finish(self):
        """Make the result of the parts."""
        parts = self.parts()
        if not parts:
            return
        broken = self.join(parts)
        if broken:
            with atomic_file(self.broken) as file:
                file.writelines(map(json_line, broken))
        else:
            self.broken.unlink(missing_ok=True)
        for path in parts:
            path.unlink()

    def check_complete(self):
        """Refuse to call a run finished that has left pictures without a caption and without a reason."""
        broken = self.read(self.broken) if self.broken.exists() else ()
        found = self.done() | {self.pictures.position(record) for record in broken}
        # By their names, because names that are not Unicode may become equal
        identities = (self.pictures.identity(index) for index in range(len(self.pictures)))
        if missing := sum(self.pictures.position(identity) not in found for identity in identities):
            raise_lost(self.place, f"{missing:,} of {len(self.pictures):,} pictures have no caption there")

    def read(self, path: Path) -> Iterator[dict[str, Any]]:
        """Return the records of a file of lines."""
        return read_json_lines(
            path,
            "Delete the file or that line: its pictures are captioned again.",
            f"an object of JSON with {', '.join(self.pictures.columns)}",
            lambda record: isinstance(record, dict) and record.keys() >= self.pictures.columns.keys(),
        )

    @abstractmethod
    def join(self, parts: list[Path]) -> list[dict[str, Any]]:
        """Write the captions, and return the records of pictures that are broken."""

    def in_order(self, *sources: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the records of sources, each in the order of the pictures. Those of pictures that are gone stay."""
        last = None
        positions = [_with_position(source, self.pictures) for source in sources]
        for _, record in heapq.merge(*positions, key=itemgetter(0)):
            identity = [record[name] for name in self.pictures.columns]
            # A run that was killed while it joined leaves records in the result and in a part
            if identity != last:
                yield record
            last = identity

    def clear(self):
        """Remove all that an earlier run left."""
        self.remove_captions()
        for path in (*self.parts(), self.broken, self.settings):
            path.unlink(missing_ok=True)


class CaptionFile(CaptionOutput):
    """Captions in one file, JSON lines or Parquet, that appears when the run is finished."""

    def __init__(self, path: Path, pictures: Pictures, output_format: str):
        super().__init__(path, path, pictures)
        self.output_format = output_format

    def results(self) -> Iterator[dict[str, Any]]:
        if not self.place.exists():
            return iter(())
        return self.read(self.place) if self.output_format == "jsonl" else _read_parquet(self.place)

    def remove_captions(self):
        self.place.unlink(missing_ok=True)

    def has_captions(self) -> bool:
        return self.place.exists() or self.has_parts()

    def join(self, parts: list[Path]) -> list[dict[str, Any]]:
        broken: list[dict[str, Any]] = []
        records = self.in_order(self.results(), *map(self.read, parts))
        captions = _take_out_broken(records, broken)
        with atomic_file(self.place) as file:
            if self.output_format == "jsonl":
                file.writelines(map(json_line, captions))
            else:
                _write_parquet(file, captions, self.pictures.columns)
        return broken


class SidecarFiles(CaptionOutput):
    """A .txt for each picture of a folder: beside it, or at the same place in another folder."""

    def __init__(self, folder: Path | None, pictures: FolderPictures):
        self.folder = pictures.folder if folder is None else folder
        super().__init__(self.folder, self.folder / "captions", pictures)
        self.sidecars = [self.folder / f"{os.path.splitext(name)[0]}.txt" for name in pictures.names]
        first: dict[Path, str] = {}
        for name, sidecar in zip(pictures.names, self.sidecars, strict=True):
            if sidecar in first:
                raise CollectionError(
                    f"{first[sidecar]} and {name} would both have the captions of {sidecar}. Take --format jsonl or "
                    "parquet, or rename one."
                )
            first[sidecar] = name

    def done(self) -> set[int]:
        return super().done() | {index for index, sidecar in enumerate(self.sidecars) if sidecar.exists()}

    def remove_captions(self):
        for sidecar in self.sidecars:
            sidecar.unlink(missing_ok=True)

    def has_captions(self) -> bool:
        # Without settings, texts beside pictures are those of the user
        return self.has_parts() or (self.settings.exists() and any(self.folder.rglob("*.txt")))

    def folders(self) -> set[Path]:
        return {self.folder, *(path.parent for path in self.sidecars)}

    def write(self, add: Callable[[Any], None], caption: PictureCaption):
        if caption.text is None:
            super().write(add, caption)
            return
        sidecar = self.sidecars[caption.index]
        sidecar.parent.mkdir(parents=True, exist_ok=True)
        write_text(sidecar, f"{caption.text}\n")

    def join(self, parts: list[Path]) -> list[dict[str, Any]]:
        return list(self.in_order(*map(self.read, parts)))


def open_output(output: str | os.PathLike | None, output_format: str | None, pictures: Pictures) -> CaptionOutput:
    """
    Return the output of a format, by default the one that the ending of its name tells. Without `output`, .txt files
    lie in the folder of the pictures.
    """
    path = None if output is None else Path(output)
    suffix = "" if path is None else path.suffix
    output_format = output_format or {".jsonl": "jsonl", ".parquet": "parquet", "": "txt"}.get(suffix)
    if output_format not in ("txt", "jsonl", "parquet"):
        raise CollectionError(
            f"{output}: the ending does not tell the format. Name a file that ends in .jsonl or .parquet, or give "
            "--format txt, jsonl or parquet."
        )
    if output_format != "txt":
        if path is None or path.is_dir():
            raise CollectionError(
                f"--format {output_format} needs the name of a file, --output captions.{output_format}."
            )
        return CaptionFile(path, pictures, output_format)
    if not isinstance(pictures, FolderPictures):
        raise CollectionError(
            "A .txt for each picture needs a folder of pictures. Give --output a file that ends in .jsonl or .parquet."
        )
    if path is not None and path.is_file():
        raise CollectionError(f"{path} is a file, and --format txt needs a folder. Give another --output.")
    return SidecarFiles(path, pictures)


def _beside(base: Path, ending: str) -> Path:
    return base.with_name(f"{base.name}.{ending}")


def _take_out_broken(records: Iterable[dict[str, Any]], broken: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for record in records:
        if CAPTION in record:
            yield record
        else:
            broken.append(record)


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_PER_GROUP):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise StateFileError(
            f"{path} can't be read as Parquet ({error}): it was cut off or changed. Restore it, or delete it: its "
            "pictures are captioned again."
        ) from error


def _write_parquet(file: IO[bytes], records: Iterable[dict[str, Any]], columns: Mapping[str, type]):
    schema = pa.schema({name: _TYPES[kind] for name, kind in {**columns, CAPTION: str}.items()})
    records = iter(records)
    with pq.ParquetWriter(file, schema) as writer:
        while group := list(islice(records, _ROWS_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema))


def _with_position(records: Iterable[dict[str, Any]], pictures: Pictures) -> Iterator[tuple[int, dict[str, Any]]]:
    last = -1
    for record in records:
        position = pictures.position(record)
        last = last if position is None else position
        yield last, record
