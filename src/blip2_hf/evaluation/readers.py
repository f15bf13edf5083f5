"""The paper's benchmarks, from the files that their authors publish, and datasets by the names of their columns."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.rows import column_names, get_column, select_columns
from ..data.text import has_text, texts_of
from ..jobs.errors import shorten
from .annotation_files import (
    PictureFolder,
    coco_places,
    entries_of,
    field_of,
    paths_of,
    read_lines,
    read_list,
    read_object,
)
from .samples import (
    CaptionSample,
    QuestionSample,
    RowImage,
    check_distinct,
    check_distinct_ids,
    check_distinct_pictures,
    check_id,
    check_list,
    check_text,
    sample_id,
)


_OBJECT_WORD = re.compile(r"\w[\w' -]*")


def read_karpathy(
    annotations: str | os.PathLike, images: str | os.PathLike, split: str = "test"
) -> list[CaptionSample]:
    r"""
    Read captions of COCO or Flickr30K in Karpathy's split.

    Args:
        annotations (`str` or `os.PathLike`):
            dataset_coco.json or dataset_flickr30k.json.
        images (`str` or `os.PathLike`):
            Folder of the pictures; those of COCO may also lie in its folders train2014 and val2014.
        split (`str`, *optional*, defaults to `"test"`):
            `"test"`, `"val"` or `"train"`, which is both `train` and `restval` of the file.

    Returns:
        `list[CaptionSample]`: a picture without `cocoid` is named as its file, with the folder and without the ending.

    Raises:
        ValueError: if the file is another one or has no such split, if a field of an entry is missing or of another
            type, or if two entries have the same id or the same picture.
        FileNotFoundError: if a file or a picture is not there.
    """
    return _karpathy_samples(read_object(annotations), annotations, images, split)


def _karpathy_samples(
    content: Mapping, annotations: str | os.PathLike, images: str | os.PathLike, split: str
) -> list[CaptionSample]:
    splits = ("train", "restval") if split == "train" else (split,)
    entries = list(entries_of(content, "images", annotations))
    found = Counter(field_of(entry, "split", where, check_text) for where, entry in entries)
    entries = [(where, entry) for where, entry in entries if entry["split"] in splits]
    if not entries:
        raise ValueError(f"{annotations} has no split {split!r}; its splits are {dict(found)}.")
    pictures = PictureFolder(images)
    samples = []
    for where, entry in entries:
        filename = field_of(entry, "filename", where, check_text)
        path = Path(field_of(entry, "filepath", where, check_text) if "filepath" in entry else "", filename)
        # Flickr30K's pictures have no other name than that of their file
        has_id = "cocoid" in entry
        image_id = field_of(entry, "cocoid", where, check_id) if has_id else os.path.splitext(path.as_posix())[0]
        captions = [
            field_of(sentence, "raw", f"{where}.sentences[{number}]", check_text)
            for number, sentence in enumerate(field_of(entry, "sentences", where, check_list))
        ]
        samples.append(CaptionSample(pictures.find(path, filename), image_id, captions, source=where))
    pictures.check()
    check_distinct_pictures(samples)
    return samples


def read_nocaps(annotations: str | os.PathLike, images: str | os.PathLike) -> list[CaptionSample]:
    r"""
    Read NoCaps, with the domain as the group.

    Args:
        annotations (`str` or `os.PathLike`):
            nocaps_val_4500_captions.json, or one of the files of image info, which have no captions.
        images (`str` or `os.PathLike`):
            Folder of the pictures.

    Returns:
        `list[CaptionSample]`

    Raises:
        ValueError: if the file is another one, if a field of an entry is missing or of another type, if two entries
            have the same id or the same picture, or if no caption is about any of the pictures.
        FileNotFoundError: if a file or a picture is not there.
    """
    return _coco_samples(read_object(annotations), annotations, images)


def _coco_samples(content: Mapping, annotations: str | os.PathLike, images: str | os.PathLike) -> list[CaptionSample]:
    """Return what a file of captions in COCO's format holds."""
    captions: dict[Any, list[str]] = {}
    for where, entry in entries_of(content, "annotations", annotations) if "annotations" in content else ():
        image_id = field_of(entry, "image_id", where, check_id)
        captions.setdefault(image_id, []).append(field_of(entry, "caption", where, check_text))
    pictures = PictureFolder(images)
    samples = []
    for where, entry in entries_of(content, "images", annotations):
        image_id = field_of(entry, "id", where, check_id)
        path = pictures.find(*coco_places(field_of(entry, "file_name", where, check_text)))
        samples.append(CaptionSample(path, image_id, captions.get(image_id, []), entry.get("domain"), where))
    if captions and not any(sample.captions for sample in samples):
        raise ValueError(f"{annotations}: no 'image_id' of its annotations is an 'id' of its images.")
    pictures.check()
    check_distinct_pictures(samples)
    return samples


