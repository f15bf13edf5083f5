"""What became of the rows and the captions."""

import json
from dataclasses import asdict, dataclass, field, fields

from ..data.bad_rows import BadRow
from .ranking import RankedCaption
from .rows import CaptionedPicture, bad_row, has_words


NOTHING_KEPT = "no caption kept"  # a kind of bad rows


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
        """For people."""
        dropped = self.originals - self.originals_kept
        return (
            f"{self.rows - self.left_out:,} of {self.rows:,} rows are in the result.\n"
            f"Original captions: {self.originals_kept:,} kept, {dropped:,} dropped, {self.originals_empty:,} empty.\n"
            f"Proposed captions: {self.proposals_kept:,} kept of {self.proposals:,} different ones."
        )


@dataclass
class ShardReport:
    """What became of the rows of a file; the file carries it."""

    counts: CapFiltCounts = field(default_factory=CapFiltCounts)
    left_out: list[BadRow] = field(default_factory=list)

    def add_row(self, row: CaptionedPicture, ranked: list[RankedCaption], kept: int, min_score: float | None):
        """Counts a row, of whose candidates the first `kept` are kept."""
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

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "ShardReport":
        values = json.loads(text)
        return cls(CapFiltCounts(**values["counts"]), [BadRow(**row) for row in values["left_out"]])


def _without_captions(row: CaptionedPicture, ranked: list[RankedCaption], min_score: float | None) -> BadRow:
    if not ranked:
        return row.without_captions()
    best = ranked[0]
    reason = f"has no caption of the score {min_score:g}: the best, {best.text!r}, has {best.score:.3f}."
    return bad_row(row.name, NOTHING_KEPT, reason)
