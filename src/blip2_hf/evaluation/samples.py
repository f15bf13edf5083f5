"""What a model is evaluated on: a picture, what it is asked, and what people wrote."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from PIL import Image

from ..data.rows import open_image


_OPENED = 32  # pictures that a fingerprint looks at


@dataclass(frozen=True)
class RowImage:
    r"""
    A picture in a row of a data set, which is read when it is needed.

    Args:
        rows (`datasets.Dataset` or `Sequence[Mapping]`):
            The data set.
        row (`int`):
            Number of the row.
        column (`str`):
            Column of the pictures.
    """

    rows: Any = field(repr=False)
    row: int
    column: str


@dataclass(frozen=True)
class CaptionSample:
    r"""
    A picture and its captions.

    Args:
        image (`str` or [`RowImage`]):
            Path of the picture, or anything else that [`~image_loading.load_image`] takes.
        image_id (`int` or `str`):
            Its name in the data set.
        captions (`list[str]`):
            What people wrote; empty where that is secret.
        group (`str`, *optional*):
            What scores are told apart by, such as the domain of NoCaps.
    """

    image: Any
    image_id: int | str
    captions: list[str]
    group: str | None = None


@dataclass(frozen=True)
class QuestionSample:
    r"""
    A question about a picture.

    Args:
        image (`str` or [`RowImage`]):
            Path of the picture, or anything else that [`~image_loading.load_image`] takes.
        image_id (`int` or `str`):
            Its name in the data set.
        question_id (`int` or `str`):
            The question's name in the data set.
        question (`str`):
            The question.
        answers (`list[str]`):
            What people answered; empty where that is secret.
        group (`str`, *optional*):
            What scores are told apart by, such as the type of the answer.
    """

    image: Any
    image_id: int | str
    question_id: int | str
    question: str
    answers: list[str]
    group: str | None = None


Sample = CaptionSample | QuestionSample


def open_sample_image(sample: Sample) -> Image.Image:
    """The picture of a sample, mode RGB."""
    image = sample.image
    if isinstance(image, RowImage):
        return open_image(image.rows[image.row][image.column], f"row {image.row}")
    return open_image(image, f"image {sample.image_id}")


def samples_fingerprint(samples: Sequence[Sample]) -> str:
    """A hash of ids, paths and texts, and of some of the pictures; the group has a part in scores alone."""
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        path = os.fspath(sample.image) if isinstance(sample.image, (str, os.PathLike)) else None
        digest.update(json.dumps(asdict(replace(sample, image=path, group=None)), default=str).encode())
    for number in sorted({len(samples) * opened // _OPENED for opened in range(_OPENED)}):
        image = open_sample_image(samples[number])
        digest.update(repr(image.size).encode() + image.tobytes())
    return digest.hexdigest()


__all__ = ["CaptionSample", "QuestionSample", "RowImage"]
