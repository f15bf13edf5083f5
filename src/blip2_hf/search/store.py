"""
The files of an index, which is a folder of its own. A shard is `features-*.npy`, `pictures-*.json` and, if the tower's
output is stored, `embeds-*.npy`. The list of pictures is written last: a shard counts once all its files are there.
`index.json` says what made them. A picture has a number that no other ever has. The approximate index holds vectors
under these numbers, so it may lag behind.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..jobs.atomic_files import atomic_file, remove_leftovers, write_json
from ..jobs.errors import StateFileError
from ..jobs.output import check_still_there
from ..jobs.state_files import read_json, read_whole


DESCRIPTION = "index.json"
LOCK = ".lock"
LATEST = 2**63 - 1  # nanoseconds of a file's mtime, which an array holds: in the year 2262
UNREADABLE = "Delete it, and build the index again, which computes anew what is missing."

_VERSION = 1
_REBUILD = "Build the index anew, and name its model: model=MODEL, rebuild=True (--model MODEL --rebuild)."
_DESCRIBED = ("folder", "model", "store_embeds", "num_query_tokens", "image_text_hidden_size", "precision", "weights")
_BROKEN = "broken.json"
_SHARD_FILE = re.compile(r"(features|embeds|pictures)-(\d+)\.(?:npy|json)")
_APPROXIMATE_FILE = re.compile(r"approximate-(\d+)\.faiss")


def read_description(directory: Path) -> dict[str, Any]:
    """Return what made an index. Refuse a folder that has none, or one of another version."""
    path = directory / DESCRIPTION
    if not path.exists():
        raise FileNotFoundError(
            f"{directory} has no index. Name the folder of one (--index FOLDER), or build one: "
            "blip2-hf index FOLDER --model MODEL."
        )
    description = _read(path)
    if (found := description.get("version")) != _VERSION:
        raise ValueError(
            f"{path} has version {found}, but {_VERSION} was expected. Remove {directory}, and build it anew."
        )
    return _read(path, _DESCRIBED)


def _read(path: Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    return read_json(path, _REBUILD, keys)


def check_is_free(directory: Path):
    """Refuse a folder that has files, but no index."""
    if directory.exists() and not (directory / DESCRIPTION).exists():
        names = {path.name for path in directory.iterdir()}
        if any(name != LOCK and not name.endswith(".tmp") for name in names):
            raise ValueError(f"{directory} has files in it, but no index. Give a folder of its own to the index.")


def create_store(directory: Path, description: dict[str, Any]):
    """Make an empty index, in a folder of its own or in place of another index."""
    # Lists of pictures go first, because a shard with a list counts
    for path in sorted(directory.iterdir(), key=lambda path: not path.name.startswith("pictures-")):
        if _SHARD_FILE.fullmatch(path.name) or _APPROXIMATE_FILE.fullmatch(path.name) or path.name == _BROKEN:
            path.unlink()
    write_json(directory / DESCRIPTION, {"version": _VERSION, **description})


def _map_rows(path: Path, count: int) -> np.ndarray:
    """Map an array into memory, which fails if the file was cut off, and check its number of rows."""
    array = np.load(path, mmap_mode="r")
    if len(array) != count:
        raise ValueError(f"{count} rows were expected, got {len(array)}")
    return array


def _as_array(stats: Sequence[Sequence[int]]) -> np.ndarray:
    """Return sizes and mtimes as an array, of shape `(num_pictures, 2)`."""
    try:
        return np.array(stats, np.int64).reshape(-1, 2)
    except OverflowError:  # of an index that was written before times were limited
        return np.array([[size, min(mtime, LATEST)] for size, mtime in stats], np.int64)


@dataclass(eq=False)  # the same object, which lists of shards find without a look at the paths
class Shard:
    """Pictures whose features lie in one file: row by row their number, their path (`None`: gone), size and mtime."""

    number: int
    ids: list[int]
    paths: list[str | None]
    stats: np.ndarray  # not lists, of which millions make Python's garbage collection slow

    def alive(self) -> list[int]:
        return [row for row, path in enumerate(self.paths) if path is not None]


class Store:
    """The files of an index, and what is in them. Models are not known here."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.description = read_description(directory)
        self.has_embeds: bool = self.description["store_embeds"]
        self._arrays = ("features", "embeds") if self.has_embeds else ("features",)
        self.shards = self._read_shards()
        self._next_id = max([self.approximate_file()[1], *(max(shard.ids) + 1 for shard in self.shards)])
        self._rows: np.ndarray | None = None

    def _read_shards(self) -> list[Shard]:
        shards, seen = [], set()
        matches = filter(None, (_SHARD_FILE.fullmatch(path.name) for path in self.directory.iterdir()))
        # A run that was killed while it gathered shards has left pictures in two shards, of which the later counts
        for number in sorted((int(match[2]) for match in matches if match[1] == "pictures"), reverse=True):
            if all(self._path(name, number).exists() for name in self._arrays):
                columns = _read(self._path("pictures", number), ("ids", "paths", "stats"))
                paths = [None if picture in seen else picture for picture in columns["paths"]]
                seen.update(paths)
                shards.append(Shard(number, columns["ids"], paths, _as_array(columns["stats"])))
                for name in self._arrays:
                    read_whole(self._path(name, number), partial(_map_rows, count=len(paths)), UNREADABLE)
        return [shard for shard in reversed(shards) if shard.alive()]

    @property
    def rows(self) -> np.ndarray:
        """Return number, shard and row of each picture, of shape `(num_pictures, 3)`, in the order of shards."""
        if self._rows is None:
            parts = [np.empty((0, 3), np.int64)]
            for number, shard in enumerate(self.shards):
                alive = np.array(shard.alive(), np.int64)
                parts.append(np.stack([np.array(shard.ids)[alive], np.full_like(alive, number), alive], axis=1))
            self._rows = np.concatenate(parts)
        return self._rows

    def name(self, shard: int, row: int) -> str:
        """Return the path of a picture inside the folder."""
        return str(self.shards[shard].paths[row])

    def stats(self) -> dict[str, list[int]]:
        """Return size and mtime of each picture."""
        rows = ((shard, row, stats) for shard in self.shards for row, stats in enumerate(shard.stats.tolist()))
        return {path: stats for shard, row, stats in rows if (path := shard.paths[row]) is not None}

    def read(self, name: str, shard: int, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Read features or embeds of rows of a shard, in rising order."""
        path = self._path(name, self.shards[shard].number)
        if not path.exists():
            raise FileNotFoundError(f"{path} is gone: the index was changed after it was opened. Open it again.")
        count = len(self.shards[shard].ids)
        # If not all rows are wanted, the others are not read
        read = np.load if len(rows) == count else lambda path: _map_rows(path, count)[rows]
        return read_whole(path, read, UNREADABLE)

    def add(self, paths: list[str], stats: list[list[int]], parts: list[dict[str, np.ndarray]]):
        """Add a shard of new pictures."""
        first = self._next_id
        self._next_id += len(paths)
        shard = Shard(self._next_number(), list(range(first, first + len(paths))), list(paths), _as_array(stats))
        self._write_shard(shard, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})

    def _write_shard(self, shard: Shard, arrays: dict[str, np.ndarray]):
        for name, array in arrays.items():
            with atomic_file(self._path(name, shard.number)) as file:
                # Not into the file itself: NumPy's error of a full disk says nothing of either
                np.save(SimpleNamespace(write=file.write), array)
        self._write_pictures(shard)
        self.shards.append(shard)
        self._rows = None

    def _write_pictures(self, shard: Shard):
        columns = {"ids": shard.ids, "paths": shard.paths, "stats": shard.stats.tolist()}
        write_json(self._path("pictures", shard.number), columns, indent=None)

    def drop(self, paths: set[str]):
        """Leave pictures out."""
        self._rows = None
        for shard in [shard for shard in self.shards if not paths.isdisjoint(shard.paths)]:
            shard.paths = [None if path in paths else path for path in shard.paths]
            if shard.alive():
                self._write_pictures(shard)
            else:
                self._remove_shard(shard)

    def _remove_shard(self, shard: Shard):
        # Without its list of pictures a shard counts no more
        for name in ("pictures", "features", "embeds"):
            self._path(name, shard.number).unlink(missing_ok=True)
        self.shards.remove(shard)
        self._rows = None

    def gather_small_shards(self, rows_per_shard: int):
        """Make larger shards of those of which less than half is left, or that began small."""
        small = [shard for shard in self.shards if len(shard.alive()) <= rows_per_shard // 2]
        while len(small) > 1:
            group, room = [], rows_per_shard
            while small and len(small[0].alive()) <= room:
                room -= len(small[0].alive())
                group.append(small.pop(0))
            self._gather(group)

    def _gather(self, group: list[Shard]):
        """Put one shard in place of several. It counts as soon as it is there, by its number, which is the highest."""
        rows = [(shard, row) for shard in group for row in shard.alive()]
        ids, paths, stats = ([getattr(shard, name)[row] for shard, row in rows] for name in ("ids", "paths", "stats"))
        places = [(self.shards.index(shard), shard.alive()) for shard in group]
        arrays = {name: np.concatenate([self.read(name, *place) for place in places]) for name in self._arrays}
        gathered = Shard(self._next_number(), ids, paths, _as_array(stats))
        self._write_shard(gathered, arrays)
        for shard in group:
            self._remove_shard(shard)

    def remove_leftovers(self):
        """Remove files that a run which was killed has left unfinished, or was about to remove."""
        remove_leftovers(self.directory)
        numbers = {shard.number for shard in self.shards}
        newest, _ = self.approximate_file()
        for path in self.directory.iterdir():
            shard, is_approximate = _SHARD_FILE.fullmatch(path.name), _APPROXIMATE_FILE.fullmatch(path.name)
            if (shard and int(shard[2]) not in numbers) or (is_approximate and path != newest):
                path.unlink()

    def check_is_there(self):
        """Refuse an index whose files were removed while it was written."""
        names = ("pictures", *self._arrays)
        paths = [self._path(name, shard.number) for shard in self.shards for name in names]
        check_still_there([self.directory / DESCRIPTION, *paths], self.directory)

    def next_id(self) -> int:
        """Return the number of the next picture."""
        return self._next_id

    def _next_number(self) -> int:
        return self.shards[-1].number + 1 if self.shards else 0

    def _path(self, name: str, number: int) -> Path:
        return self.directory / f"{name}-{number:06d}.{'json' if name == 'pictures' else 'npy'}"

    def read_broken(self) -> dict[str, tuple[int, int, str]]:
        """Return size and mtime of the pictures that can't be read, and why."""
        path = self.directory / _BROKEN
        if not path.exists():
            return {}
        entries = _read(path).items()
        try:
            return {name: (size, mtime, reason) for name, (size, mtime, reason) in entries}
        except (TypeError, ValueError) as error:
            raise StateFileError(f"{path}: [size, mtime, reason] of each picture was expected. {_REBUILD}") from error

    def write_broken(self, broken: dict[str, tuple[int, int, str]]):
        """Write what `read_broken` will return."""
        if broken != self.read_broken():
            write_json(self.directory / _BROKEN, broken)

    def approximate_file(self) -> tuple[Path | None, int]:
        """Return the approximate index, and the number up to which pictures may be in it."""
        matches = [match for path in self.directory.iterdir() if (match := _APPROXIMATE_FILE.fullmatch(path.name))]
        covered = max((int(match[1]) for match in matches), default=0)
        return (self.new_approximate_file(covered) if matches else None), covered

    def new_approximate_file(self, covered: int) -> Path:
        """Return where an approximate index goes that has all pictures whose number is lower."""
        return self.directory / f"approximate-{covered:09d}.faiss"