def read_coco_objects(
    annotations: str | os.PathLike,
    instances: str | os.PathLike | Sequence[str | os.PathLike],
    images: str | os.PathLike,
    split: str | None = None,
) -> list[CaptionSample]:
    r"""
    Read captions and objects of COCO's pictures, for CHAIR.

    Args:
        annotations (`str` or `os.PathLike`):
            dataset_coco.json (Karpathy's split), or captions_val2014.json or another of COCO's files of captions.
        instances (`str`, `os.PathLike` or a list of them):
            instances_val2014.json, or several files of which each knows some of the pictures.
        images (`str` or `os.PathLike`):
            Folder of the pictures, which may also lie in its folders train2014 and val2014.
        split (`str`, *optional*):
            Split of Karpathy's file, as in [`read_karpathy`]; without it `"test"`. COCO's own files have no splits.

    Returns:
        `list[CaptionSample]`: with `objects`, the names of the categories in each picture.

    Raises:
        ValueError: if a file is another one, if a field of an entry is missing or of another type, if two entries have
            the same id or the same picture, if no file of instances knows a picture, or if COCO's file of captions is
            given with a split.
        FileNotFoundError: if a file or a picture is not there.
    """
    content = read_object(annotations)
    if "annotations" not in content:
        samples = _karpathy_samples(content, annotations, images, split or "test")
    elif split is None:
        samples = _coco_samples(content, annotations, images)
    else:
        raise ValueError(f"{annotations} is COCO's own file, which has no split {split!r}. Leave the split out.")
    objects: dict[Any, dict[str, None]] = {}
    for path in paths_of(instances):
        objects |= _read_instances(path)
    for sample in samples:
        if sample.image_id not in objects:
            raise ValueError(
                f"{' and '.join(map(str, paths_of(instances)))}: there is no picture {sample.image_id!r}, that of "
                f"{sample.source}. Give the file of its instances, too."
            )
    return [replace(sample, objects=list(objects[sample.image_id])) for sample in samples]


def _read_instances(path: str | os.PathLike) -> dict[Any, dict[str, None]]:
    """Read the names of the objects in each picture, each of them once and in order."""
    content = read_object(path)
    names = {
        field_of(entry, "id", where, check_id): field_of(entry, "name", where, check_text)
        for where, entry in entries_of(content, "categories", path)
    }
    objects: dict[Any, dict[str, None]] = {
        field_of(entry, "id", where, check_id): {} for where, entry in entries_of(content, "images", path)
    }
    for where, entry in entries_of(content, "annotations", path):
        image_id, category = (field_of(entry, name, where, check_id) for name in ("image_id", "category_id"))
        if image_id not in objects or category not in names:
            raise ValueError(f"{where}: there is no image {image_id!r}, or no category {category!r}, in the file.")
        objects[image_id][names[category]] = None
    return objects


