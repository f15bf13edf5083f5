"""
What a run writes captions to, safe to be killed over: while it lasts, each process appends to a part of its own; at
the end the parts become the result.

What there is already is skipped, overwritten, or added to. A run that overwrites or adds remembers which pictures it
has done, so that it can go on: in its parts, and, if it adds, in the file `added`, because a caption is added once.
"""

import heapq
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

from ..data.text import LONE_SURROGATE
from ..jobs.atomic_files import atomic_file, remove_leftovers, write_json
from ..jobs.errors import MadeOtherwiseError
from ..jobs.fingerprints import check_settings, check_settings_file
from ..jobs.output import raise_lost
from ..jobs.state_files import appended_lines, as_json, json_line, read_json, read_json_lines
from .captions import PictureCaption
from .pictures import Pictures


CAPTION = "caption"
BEFORE = "before"  # what was there, of a caption that takes its place or is added to it
CONFIDENCE = "confidence"  # of the model in a caption
REASON = "reason"  # of a picture that can't be read

_EXISTING, _EARLIER = "existing", "earlier"  # in the settings: of a run that overwrites or adds, and those before it
_FREE = ("model", _EXISTING, _EARLIER)  # settings that may differ
_OTHERWISE = (
    "Give the same options to go on with these captions, another output (--output), or existing='overwrite' "
    "(--overwrite) to replace them."
)


