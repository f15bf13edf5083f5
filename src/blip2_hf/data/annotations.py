"""Captions in the files that their authors publish: COCO's, Karpathy's and those of Flickr8k, as rows."""

import csv
import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..jobs.errors import shorten


_FLICKR_HEADER = "image,caption"
_FLICKR_TOKEN = re.compile(r"(?P<image>[^\t]+)#\d+\t(?P<caption>.*)")


def read_json_annotations(path: Path) -> list[dict[str, Any]] | None:
    """
    Return a row for each picture of a file of COCO or Karpathy, with a list of captions, or `None` if the file is none
    of them. Rows of Karpathy's file have a `split`.
    """
    content = _read_object(path)
    if content is None:
        return None
    if not isinstance(content.get("images"), list):
        _refuse_half(content, path)
        return None
    if "annotations" in content:
        return _read_coco(content, path)
    return [_karpathy_row(entry, where) for where, entry in _entries(content, "images", path)]


def _refuse_half(content: Mapping, path: Path):
    """Refuse a file of VQAv2, or annotations without their pictures."""
    entries = content.get("annotations")
    has_answers = isinstance(entries, list) and all(isinstance(e, Mapping) and "question_id" in e for e in entries)
    if isinstance(content.get("questions"), list) or (entries and has_answers):
        own, other = ("answers", "questions") if "annotations" in content else ("questions", "answers")
        raise ValueError(
            f"{path} is a file of {own}, whose {other} are in another file. `blip2-hf evaluate vqav2` reads both. To "
            "train on them, give a file with a question, its answers and its picture in each row."
        )
    if isinstance(entries, list):
        raise ValueError(f"{path} has 'annotations', but no list 'images' as COCO's files of captions have.")


def _read_coco(content: Mapping, path: Path) -> list[dict[str, Any]]:
    captions: dict[Any, list[str]] = {}
    for where, entry in _entries(content, "annotations", path):
        captions.setdefault(_field(entry, "image_id", where), []).append(_field(entry, "caption", where))
    rows = []
    for where, entry in _entries(content, "images", path):
        image_id = _field(entry, "id", where)
        row = {"image": _field(entry, "file_name", where), "image_id": image_id, "caption": captions.get(image_id, [])}
        rows.append(row)
    if captions and not any(row["caption"] for row in rows):
        raise ValueError(f"{path}: no 'image_id' of its annotations is an 'id' of its images.")
    return rows


def _karpathy_row(entry: Any, where: str) -> dict[str, Any]:
    folder, name = entry.get("filepath") if isinstance(entry, Mapping) else None, _field(entry, "filename", where)
    split = _field(entry, "split", where)
    return {
        "image": f"{folder}/{name}" if folder else name,
        "image_id": entry.get("cocoid", name),
        "caption": [_field(sentence, "raw", where) for sentence in _field(entry, "sentences", where)],
        "split": "train" if split == "restval" else split,
    }


def _entries(content: Mapping, name: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a list, each with what errors call it."""
    if not isinstance(content[name], list):
        raise ValueError(f"{path}: {name!r} is {shorten(content[name])}; a list was expected.")
    for number, entry in enumerate(content[name]):
        yield f"{path}, {name}[{number}]", entry


def _field(entry: Any, name: str, where: str) -> Any:
    if not isinstance(entry, Mapping) or name not in entry:
        found = sorted(map(str, entry)) if isinstance(entry, Mapping) else shorten(entry)
        raise ValueError(f"{where} has no {name!r}, but {found}. A file of captions was expected.")
    return entry[name]


def _read_object(path: Path) -> dict[str, Any] | None:
    """Return the object that a file of JSON is, or `None` if it has a list, or an object in each line."""
    with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
        first = file.readline()
        if not first.lstrip().startswith("{"):
            return None
        try:
            content = json.loads(first)
            return None if file.readline().strip() else content
        except ValueError:  # the object goes on in the next line, or is broken, which `datasets` tells
            pass
        try:
            return json.loads(first + file.read())
        except ValueError:
            return None


def read_text_annotations(path: Path) -> list[dict[str, Any]]:
    """Return a row for each picture of a text file of Flickr8k or Flickr30k, with a list of captions."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        if file.readline().strip() == _FLICKR_HEADER:
            # A comma in a caption may stand outside of quotes
            return _group((row[0], ",".join(row[1:])) for row in csv.reader(file) if row)
        file.seek(0)
        lines = [line.rstrip("\r\n") for line in file]
    found = [_FLICKR_TOKEN.fullmatch(line) for line in lines if line.strip()]
    if not found or None in found:
        raise ValueError(
            f"{path}: a text file is read if it is Flickr8k's captions.txt, with the header {_FLICKR_HEADER!r}, or "
            "Flickr8k.token.txt, with lines such as 'name.jpg#0<TAB>caption'. Give a table with the columns image and "
            "caption, such as a .csv or a .parquet."
        )
    return _group((match["image"], match["caption"]) for match in found if match)


def _group(pairs: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    captions: dict[str, list[str]] = {}
    for image, caption in pairs:
        captions.setdefault(image, []).append(caption.strip())
    return [{"image": image, "caption": texts} for image, texts in captions.items()]
