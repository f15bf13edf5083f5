"""The result of CapFilt: Parquet files, a dataset once all of them are there, and what became of rows and captions."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.bad_rows import BadRow, report_bad_rows
from ..jobs.atomic_files import atomic_file, remove_leftovers, rename, write_json
from ..jobs.errors import MadeOtherwiseError, StateFileError
from ..jobs.fingerprints import check_settings_file
from ..jobs.output import check_still_there
from ..jobs.picture_inputs import split_rows
from .captioned_pictures import CaptionedPicture, bad_row, has_words
from .ranking import RankedCaption


_SETTINGS = "capfilt.json"
_LEFT_OUT = "left_out.jsonl"
_DATA = "data"
_UNFINISHED = ".unfinished"  # hidden: half a dataset must not load as if it were whole
_REPORT = "blip2_hf.capfilt"  # of a file, in its metadata
_GROUP_BYTES = 2**26
_NOTHING_KEPT = "no caption kept"  # a kind of bad rows


@dataclass
class CapFiltCounts:
    r"""
    What [`capfilt_dataset`] did, over all processes and runs.

    Args:
        rows (`int`):
            Rows of the dataset.
        left_out (`int`):
            Those that are not in the result: their picture can't be read, or no caption of theirs is kept.
        originals (`int`):
            Captions that the pictures came with, each different one of a picture once, that were ranked.
        originals_kept (`int`):
            Those that are kept.
        originals_empty (`int`):
            Captions without a word, and rows without a caption.
        proposals (`int`):
            Captions that were proposed and ranked, each different one of a picture once, without its originals.
        proposals_kept (`int`):
            Those that are kept.
    """

    rows: int = 0
    left_out: int = 0
    originals: int = 0
    originals_kept: int = 0
    originals_empty: int = 0
    proposals: int = 0
    proposals_kept: int = 0

    def add(self, other: "CapFiltCounts"):
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    def summary(self) -> str:
        """Return a report for people."""
        dropped = self.originals - self.originals_kept
        return (
            f"{self.rows - self.left_out:,} of {self.rows:,} rows are in the result.\n"
            f"Original captions: {self.originals_kept:,} kept, {dropped:,} dropped, {self.originals_empty:,} empty.\n"
            f"Proposed captions: {self.proposals_kept:,} kept of {self.proposals:,} different ones."
        )


@dataclass
class ShardReport:
    """Counts of the rows of a file, which are stored in its metadata."""

    counts: CapFiltCounts = field(default_factory=CapFiltCounts)
    left_out: list[BadRow] = field(default_factory=list)

    def add_row(self, row: CaptionedPicture, ranked: list[RankedCaption], kept: int, min_score: float | None):
        """Count a row, of whose candidates the first `kept` are kept."""
        self.counts.rows += 1
        if kept == 0:
            self.counts.left_out += 1
            self.left_out.append(row.bad or _without_captions(row, ranked, min_score))
        if row.bad is not None:
            return
        originals = [caption.is_original for caption in ranked]
        self.counts.originals += sum(originals)
        self.counts.originals_kept += sum(originals[:kept])
        self.counts.originals_empty += sum(not has_words(text) for text in row.originals) if row.originals else 1
        self.counts.proposals += len(originals) - sum(originals)
        self.counts.proposals_kept += kept - sum(originals[:kept])

    def add(self, other: "ShardReport"):
        self.counts.add(other.counts)
        self.left_out += other.left_out


def _without_captions(row: CaptionedPicture, ranked: list[RankedCaption], min_score: float | None) -> BadRow:
    if not ranked:
        return row.without_captions()
    best = ranked[0]
    reason = f"has no caption of the score {min_score:g}: the best, {best.text!r}, has {best.score:.3f}."
    return bad_row(row.name, _NOTHING_KEPT, reason)


class ResultFiles:
    """The files of a result, which become a dataset once all of them are there. `settings` are what it depends on."""

    def __init__(
        self, folder: Path, features: datasets.Features, num_rows: int, rows_per_shard: int, settings: dict[str, Any]
    ):
        self.folder = folder
        self.schema = features.arrow_schema
        self.rows = split_rows(num_rows, rows_per_shard)
        # As Dataset.push_to_hub names them: load_dataset takes nothing else in the folder for data
        self.names = [f"train-{shard:05d}-of-{len(self.rows):05d}.parquet" for shard in range(len(self.rows))]
        self.settings = settings | {"rows": num_rows, "rows_per_shard": rows_per_shard}
        self.settings_file = folder / _SETTINGS
        self.left_out_file = folder / _LEFT_OUT

    @property
    def is_finished(self) -> bool:
        """Tell whether all files were there once."""
        return (self.folder / _DATA).is_dir()

    @property
    def place(self) -> Path:
        """Return where the files are now."""
        return self.folder / (_DATA if self.is_finished else _UNFINISHED)

    def check_own(self):
        """Refuse a folder of data that no run of this kind can have written."""
        if self.is_finished and not self.settings_file.exists():
            raise MadeOtherwiseError(
                f"{self.folder / _DATA} is there already, without {_SETTINGS}, which would tell what made it. Give "
                "another folder, or delete it yourself."
            )

    def clear(self):
        """Remove all that an earlier run left."""
        for name in (_DATA, _UNFINISHED):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for path in (self.settings_file, self.left_out_file):
            path.unlink(missing_ok=True)

    def check(self):
        """Refuse what other settings made; a run that has finished no file binds no other."""
        if self.is_finished or any(self.place.glob("*.parquet")):
            advice = (
                "Give the same arguments to go on with the captions in it, another folder, or overwrite=True "
                "(--overwrite) to delete them."
            )
            check_settings_file(self.settings_file, self.settings, self.folder, advice)

    def missing(self) -> list[int]:
        """Return the numbers of the files that are to be written."""
        return [shard for shard, name in enumerate(self.names) if not (self.place / name).exists()]

    def prepare(self):
        """Make the folder, without what a run that was stopped has begun, and say what the result is made with."""
        self.place.mkdir(parents=True, exist_ok=True)
        if not self.is_finished:
            # What stayed would become a part of the dataset
            for path in self.place.iterdir():
                if path.name not in self.names:
                    path.unlink()
        for folder in (self.folder, self.place):
            remove_leftovers(folder)
        write_json(self.settings_file, self.settings)

    def write(self, shard: int, tables: Iterator[pa.Table], report: ShardReport):
        """Write a file, and into it the report, which is complete once the tables are."""
        with atomic_file(self.place / self.names[shard]) as file, pq.ParquetWriter(file, self.schema) as writer:
            for table in _large(tables):
                writer.write_table(table)
            writer.add_key_value_metadata({_REPORT: json.dumps(asdict(report))})

    def finish(self) -> str:
        """Make the files a dataset, and return which rows were left out and what became of the captions."""
        report = self.report()
        if not self.is_finished:
            rename(self.folder / _UNFINISHED, self.folder / _DATA)
        if report.left_out:
            return f"Left out: {report_bad_rows(report.left_out, self.left_out_file)}\n{report.counts.summary()}"
        self.left_out_file.unlink(missing_ok=True)
        return report.counts.summary()

    def report(self) -> ShardReport:
        """Return that of all files together, all of which are there."""
        paths = [self.place / name for name in self.names]
        check_still_there(paths, self.folder)
        report = ShardReport()
        for path in paths:
            report.add(_read_report(path))
        return report


def _read_report(path: Path) -> ShardReport:
    try:
        values = json.loads(pq.read_metadata(path).metadata[_REPORT.encode()])
        return ShardReport(CapFiltCounts(**values["counts"]), [BadRow(**row) for row in values["left_out"]])
    except (ValueError, KeyError, TypeError) as error:  # no Parquet, or without the report
        raise StateFileError(
            f"{path} can't be read as a file of CapFilt ({error}): it was cut off or changed. Delete it, and run the "
            "same command again, which makes it anew."
        ) from error


def _large(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yield the same rows in fewer tables, because each becomes a group of rows in the file."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(part.nbytes for part in waiting) >= _GROUP_BYTES:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)