class CaptionOutput(ABC):
    """
    What a run writes: the result at `place`, and beside it `settings.json`, `broken.jsonl` and, until the run is
    finished, the parts. The names of these files begin with `base`. `existing` is what becomes of captions that are
    there, `num_captions` how many a picture gets.
    """

    def __init__(self, place: Path, base: Path, pictures: Pictures, existing: str, num_captions: int):
        self.place = place
        self.base = base
        self.pictures = pictures
        self.existing = existing
        self.is_list = num_captions > 1
        self.settings = _beside(base, "settings.json")
        self.broken = _beside(base, "broken.jsonl")
        self.added = _beside(base, "added.jsonl")
        self.lock = base.with_name(f".{base.name.lstrip('.')}.lock")
        self._found: dict[str, Any] = {}  # settings of what is there
        self._begins = False  # whether this run is the first to overwrite, or to add these captions

    @property
    def adds(self) -> bool:
        return self.existing in ("append", "prepend")

    @abstractmethod
    def has_captions(self) -> bool:
        """Tell whether there are captions whose settings count. A run that failed at its first pictures has none."""

    @abstractmethod
    def captioned(self) -> Iterator[int]:
        """Yield the pictures that have a caption in the result, which is not empty."""

    @abstractmethod
    def named(self) -> Iterator[int]:
        """Yield the pictures that the result names, also those of which the model wrote nothing."""

    def check(self, settings: Mapping[str, Any]):
        """Refuse captions that other settings made, unless they are overwritten or added to."""
        found = self._found = self._read_settings()
        was_stopped = found.get(_EXISTING) == "overwrite" or (_EXISTING in found and self.has_parts())
        if self.existing == "skip" and was_stopped:
            self.existing = found[_EXISTING]  # it goes on
            check_settings(found, settings, self.place, _OTHERWISE, _FREE)
        elif self.existing == "skip" and self.has_captions():
            if found:
                check_settings(found, settings, self.place, _OTHERWISE, _FREE)
            else:
                check_settings_file(self.settings, settings, self.place, _OTHERWISE, _FREE)
        elif self.existing != "skip":
            given = as_json(settings) | {_EXISTING: self.existing}
            self._begins = any(found.get(key) != given.get(key) for key in {*found, *given} - {"model", _EARLIER})
            if self._begins and self.adds:
                self._check_can_add(found)

    def _check_can_add(self, found: Mapping[str, Any]):
        if self.has_parts():
            raise MadeOtherwiseError(
                f"{self.place} is not finished: a run with other options was stopped. Give these, with which it ends, "
                "before captions are added, or --overwrite."
            )
        if found:
            data = self.pictures.describe()
            check_settings({name: found.get(name) for name in data}, data, self.place, _OTHERWISE)

    def _read_settings(self) -> dict[str, Any]:
        """Return the settings of what is there. A run that has not overwritten or added anything does not count."""
        if not self.settings.exists():
            return {}
        advice = f"It says what made {self.place}: restore it, or delete both. {_OTHERWISE}"
        found = read_json(self.settings, advice)
        has_begun = _EXISTING not in found or self.has_parts() or self.added.exists()
        return found if has_begun else found.get(_EARLIER, {})

    def done(self) -> set[int]:
        """Return the pictures that this run need not look at, those that an unfinished one found broken too."""
        records = chain(self.read(self.added) if self.adds else (), *map(self.read, self.parts()))
        positions = (self.pictures.position(record) for record in records)
        there = self.captioned() if self.existing == "skip" else ()
        return {position for position in chain(there, positions) if position is not None}

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

    def write(self, add: Callable[[Any], None], caption: PictureCaption) -> bool:
        """Keep a caption, also if this process is killed after that. Return whether there is one."""
        record = self.record(caption)
        add(record)
        return CAPTION in record

    def record(self, caption: PictureCaption) -> dict[str, Any]:
        """Return what a part says of a picture: what its caption is to be, and what it was if that is added to."""
        identity = self.pictures.identity(caption.index)
        if caption.error is not None:
            return identity | {REASON: caption.error}
        new = self.value(caption.texts)
        added = {} if caption.confidences is None else {CONFIDENCE: self.value(caption.confidences)}
        before = None if self.existing == "skip" else self.before(caption.index)
        if before is None:
            return identity | {CAPTION: new} | added
        if self.adds:
            if isinstance(before, str) and LONE_SURROGATE.search(before):
                return identity | {REASON: "Its text is not in UTF-8, and no caption can be added. Save it as UTF-8."}
            new = self.joined(*((before, new) if self.existing == "append" else (new, before)))
        return identity | {CAPTION: new} | added | {BEFORE: before}

    @abstractmethod
    def before(self, index: int) -> Any:
        """Return the caption that a picture has; `None` without one."""

    def value(self, texts: list[Any]) -> Any:
        """Return captions, or what belongs to them, as the result has them."""
        return texts if self.is_list else texts[0]

    def joined(self, first: Any, second: Any) -> Any:
        """Return captions that one picture has, as the result has them."""
        return first + second if self.is_list else join_texts(first, second)

    def prepare(self, settings: Mapping[str, Any]):
        """Remove what runs that were killed left unfinished, and say what the captions are made with."""
        for folder in self.folders():
            remove_leftovers(folder)
        if self._begins:
            for path in (*self.parts(), self.added):
                path.unlink(missing_ok=True)
        kept = {name: self._found[name] for name in (_EXISTING, _EARLIER) if name in self._found}
        if self._begins:
            earlier = {name: value for name, value in self._found.items() if name not in kept}
            kept = {_EXISTING: self.existing, **({_EARLIER: earlier} if earlier else {})}
        write_json(self.settings, {**settings, **kept})

    def folders(self) -> set[Path]:
        """Return the folders that are written to."""
        return {self.base.parent}

    def finish(self, settings: Mapping[str, Any]):
        """Make the result of the parts."""
        parts = self.parts()
        if parts:
            broken: list[dict[str, Any]] = []
            self.join(parts, broken)
            self._write_lines(self.broken, broken)
        if parts and self.adds:
            # Last, because what is known as added is not added again
            records = self.in_order(self.read(self.added), *map(self.read, parts))
            self._write_lines(self.added, list(without_broken(records, [])))
        if self.existing == "overwrite":
            write_json(self.settings, settings)
        elif self.adds and self.added.exists():
            write_json(self.settings, {**settings, _EXISTING: self.existing})
        for path in parts:
            path.unlink()

    def _write_lines(self, path: Path, records: list[dict[str, Any]]):
        if not records:
            path.unlink(missing_ok=True)
            return
        with atomic_file(path) as file:
            file.writelines(map(json_line, records))

    def check_complete(self):
        """Refuse to call a run finished that has left pictures without a caption and without a reason."""
        found = {*self.named(), *(self.pictures.position(record) for record in self.read(self.broken))}
        # By their names, because names that are not Unicode may become equal
        identities = (self.pictures.identity(index) for index in range(len(self.pictures)))
        if missing := sum(self.pictures.position(identity) not in found for identity in identities):
            raise_lost(self.place, f"{missing:,} of {len(self.pictures):,} pictures have no caption there")

    def read(self, path: Path) -> Iterator[dict[str, Any]]:
        """Return the records of a file of lines, such as a part; none if there is no such file."""
        if not path.exists():
            return iter(())
        return read_json_lines(
            path,
            "Delete the file or that line: its pictures are captioned again.",
            f"an object of JSON with {', '.join(self.pictures.columns)}",
            lambda record: isinstance(record, dict) and record.keys() >= self.pictures.columns.keys(),
        )

    @abstractmethod
    def join(self, parts: list[Path], broken: list[dict[str, Any]]):
        """Write the captions of the parts into the result, and add the records of broken pictures to `broken`."""

    def in_order(self, *sources: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the records of sources, each in the order of the pictures, without those that stand twice."""
        last = None
        positions = [with_position(source, self.pictures) for source in sources]
        for _, record in heapq.merge(*positions, key=itemgetter(0)):
            identity = self.key(record)
            if identity != last:
                yield record
            last = identity

    def key(self, record: Mapping[str, Any]) -> tuple:
        return tuple(record[name] for name in self.pictures.columns)


def join_texts(first: str, second: str) -> str:
    """Return two captions as one: with a comma, as lists of tags have it, or as sentences."""
    first, second = first.strip(), second.strip()
    if not first or not second:
        return first or second
    return f"{first}{' ' if first.endswith(tuple('.,;:!?')) else ', '}{second}"


def _beside(base: Path, ending: str) -> Path:
    return base.with_name(f"{base.name}.{ending}")


def without_broken(records: Iterable[dict[str, Any]], broken: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the records that have a caption, and add the others to `broken`."""
    for record in records:
        if CAPTION in record:
            yield record
        else:
            broken.append(record)


def with_position(records: Iterable[dict[str, Any]], pictures: Pictures) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield records with numbers that never fall. Those of pictures that are gone stay where they are."""
    last = -1
    for record in records:
        position = pictures.position(record)
        last = last if position is None else max(last, position)
        yield last, record
