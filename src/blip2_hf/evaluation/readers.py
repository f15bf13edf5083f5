"""The paper's benchmarks, from the files that their authors publish, and data sets by the names of their columns."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.rows import get_column, select_columns
from .samples import CaptionSample, QuestionSample, RowImage


def read_karpathy(
    annotations: str | os.PathLike, images: str | os.PathLike, split: str = "test"
) -> list[CaptionSample]:
    r"""
    Captions of COCO or Flickr30K in Karpathy's split.

    Args:
        annotations (`str` or `os.PathLike`):
            dataset_coco.json or dataset_flickr30k.json.
        images (`str` or `os.PathLike`):
            Folder of the pictures; those of COCO may also lie in its folders train2014 and val2014.
        split (`str`, *optional*, defaults to `"test"`):
            `"test"`, `"val"` or `"train"`, which is both `train` and `restval` of the file.

    Returns:
        `list[CaptionSample]`

    Raises:
        ValueError: if the file is another one, or has no such split.
        FileNotFoundError: if a file or a picture is not there.
    """
    splits = ("train", "restval") if split == "train" else (split,)
    entries = _field(_read_json(annotations), "images", annotations)
    found = Counter(_field(entry, "split", annotations, "images") for entry in entries)
    entries = [entry for entry in entries if entry["split"] in splits]
    if not entries:
        raise ValueError(f"{annotations} has no split {split!r}; its splits are {dict(found)}.")
    pictures = _Pictures(images)
    samples = []
    for entry in entries:
        filename = _field(entry, "filename", annotations, "images")
        sentences = _field(entry, "sentences", annotations, "images")
        samples.append(
            CaptionSample(
                pictures.find(Path(entry.get("filepath", "")) / filename, filename),
                # Flickr30K's pictures have no other name than that of their file
                entry["cocoid"] if "cocoid" in entry else Path(filename).stem,
                [_field(sentence, "raw", annotations, "sentences") for sentence in sentences],
            )
        )
    pictures.check()
    return samples


def read_nocaps(annotations: str | os.PathLike, images: str | os.PathLike) -> list[CaptionSample]:
    r"""
    NoCaps, with the domain as the group.

    Args:
        annotations (`str` or `os.PathLike`):
            nocaps_val_4500_captions.json, or one of the files of image info, which have no captions.
        images (`str` or `os.PathLike`):
            Folder of the pictures.

    Returns:
        `list[CaptionSample]`

    Raises:
        ValueError: if the file is another one.
        FileNotFoundError: if a file or a picture is not there.
    """
    content = _read_json(annotations)
    captions: dict[Any, list[str]] = {}
    for annotation in content.get("annotations", []):
        image_id = _field(annotation, "image_id", annotations, "annotations")
        captions.setdefault(image_id, []).append(_field(annotation, "caption", annotations, "annotations"))
    pictures = _Pictures(images)
    samples = []
    for entry in _field(content, "images", annotations):
        image_id, filename = (_field(entry, name, annotations, "images") for name in ("id", "file_name"))
        if captions and image_id not in captions:
            raise ValueError(f"{annotations}: image {image_id} has no caption.")
        samples.append(
            CaptionSample(pictures.find(filename), image_id, captions.get(image_id, []), entry.get("domain"))
        )
    pictures.check()
    return samples


def read_vqa(
    questions: str | os.PathLike, images: str | os.PathLike, annotations: str | os.PathLike | None = None
) -> list[QuestionSample]:
    r"""
    VQAv2 or OK-VQA, with the type of the answer as the group.

    Args:
        questions (`str` or `os.PathLike`):
            v2_OpenEnded_mscoco_val2014_questions.json, OpenEnded_mscoco_val2014_questions.json or another of them.
        images (`str` or `os.PathLike`):
            Folder of COCO's pictures, which may also lie in its folders train2014, val2014 and test2015.
        annotations (`str` or `os.PathLike`, *optional*):
            v2_mscoco_val2014_annotations.json, mscoco_val2014_annotations.json or another of them. Those of the test
            splits are secret.

    Returns:
        `list[QuestionSample]`

    Raises:
        ValueError: if the files are others, or do not belong together.
        FileNotFoundError: if a file or a picture is not there.
    """
    content = _read_json(questions)
    # Questions of test-dev2015 are about pictures of test2015
    subtype = _field(content, "data_subtype", questions).replace("-dev", "")
    answers = {} if annotations is None else _read_answers(annotations)
    pictures = _Pictures(images)
    samples = []
    for entry in _field(content, "questions", questions):
        question_id, image_id, question = (
            _field(entry, name, questions, "questions") for name in ("question_id", "image_id", "question")
        )
        if annotations is not None and question_id not in answers:
            raise ValueError(f"{annotations} has no answer to question {question_id} of {questions}.")
        filename = f"COCO_{subtype}_{int(image_id):012d}.jpg"
        path = pictures.find(Path(subtype) / filename, filename)
        samples.append(QuestionSample(path, image_id, question_id, question, *answers.get(question_id, ([], None))))
    pictures.check()
    return samples


def _read_answers(annotations: str | os.PathLike) -> dict[Any, tuple[list[str], str | None]]:
    """Answers and their type, by question."""
    answers = {}
    for entry in _field(_read_json(annotations), "annotations", annotations):
        question_id, given = (_field(entry, name, annotations, "annotations") for name in ("question_id", "answers"))
        texts = [_field(answer, "answer", annotations, "answers") for answer in given]
        answers[question_id] = (texts, entry.get("answer_type"))
    return answers


def read_gqa(questions: str | os.PathLike, images: str | os.PathLike) -> list[QuestionSample]:
    r"""
    GQA.

    Args:
        questions (`str` or `os.PathLike`):
            testdev_balanced_questions.json or another of them. Those of test have no answers.
        images (`str` or `os.PathLike`):
            Folder of the pictures.

    Returns:
        `list[QuestionSample]`

    Raises:
        ValueError: if the file is another one.
        FileNotFoundError: if a file or a picture is not there.
    """
    pictures = _Pictures(images)
    samples = []
    for question_id, entry in _read_json(questions).items():
        if not isinstance(entry, Mapping):
            raise ValueError(f"{questions}: questions by their id were expected, but {question_id!r} has {entry!r}.")
        image_id, question = (_field(entry, name, questions, question_id) for name in ("imageId", "question"))
        path = pictures.find(f"{image_id}.jpg")
        answers = [entry["answer"]] if "answer" in entry else []
        samples.append(QuestionSample(path, image_id, question_id, question, answers))
    pictures.check()
    return samples


def read_caption_rows(
    rows: Any, image_column: str = "image", caption_column: str = "caption", id_column: str | None = None
) -> list[CaptionSample]:
    r"""
    Captions in a data set.

    Args:
        rows (`datasets.Dataset` or `Sequence[Mapping]`):
            The data set.
        image_column (`str`, *optional*, defaults to `"image"`):
            Column of the pictures.
        caption_column (`str`, *optional*, defaults to `"caption"`):
            Column of a caption, or of a list of captions.
        id_column (`str`, *optional*):
            Column of the pictures' ids: rows with the same id are about one picture. Without it, the id is the number
            of the row.

    Returns:
        `list[CaptionSample]`

    Raises:
        ValueError: if there is no such column, or a row has no caption.
    """
    pictures, texts, (ids,) = _columns(rows, image_column, [caption_column], [id_column])
    samples: dict[Any, CaptionSample] = {}
    for row, values in enumerate(texts):
        captions = _texts(get_column(values, caption_column), f"row {row}, column {caption_column!r}")
        image_id = row if id_column is None else get_column(ids[row], id_column)
        if image_id in samples:
            samples[image_id].captions.extend(captions)
        else:
            samples[image_id] = CaptionSample(RowImage(pictures, row, image_column), image_id, captions)
    return list(samples.values())


def read_question_rows(
    rows: Any,
    image_column: str = "image",
    question_column: str = "question",
    answer_column: str = "answer",
    id_column: str | None = None,
    image_id_column: str | None = None,
    group_column: str | None = None,
) -> list[QuestionSample]:
    r"""
    Questions in a data set.

    Args:
        rows (`datasets.Dataset` or `Sequence[Mapping]`):
            The data set.
        image_column (`str`, *optional*, defaults to `"image"`):
            Column of the pictures.
        question_column (`str`, *optional*, defaults to `"question"`):
            Column of the questions.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            Column of an answer, of a list of answers, or of a list of dicts with `answer`.
        id_column (`str`, *optional*):
            Column of the questions' ids. Without it, the id is the number of the row.
        image_id_column (`str`, *optional*):
            Column of the pictures' ids: a picture is then read once for all questions about it.
        group_column (`str`, *optional*):
            Column that scores are told apart by.

    Returns:
        `list[QuestionSample]`

    Raises:
        ValueError: if there is no such column, or a row has no question or answer.
    """
    others = [id_column, image_id_column, group_column]
    pictures, texts, others_of = _columns(rows, image_column, [question_column, answer_column], others)
    samples = []
    for row, values in enumerate(texts):
        question = get_column(values, question_column)
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"row {row}, column {question_column!r}: a question was expected, got {question!r}.")
        question_id, image_id, group = (
            None if name is None else get_column(column[row], name)
            for name, column in zip(others, others_of, strict=True)
        )
        samples.append(
            QuestionSample(
                RowImage(pictures, row, image_column),
                row if image_id is None else image_id,
                row if question_id is None else question_id,
                question,
                _texts(get_column(values, answer_column), f"row {row}, column {answer_column!r}"),
                None if group is None else str(group),
            )
        )
    return samples


def _columns(rows: Any, image_column: str, text_columns: list[str], others: list[str | None]):
    """Rows of pictures, as they are stored; rows of texts; rows of each other column."""
    if len(rows) == 0:
        raise ValueError("The data set has no rows.")
    pictures = select_columns(rows, [image_column], image_column)
    get_column(pictures[0], image_column)
    texts = select_columns(rows, text_columns, None)
    return pictures, texts, [None if name is None else select_columns(rows, [name], None) for name in others]


def _texts(value: Any, name: str) -> list[str]:
    """One text, several, or several records with `answer`, as a list."""
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, (list, tuple)):
        texts = [text.get("answer") if isinstance(text, Mapping) else text for text in texts]
        if texts and all(isinstance(text, str) for text in texts):
            return texts
    raise ValueError(f"{name}: a text or a list of texts was expected, got {value!r}.")


def _read_json(path: str | os.PathLike) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}). Is it complete, and unpacked?") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: an object was expected, got {type(content).__name__}. Is it the right file?")
    return content


def _field(entry: Any, name: str, path: str | os.PathLike, where: str | None = None) -> Any:
    if isinstance(entry, Mapping) and name in entry:
        return entry[name]
    inside = "" if where is None else f" in its {where!r}"
    found = sorted(map(str, entry))[:10] if isinstance(entry, Mapping) else type(entry).__name__
    raise ValueError(f"{path} has no {name!r}{inside}, but {found}. Is it the right file?")


class _Pictures:
    """Finds pictures in a folder, and tells of all that are missing at once."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder} with pictures.")
        self.missing: list[str] = []

    def find(self, *names: str | Path) -> str:
        """Path of the first of some names of a picture that is there."""
        for name in names:
            if (self.folder / name).is_file():
                return str(self.folder / name)
        self.missing.append(" or ".join(dict.fromkeys(map(str, names))))
        return ""

    def check(self):
        if self.missing:
            raise FileNotFoundError(
                f"{self.folder} lacks {len(self.missing)} pictures, the first of them {self.missing[0]}. Give the "
                "folder that holds them."
            )


__all__ = [
    "read_caption_rows",
    "read_gqa",
    "read_karpathy",
    "read_nocaps",
    "read_question_rows",
    "read_vqa",
]