def read_synonyms(path: str | os.PathLike) -> list[list[str]]:
    r"""
    Read the words of objects, such as synonyms.txt of CHAIR's authors.

    Args:
        path (`str` or `os.PathLike`):
            A text of one line for each object: its name and its other words, with commas between them.

    Returns:
        `list[list[str]]`: the words of each object, its name first.

    Raises:
        ValueError: if the file is another one.
        FileNotFoundError: if there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    expected = "the words of an object with commas between them were expected, such as: dog, puppy, hot dog"
    synonyms = []
    # A byte that is no text becomes a sign, which no word has
    for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        words = [word.strip() for word in line.split(",") if word.strip()]
        if bad := next((word for word in words if not _OBJECT_WORD.fullmatch(word)), None):
            raise ValueError(f"{path}, line {number} has {shorten(bad)}; {expected}.")
        synonyms += [words] if words else []
    if not synonyms:
        raise ValueError(f"{path} is empty; {expected}.")
    return synonyms


def read_vqa(
    questions: str | os.PathLike, images: str | os.PathLike, annotations: str | os.PathLike | None = None
) -> list[QuestionSample]:
    r"""
    Read VQAv2 or OK-VQA, with the type of the answer as the group.

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
        ValueError: if the files are others or do not belong together, if a field of an entry is missing or of another
            type, or if two entries have the same id.
        FileNotFoundError: if a file or a picture is not there.
    """
    content = read_object(questions)
    # Questions of test-dev2015 are about pictures of test2015
    subtype = field_of(content, "data_subtype", questions, check_text).replace("-dev", "")
    answers = {} if annotations is None else _read_answers(annotations)
    pictures = PictureFolder(images)
    samples = []
    for where, entry in entries_of(content, "questions", questions):
        question_id, image_id = (field_of(entry, name, where, check_id) for name in ("question_id", "image_id"))
        if annotations is not None and question_id not in answers:
            raise ValueError(f"{annotations} has no answer to question {question_id!r} of {where}.")
        if not str(image_id).isdecimal():
            raise ValueError(f"{where}: 'image_id' is {shorten(image_id)}; a number was expected, that of the file.")
        path = pictures.find(*coco_places(f"COCO_{subtype}_{int(image_id):012d}.jpg"))
        question = field_of(entry, "question", where, check_text)
        texts, group = answers.get(question_id, ([], None))
        samples.append(QuestionSample(path, image_id, question_id, question, texts, group, where))
    pictures.check()
    check_distinct_ids(samples)
    return samples


def _read_answers(annotations: str | os.PathLike) -> dict[Any, tuple[list[str], str | None]]:
    """Read answers and their type, by question."""
    answers: dict[Any, tuple[list[str], str | None]] = {}
    for where, entry in entries_of(read_object(annotations), "annotations", annotations):
        question_id = field_of(entry, "question_id", where, check_id)
        if question_id in answers:
            raise ValueError(f"{where}: another entry has the answers to question {question_id!r}.")
        texts = [
            field_of(answer, "answer", f"{where}.answers[{number}]", check_text)
            for number, answer in enumerate(field_of(entry, "answers", where, check_list))
        ]
        answers[question_id] = (texts, entry.get("answer_type"))
    return answers


def read_gqa(questions: str | os.PathLike, images: str | os.PathLike) -> list[QuestionSample]:
    r"""
    Read GQA.

    Args:
        questions (`str` or `os.PathLike`):
            testdev_balanced_questions.json or another of them. Those of test have no answers.
        images (`str` or `os.PathLike`):
            Folder of the pictures.

    Returns:
        `list[QuestionSample]`

    Raises:
        ValueError: if the file is another one, or if a field of an entry is missing or of another type.
        FileNotFoundError: if a file or a picture is not there.
    """
    pictures = PictureFolder(images)
    samples = []
    for question_id, entry in read_object(questions).items():
        where = f"{questions}, {question_id!r}"
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where} is {shorten(entry)}; questions by their id were expected.")
        image_id = field_of(entry, "imageId", where, check_id)
        question = field_of(entry, "question", where, check_text)
        answers = [field_of(entry, "answer", where, check_text)] if "answer" in entry else []
        path = pictures.find(f"{image_id}.jpg")
        samples.append(QuestionSample(path, image_id, question_id, question, answers, source=where))
    pictures.check()
    return samples


def read_pope(
    questions: str | os.PathLike | Sequence[str | os.PathLike], images: str | os.PathLike
) -> list[QuestionSample]:
    r"""
    Read POPE, with the name of the file as the group.

    Args:
        questions (`str`, `os.PathLike` or a list of them):
            coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json or other files of POPE, each with
            a question on each line.
        images (`str` or `os.PathLike`):
            Folder of the pictures; those of COCO may also lie in its folders train2014 and val2014.

    Returns:
        `list[QuestionSample]`: the name of a question has that of the file in front, as in `"coco_pope_random/1"`.

    Raises:
        ValueError: if a file is another one, if a field of an entry is missing or of another type, if two entries or
            two files have the same name, or if a label is neither yes nor no.
        FileNotFoundError: if a file or a picture is not there.
    """
    pictures = PictureFolder(images)
    samples = []
    groups: dict[str, str | os.PathLike] = {}
    for path in paths_of(questions):
        group = Path(path).stem
        if group in groups:
            raise ValueError(f"{groups[group]} and {path} have the same name, and results are told apart by it.")
        groups[group] = path
        for where, entry in read_lines(path):
            question_id = f"{group}/{field_of(entry, 'question_id', where, check_id)}"
            filename, question, label = (
                field_of(entry, name, where, check_text) for name in ("image", "text", "label")
            )
            if label.lower() not in ("yes", "no"):
                raise ValueError(f"{where}: 'label' is {shorten(label)}; yes or no was expected.")
            picture = pictures.find(*coco_places(filename))
            samples.append(QuestionSample(picture, filename, question_id, question, [label.lower()], group, where))
    pictures.check()
    check_distinct_ids(samples)
    return samples


def read_aokvqa(questions: str | os.PathLike, images: str | os.PathLike) -> list[QuestionSample]:
    r"""
    Read A-OKVQA: questions with four choices.

    Args:
        questions (`str` or `os.PathLike`):
            aokvqa_v1p0_val.json or another of them. That of test has no answers.
        images (`str` or `os.PathLike`):
            Folder of COCO's pictures of 2017, which may also lie in its folders such as val2017.

    Returns:
        `list[QuestionSample]`: with `choices`, and the right one as the answer.

    Raises:
        ValueError: if the file is another one, if a field of an entry is missing or of another type, if two entries
            have the same id, or if the number of the right choice is none of a choice.
        FileNotFoundError: if a file or a picture is not there.
    """
    pictures = PictureFolder(images)
    samples = []
    for where, entry in read_list(questions):
        image_id, question_id = (field_of(entry, name, where, check_id) for name in ("image_id", "question_id"))
        if not str(image_id).isdecimal():
            raise ValueError(f"{where}: 'image_id' is {shorten(image_id)}; a number was expected, that of the file.")
        filename = f"{int(image_id):012d}.jpg"
        path = pictures.find(f"{field_of(entry, 'split', where, check_text)}2017/{filename}", filename)
        question = field_of(entry, "question", where, check_text)
        choices, number = field_of(entry, "choices", where, check_list), entry.get("correct_choice_idx")
        answers = [] if number is None else [_choice(number, choices, where)]
        samples.append(QuestionSample(path, image_id, question_id, question, answers, None, where, choices))
    pictures.check()
    check_distinct_ids(samples)
    return samples


def _choice(answer: Any, choices: list, where: str) -> Any:
    """Return the choice that an answer is, or whose number it is."""
    if isinstance(answer, (str, bool)) or not isinstance(answer, int):
        return answer
    if not 0 <= answer < len(choices):
        raise ValueError(f"{where}: the answer is choice {answer}, and there are {len(choices)}, numbered from 0.")
    return choices[answer]


def read_caption_rows(
    rows: Any,
    image_column: str = "image",
    caption_column: str = "caption",
    id_column: str | None = None,
    allow_urls: bool | Sequence[str] = False,
) -> list[CaptionSample]:
    r"""
    Read captions in a dataset.

    Args:
        rows (`datasets.Dataset` or `Sequence[Mapping]`):
            The dataset.
        image_column (`str`, *optional*, defaults to `"image"`):
            Column of the pictures.
        caption_column (`str`, *optional*, defaults to `"caption"`):
            Column of a caption, or of a list of captions, which may be empty. An empty caption does not count.
        id_column (`str`, *optional*):
            Column of the pictures' ids: rows with the same id are about one picture, that of the first of them.
            Without it, each row has a picture of its own, whose id is the number of the row.
        allow_urls (`bool` or `list[str]`, *optional*, defaults to `False`):
            Which URLs in the rows are fetched: none, with `True` those of public addresses, with a list also those of
            the hosts in it.

    Returns:
        `list[CaptionSample]`

    Raises:
        ValueError: if there is no such column, or a value is missing or of another type.
    """
    found: dict[Any, tuple[RowImage, list[str]]] = {}
    for image, values in _read_rows(rows, image_column, [caption_column, id_column], allow_urls):
        image_id = image.row if id_column is None else _value(values, id_column, image.row, check_id)
        captions = found.setdefault(image_id, (image, []))[1]
        captions += filter(has_text, _texts(values, caption_column, image.row))
    return [
        CaptionSample(image, image_id, captions, source=f"row {image.row}")
        for image_id, (image, captions) in found.items()
    ]


def read_question_rows(
    rows: Any,
    image_column: str = "image",
    question_column: str = "question",
    answer_column: str = "answer",
    id_column: str | None = None,
    image_id_column: str | None = None,
    group_column: str | None = None,
    allow_urls: bool | Sequence[str] = False,
    choices_column: str | None = None,
) -> list[QuestionSample]:
    r"""
    Read questions in a dataset.

    Args:
        rows (`datasets.Dataset` or `Sequence[Mapping]`):
            The dataset.
        image_column (`str`, *optional*, defaults to `"image"`):
            Column of the pictures.
        question_column (`str`, *optional*, defaults to `"question"`):
            Column of the questions.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            Column of an answer, of a list of answers, which may be empty, or of a list of dicts with `answer`.
        id_column (`str`, *optional*):
            Column of the questions' ids. Without it, the id is the number of the row.
        image_id_column (`str`, *optional*):
            Column of the pictures' ids: rows with the same id are about one picture, that of the first of them, which
            is read once for all questions about it.
        group_column (`str`, *optional*):
            Column that scores are told apart by.
        allow_urls (`bool` or `list[str]`, *optional*, defaults to `False`):
            Which URLs in the rows are fetched: none, with `True` those of public addresses, with a list also those of
            the hosts in it.
        choices_column (`str`, *optional*):
            Column of lists of answers to choose from. The answer is then one of them, or its number, from 0.

    Returns:
        `list[QuestionSample]`

    Raises:
        ValueError: if there is no such column, if a value is missing or of another type, or if two rows have the same
            id.
    """
    columns = [question_column, answer_column, id_column, image_id_column, group_column, choices_column]
    images: dict[Any, RowImage] = {}
    samples = []
    for image, values in _read_rows(rows, image_column, columns, allow_urls):
        row = image.row
        image_id = row if image_id_column is None else _value(values, image_id_column, row, check_id)
        group = None if group_column is None else _value(values, group_column, row)
        choices = None if choices_column is None else _value(values, choices_column, row, check_list)
        if choices is not None:
            values = {**values, answer_column: _choice(_value(values, answer_column, row), choices, f"row {row}")}
        samples.append(
            QuestionSample(
                images.setdefault(image_id, image),
                image_id,
                row if id_column is None else _value(values, id_column, row, check_id),
                _value(values, question_column, row, check_text),
                _texts(values, answer_column, row),
                None if group is None else str(group),
                f"row {row}",
                choices,
            )
        )
    check_distinct(samples, sample_id, f"have the same id in column {id_column!r}, and each needs its own")
    return samples


def _read_rows(
    rows: Any, image_column: str, columns: list[str | None], allow_urls: bool | Sequence[str]
) -> Iterator[tuple[RowImage, Mapping]]:
    """Yield the picture of each row, as it is stored, and the row's columns that are named."""
    if len(rows) == 0:
        raise ValueError("The dataset has no rows.")
    if column_names(rows) is not None:
        rows = rows.with_format(None)  # a tensor is no id, and no text
    pictures = select_columns(rows, [image_column])
    get_column(pictures[0], image_column)
    others = select_columns(rows, [name for name in columns if name is not None])
    for row, values in enumerate(others):
        # Rows of `datasets` have the same columns, and their pictures are left where they are
        if others is pictures and _value(values, image_column, row) is None:
            raise ValueError(f"row {row}, column {image_column!r}: there is no picture.")
        yield RowImage(pictures, row, image_column, allow_urls), values


def _value(values: Mapping, column: str, row: int, check: Callable[[Any, str], None] | None = None) -> Any:
    """Return the value of a row in a column."""
    try:
        value = get_column(values, column)
    except ValueError as error:
        raise ValueError(f"row {row}: {error}") from error
    if check is not None:
        check(value, f"row {row}, column {column!r}")
    return value


def _texts(values: Mapping, column: str, row: int) -> list[str]:
    """Return one text, several, or several records with `answer`, as a list; none if all of them are empty."""
    value, name = _value(values, column, row), f"row {row}, column {column!r}"
    texts = texts_of(value)
    for number, text in enumerate(texts):
        check_text(text, name if texts == [value] else f"{name}, entry {number}")
    return texts if has_text(texts) else []


__all__ = [
    "read_aokvqa",
    "read_caption_rows",
    "read_coco_objects",
    "read_gqa",
    "read_karpathy",
    "read_nocaps",
    "read_pope",
    "read_question_rows",
    "read_synonyms",
    "read_vqa",
]
