"""Rows of a dataset as CapFilt reads them: a picture, or features in its place, and the captions it came with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa
import torch

from ..data.bad_rows import (
    TEXT_EMPTY,
    TEXT_MISSING,
    BadPictureError,
    BadRow,
    RowName,
    find_file,
    open_row_picture,
)
from ..data.feature_cache import EMBEDS, FEATURE_COLUMNS, read_cached_features
from ..data.rows import get_column, picture_bytes, select_columns
from ..data.text import clean_caption
from ..jobs.errors import shorten
from ..jobs.fingerprints import fingerprint, sampled_rows


@dataclass
class CaptionedPicture:
    """A row: its own captions, and its picture, or the features in its place, or why it can't be read."""

    name: RowName
    originals: list[str]
    picture: Any = None
    bad: BadRow | None = None

    def without_captions(self) -> BadRow:
        """Return the row as one that has neither a caption of its own nor a proposed one."""
        kind = TEXT_EMPTY if self.originals else TEXT_MISSING
        return bad_row(self.name, kind, "has no caption with a word in it, and none was proposed.")


class CaptionedPictures(torch.utils.data.Dataset):
    """
    The rows of a dataset. Features that [`~data.cache_features`] stored are read in place of pictures. `allow_urls` is
    that of [`capfilt_dataset`].
    """

    def __init__(
        self, dataset: datasets.Dataset, image_column: str, text_column: str, allow_urls: bool | Sequence[str]
    ):
        has_features = EMBEDS in dataset.column_names
        columns = [*(FEATURE_COLUMNS if has_features else [image_column]), text_column]
        self.rows = select_columns(dataset.with_format(None), columns)
        self.table = dataset.with_format("arrow")
        self.image_column = image_column
        self.text_column = text_column
        self.allow_urls = allow_urls

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> CaptionedPicture:
        row = self.rows[number]
        if EMBEDS in row:
            name = RowName(number)
            return CaptionedPicture(name, self._originals(row, name), read_cached_features(row))
        value = get_column(row, self.image_column)
        name = RowName(number, find_file(row, value))
        originals = self._originals(row, name)
        try:
            picture = open_row_picture(value, name, self.image_column, self.allow_urls)
        except BadPictureError as error:
            return CaptionedPicture(name, originals, bad=BadRow(number, name.file, str(error), error.kind))
        return CaptionedPicture(name, originals, picture)

    def _originals(self, row: Mapping, name: RowName) -> list[str]:
        value = get_column(row, self.text_column)
        texts = [text for text in (value if isinstance(value, list) else [value]) if text is not None]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{name.at_start} has {shorten(value)} in column {self.text_column!r}; a text, or a list of texts, "
                "was expected. Name the column of the captions (text_column, --text-column)."
            )
        return texts

    def columns(self, numbers: Sequence[int]) -> pa.Table:
        """Return all columns of some rows, pictures as they are stored."""
        return self.table[list(numbers)]

    def describe(self) -> dict[str, Any]:
        """Return what tells these rows from others: their columns, and a hash of some, as they are stored."""
        rows = (self.columns([number]).to_pylist()[0] for number in sampled_rows(len(self)))
        # A picture that is a file may have moved
        sample = (repr([(n, picture_bytes(v) if n == self.image_column else v) for n, v in r.items()]) for r in rows)
        return {
            "columns": list(self.table.column_names),
            "dataset": fingerprint(text.encode("utf-8", "surrogatepass") for text in sample),
            "image_column": self.image_column,
            "text_column": self.text_column,
        }


def bad_row(name: RowName, kind: str, reason: str) -> BadRow:
    return BadRow(name.number, name.file, f"{name.at_start} {reason}", kind)


def has_words(text: str) -> bool:
    """Tell whether anything is left for training to read."""
    return bool(clean_caption(text).strip())
