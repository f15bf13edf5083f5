"""What a model is evaluated on: a picture, what it is asked, and what people wrote."""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ..data.rows import open_image
from ..data.text import LONE_SURROGATE
from ..jobs.errors import shorten
from ..jobs.fingerprints import fingerprint, sampled_rows


OVERALL = "overall"  # the group of all samples


@dataclass(frozen=True)
class RowImage:
    """
    A picture in a row of a dataset (anything with rows by number), which is read when it is needed. `allow_urls` says
    which URLs in the rows are fetched: none, with `True` those of public addresses, with a list also those of the
    hosts in it.
    """

    rows: Any = field(repr=False)
    row: int
    column: str
    allow_urls: bool | Sequence[str] = field(default=False, compare=False)


@dataclass(frozen=True)
class CaptionSample:
    r"""
    A picture and its captions.

    Args:
        image (`str` or [`RowImage`]):
            Path of the picture, or anything else that [`~image_loading.load_image`] takes.
        image_id (`int` or `str`):
            Its name in the output, which no other sample has.
        captions (`list[str]`):
            What people wrote. A sample without captions is not scored.
        group (`str`, *optional*):
            What scores are told apart by, such as the domain of NoCaps.
        source (`str`, *optional*):
            What errors call the sample, such as `"dataset_coco.json, images[3]"`.
        objects (`list[str]`, *optional*):
            What is in the picture, for CHAIR. The list may be empty; a sample without one is not scored.

    Raises:
        ValueError: if a field is missing, or of another type.
    """

    image: Any
    image_id: int | str
    captions: list[str]
    group: str | None = None
    source: str | None = None
    objects: list[str] | None = None

    def __post_init__(self):
        name = self.source or f"CaptionSample with image_id={shorten(self.image_id)}"
        check_id(self.image_id, f"{name}: image_id")
        _check_shared(self, self.captions, name, "captions")
        if self.objects is not None:
            _check_texts(self.objects, f"{name}: objects")


@dataclass(frozen=True)
class QuestionSample:
    r"""
    A question about a picture.

    Args:
        image (`str` or [`RowImage`]):
            Path of the picture, or anything else that [`~image_loading.load_image`] takes.
        image_id (`int` or `str`):
            Its name in the dataset.
        question_id (`int` or `str`):
            The question's name in the output, which no other sample has.
        question (`str`):
            The question.
        answers (`list[str]`):
            What people answered. A question without answers is not scored.
        group (`str`, *optional*):
            What scores are told apart by, such as the type of the answer.
        source (`str`, *optional*):
            What errors call the sample, such as `"questions.json, questions[3]"`.
        choices (`list[str]`, *optional*):
            Answers to choose from, for [`evaluate_multiple_choice`]. The right one is among them.

    Raises:
        ValueError: if a field is missing, or of another type.
    """

    image: Any
    image_id: int | str
    question_id: int | str
    question: str
    answers: list[str]
    group: str | None = None
    source: str | None = None
    choices: list[str] | None = None

    def __post_init__(self):
        name = self.source or f"QuestionSample with question_id={shorten(self.question_id)}"
        check_id(self.image_id, f"{name}: image_id")
        check_id(self.question_id, f"{name}: question_id")
        check_text(self.question, f"{name}: question")
        if not self.question.strip():
            raise ValueError(f"{name}: question is {shorten(self.question)}; a question was expected.")
        _check_shared(self, self.answers, name, "answers")
        if self.choices is not None:
            self._check_choices(name)

    def _check_choices(self, name: str):
        _check_texts(self.choices, f"{name}: choices")
        if len(self.choices) < 2 or not all(choice.strip() for choice in self.choices):
            raise ValueError(f"{name}: choices is {shorten(self.choices)}; at least two texts were expected.")
        if missing := [answer for answer in self.answers if answer not in self.choices]:
            raise ValueError(f"{name}: the answer {shorten(missing[0])} is none of the choices {self.choices}.")


Sample = CaptionSample | QuestionSample


def _check_shared(sample: Sample, references: Any, name: str, what: str):
    """Refuse what no sample can have."""
    if sample.image is None:
        raise ValueError(f"{name} has no picture.")
    _check_texts(references, f"{name}: {what}")
    if sample.group is not None:
        check_text(sample.group, f"{name}: group")
    if sample.group == OVERALL:
        raise ValueError(f"{name}: group is {OVERALL!r}, as all samples together are called. Give another name.")


