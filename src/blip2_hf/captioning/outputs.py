"""
Files of captions, safe to be killed over: while a run lasts, each process appends to a part of its own; at the end the
parts become one file.
"""

import heapq
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from .captions import PictureCaption
from .pictures import CollectionError, FolderPictures, Pictures


CAPTION = "caption"
REASON = "reason"  # of a picture that can't be read

_ROWS_PER_GROUP = 10_000  # of Parquet
_TYPES = {str: pa.string(), int: pa.int64()}


class CaptionOutput(ABC):
    r"""
    What a run writes: the result, and beside it `settings.json`, `broken.jsonl` and, until it is finished, the parts.

    Args:
        base (`Path`):
            What the names of the files beside the result begin with.
        pictures ([`Pictures`]):
            The pictures.
    """

    def __init__(self, base: Path, pictures: Pictures):
        self.base = base
        self.pictures = pictures
        self.settings = _beside(base, "settings.json")
        self.broken = _beside(base, "broken.jsonl")

    @property
    @abstractmethod
    def place(self) -> Path:
        """Where the captions are, for messages."""

    @abstractmethod
    def done(self) -> set[int]:
        """The pictures that have a caption, or were found broken in a run that was not finished."""

    @abstractmethod
    def remove_captions(self): ...

    @abstractmethod
    def check(self, settings: Mapping[str, Any]):
        """Raises a [`CollectionError`] where captions of other settings are."""

    def parts(self) -> list[Path]:
        found = self.base.parent.glob("*") if self.base.parent.is_dir() else ()
        pattern = re.compile(re.escape(self.base.name) + r"\.part-\d{5,}\.jsonl")
        return sorted(path for path in found if pattern.fullmatch(path.name))

    def has_parts(self) -> bool:
        """Whether a run that was not finished has left something in its parts."""
        return any(path.stat().st_size for path in self.parts())

    def next_part(self) -> int:
        numbers = [int(path.name.rpartition(".part-")[2].partition(".")[0]) for path in self.parts()]
        return max(numbers, default=-1) + 1

    def open_part(self, number: int) -> IO[bytes]:
        # A part of its own for each process of each run: within one, pictures stand in their order
        return open(_beside(self.base, f"part-{number:05d}.jsonl"), "xb")

    def write(self, part: IO[bytes], caption: PictureCaption):
        """Keeps a caption: what is written is out of this process, and stays if it is killed."""
        value = {CAPTION: caption.text} if caption.error is None else {REASON: caption.error}
        part.write(_to_line(self.pictures.identity(caption.index) | value))
        part.flush()

    def write_settings(self, settings: Mapping[str, Any]):
        self.settings.parent.mkdir(parents=True, exist_ok=True)
        with _Replacement(self.settings) as file:
            file.write(json.dumps(settings, indent=2).encode() + b"\n")

    def finish(self):
        """Makes the result of the parts."""
        parts = self.parts()
        if not parts:
            return
        broken = self.join(parts)
        if broken:
            with _Replacement(self.broken) as file:
                file.writelines(map(_to_line, broken))
        else:
            self.broken.unlink(missing_ok=True)
        for path in parts:
            path.unlink()

    @abstractmethod
    def join(self, parts: list[Path]) -> list[dict[str, Any]]:
        """Writes the captions; returns the records of pictures that are broken."""

    def in_order(self, *sources: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Records of several sources, each in the order of the pictures; those of pictures that are gone stay."""
        last = None
        positions = [_with_position(source, self.pictures) for source in sources]
        for _, record in heapq.merge(*positions, key=itemgetter(0)):
            identity = [record[name] for name in self.pictures.columns]
            # A run that was killed while it joined leaves records in the result and in a part
            if identity != last:
                yield record
            last = identity

    def clear(self):
        """Removes all that an earlier run left."""
        self.remove_captions()
        for path in (*self.parts(), self.broken, self.settings):
            path.unlink(missing_ok=True)


class CaptionFile(CaptionOutput):
    """Captions in one file, JSON lines or Parquet, that appears when the run is finished."""

    def __init__(self, path: Path, pictures: Pictures, output_format: str):
        super().__init__(path, pictures)
        self.path = path
        self.output_format = output_format

    @property
    def place(self) -> Path:
        return self.path

    def done(self) -> set[int]:
        sources = [self.results(), *map(_read_lines, self.parts())]
        positions = {self.pictures.position(record) for source in sources for record in source}
        return {position for position in positions if position is not None}

    def results(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return iter(())
        return _read_lines(self.path) if self.output_format == "jsonl" else _read_parquet(self.path)

    def remove_captions(self):
        self.path.unlink(missing_ok=True)

    def check(self, settings: Mapping[str, Any]):
        if self.settings.exists():
            # A run that failed at its first pictures binds no other
            if self.path.exists() or self.has_parts():
                _compare(self.place, json.loads(self.settings.read_text()), settings)
        elif self.path.exists():
            raise CollectionError(
                f"{self.path} is there already, without {self.settings.name}, which would tell what wrote it. Give "
                "another --output, or --overwrite to delete it."
            )

    def join(self, parts: list[Path]) -> list[dict[str, Any]]:
        broken: list[dict[str, Any]] = []
        records = self.in_order(self.results(), *map(_read_lines, parts))
        captions = _take_out_broken(records, broken)
        with _Replacement(self.path) as file:
            if self.output_format == "jsonl":
                file.writelines(map(_to_line, captions))
            else:
                _write_parquet(file, captions, self.pictures.columns)
            file.flush()
            os.fsync(file.fileno())  # the parts are deleted next
        return broken


class SidecarFiles(CaptionOutput):
    """A .txt for each picture of a folder: beside it, or at the same place in another folder."""

    def __init__(self, folder: Path | None, pictures: FolderPictures):
        self.folder = pictures.folder if folder is None else folder
        super().__init__(self.folder / "captions", pictures)
        self.sidecars = [self.folder / f"{os.path.splitext(name)[0]}.txt" for name in pictures.names]
        first: dict[Path, str] = {}
        for name, sidecar in zip(pictures.names, self.sidecars, strict=True):
            if sidecar in first:
                raise CollectionError(
                    f"{first[sidecar]} and {name} would both have the captions of {sidecar}. Take --format jsonl or "
                    "parquet, or rename one."
                )
            first[sidecar] = name

    @property
    def place(self) -> Path:
        return self.folder

    def done(self) -> set[int]:
        positions = {self.pictures.position(record) for path in self.parts() for record in _read_lines(path)}
        found = {index for index, sidecar in enumerate(self.sidecars) if sidecar.exists()}
        return found | {position for position in positions if position is not None}

    def remove_captions(self):
        for sidecar in self.sidecars:
            sidecar.unlink(missing_ok=True)

    def check(self, settings: Mapping[str, Any]):
        if self.settings.exists() and (self.has_parts() or any(self.folder.rglob("*.txt"))):
            _compare(self.place, json.loads(self.settings.read_text()), settings)

    def write(self, part: IO[bytes], caption: PictureCaption):
        if caption.text is None:
            super().write(part, caption)
            return
        sidecar = self.sidecars[caption.index]
        sidecar.parent.mkdir(parents=True, exist_ok=True)
        with _Replacement(sidecar) as file:
            file.write(caption.text.encode() + b"\n")

    def join(self, parts: list[Path]) -> list[dict[str, Any]]:
        return list(self.in_order(*map(_read_lines, parts)))


def open_output(output: str | os.PathLike | None, output_format: str | None, pictures: Pictures) -> CaptionOutput:
    r"""
    The output of a format, by default that of the ending of its name.

    Args:
        output (`str` or `os.PathLike`, *optional*):
            A file or, for .txt files, a folder: the one that the pictures are in if it is not given.
        output_format (`str`, *optional*):
            `"txt"`, `"jsonl"` or `"parquet"`.
        pictures ([`Pictures`]):
            The pictures.

    Raises:
        CollectionError: if the format does not go with the output or the pictures.
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


class _Replacement:
    """A file that takes its name when it is written to the end."""

    def __init__(self, path: Path):
        self.path = path
        self.temporary = path.with_name(f".{path.name}.tmp")

    def __enter__(self) -> IO[bytes]:
        self.file = open(self.temporary, "wb")  # noqa: SIM115
        return self.file

    def __exit__(self, kind, *error):
        self.file.close()
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink()


def _beside(base: Path, ending: str) -> Path:
    return base.with_name(f"{base.name}.{ending}")


def _to_line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _take_out_broken(records: Iterable[dict[str, Any]], broken: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for record in records:
        if CAPTION in record:
            yield record
        else:
            broken.append(record)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for line in file:
            # The last line of a process that was killed may lack its end
            if line.endswith(b"\n"):
                yield json.loads(line)


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS_PER_GROUP):
            yield from batch.to_pylist()


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


def _compare(place: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]):
    """The name of a model may change, not its weights."""
    names = {name for name in {*found, *wanted} if found.get(name) != wanted.get(name)}
    if names - {"model"}:
        details = "; ".join(f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} now" for name in sorted(names))
        raise CollectionError(
            f"{place} has captions that were made otherwise ({details}). Give the same options to go on with them, "
            "another --output, or --overwrite to delete them."
        )
