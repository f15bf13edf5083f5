"""Rows of a dataset as CapFilt reads them: a picture, or features in its place, and the captions it came with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa
import torch

from ..data.bad_rows import (
    PICTURE_MISSING,
    PICTURE_UNREADABLE,
    TEXT_EMPTY,
    TEXT_MISSING,
    BadRow,
    RowName,
    find_file,
)
from ..data.feature_cache import EMBEDS, FEATURE_COLUMNS, read_cached_features
from ..data.rows import get_column, open_image, select_columns
from ..data.text import clean_caption
from ..jobs.errors import shorten
from ..jobs.fingerprints import fingerprint, sampled_rows
from ..models.image_loading import ImageLoadError


@dataclass
class CaptionedPicture:
    r"""
    A row.

    Args:
        name (`RowName`):
            What messages call it.
        originals (`list[str]`):
            The captions that it came with, as they are.
        picture (`PIL.Image.Image` or `torch.Tensor`, *optional*):
            The picture, or its features; `None` if it can't be read.
        bad (`BadRow`, *optional*):
            Why it can't be read.
    """

    name: RowName
    originals: list[str]
    picture: Any = None
    bad: BadRow | None = None

    def without_captions(self) -> BadRow:
        """Return the row as one that has neither a caption of its own nor a proposed one."""
        kind = TEXT_EMPTY if self.originals else TEXT_MISSING
        return bad_row(self.name, kind, "has no caption with a word in it, and none was proposed.")


class CaptionedPictures(torch.utils.data.Dataset):
    r"""
    The rows of a dataset. Features that [`~data.cache_features`] stored are read in place of pictures.

    Args:
        dataset (`datasets.Dataset`):
            The rows.
        image_column (`str`):
            Column of the pictures.
        text_column (`str`):
            Column of the captions: texts, or lists of texts.
        allow_urls (`bool` or `list[str]`, *optional*, defaults to `False`):
            Which URLs in the rows are fetched: none, with `True` those of public addresses, with a list also those of
            the hosts in it.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_column: str,
        text_column: str,
        allow_urls: bool | Sequence[str] = False,
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
        if value is None or (isinstance(value, Mapping) and not any(value.get(key) for key in ("bytes", "path"))):
            bad = bad_row(name, PICTURE_MISSING, f"has no picture in column {self.image_column!r}.")
            return CaptionedPicture(name, originals, bad=bad)
        try:
            picture = open_image(value, str(RowName(number)), self.allow_urls)
        except ImageLoadError as error:
            bad = BadRow(number, name.file, str(error), PICTURE_UNREADABLE)
            return CaptionedPicture(name, originals, bad=bad)
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
        sample = (repr(self.columns([number]).to_pylist()) for number in sampled_rows(len(self)))
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