def _check_texts(values: Any, name: str):
    """Refuse what is no list of texts."""
    check_list(values, name)
    for number, text in enumerate(values):
        check_text(text, f"{name}[{number}]")


def check_text(value: Any, name: str):
    """Refuse what is no text, or one that no file and no tokenizer can hold."""
    if not isinstance(value, str):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        hint = ' Write numbers as texts, such as "2".' if is_number else ""
        raise ValueError(f"{name} is {shorten(value)}; a text was expected.{hint}")
    if half := LONE_SURROGATE.search(value):
        raise ValueError(
            f"{name} is {shorten(value)}, with a lone surrogate ({half[0]!r}), which is half a character. Write the "
            "character in full."
        )


def check_list(value: Any, name: str):
    """Refuse what is no list, a text among others."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} is {shorten(value)}; a list was expected.")


def check_id(value: Any, name: str):
    """Refuse what names nothing."""
    if isinstance(value, str) and value.strip():
        check_text(value, name)
    elif isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {shorten(value)}; an integer or a text was expected.")


def check_distinct(samples: Sequence[Sample], key: Callable[[Sample], Hashable], what: str):
    """Refuse samples of which two have the same key; `what` says what that means."""
    seen: dict[Hashable, int] = {}
    for number, sample in enumerate(samples):
        first = seen.setdefault(key(sample), number)
        if first != number:
            names = f"{sample_name(samples[first], first)} and {sample_name(sample, number)}"
            raise ValueError(f"{names} {what} ({shorten(key(sample))}).")


def check_distinct_ids(samples: Sequence[Sample]):
    """Refuse samples of which two have the same id."""
    check_distinct(samples, sample_id, "have the same id, and each needs its own")


def check_distinct_pictures(samples: Sequence[Sample]):
    """Refuse samples of which two have the same id, or are about the same picture."""
    check_distinct_ids(samples)
    check_distinct(samples, picture_key, "are about the same picture: a picture's captions belong in one sample")


def sample_name(sample: Sample, number: int) -> str:
    """Return the name of a sample in errors."""
    return sample.source or f"sample {number}"


def sample_id(sample: Sample) -> int | str:
    """Return the id of a sample in the output."""
    return sample.question_id if isinstance(sample, QuestionSample) else sample.image_id


def sample_references(sample: Sample) -> list[str]:
    """Return what people wrote about a sample."""
    return sample.answers if isinstance(sample, QuestionSample) else sample.captions


def picture_key(sample: Sample) -> Hashable:
    """Return a key that is equal for samples about one picture: its path, its row in a dataset, or its object."""
    image = sample.image
    if isinstance(image, RowImage):
        return id(image.rows), image.row, image.column
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else id(image)


def open_sample_image(sample: Sample) -> Image.Image:
    """Return the picture of a sample, mode RGB."""
    image = sample.image
    if isinstance(image, RowImage):
        return open_image(image.rows[image.row][image.column], f"row {image.row}", image.allow_urls)
    # The user gave what is not in a row
    return open_image(image, f"image {sample.image_id}", allow_urls=None)


def samples_fingerprint(samples: Sequence[Sample], texts: Sequence[str] = ()) -> str:
    """
    Return a hash of what a model is given: the pictures, files by their paths and some of them by what they show, and
    texts. Ids, references and groups have a part in the output alone.
    """
    pictures = {picture_key(sample): sample for sample in samples}
    digests = {key: _picture_digest(sample) for key, sample in pictures.items()}
    return fingerprint(
        itertools.chain(
            (digests[picture_key(sample)] for sample in samples),
            (json.dumps(text).encode() for text in texts),
            (_pixels(samples[number]) for number in sampled_rows(len(samples))),
        )
    )


def _picture_digest(sample: Sample) -> bytes:
    """Return a hash of a picture: of the path of a file, otherwise of all there is."""
    value = sample.image
    if isinstance(value, RowImage):
        value = value.rows[value.row][value.column]
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, (str, os.PathLike)):
        value = str(value).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(value if isinstance(value, bytes) else _pixels(sample), digest_size=16).digest()


def _pixels(sample: Sample) -> bytes:
    image = open_sample_image(sample)
    return repr(image.size).encode() + image.tobytes()


__all__ = ["CaptionSample", "QuestionSample", "RowImage"]
