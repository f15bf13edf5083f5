"""Captions in a text file for each picture."""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from ..jobs.atomic_files import write_text
from ..jobs.errors import CollectionError
from ..jobs.picture_files import find_beside
from .caption_output import BEFORE, CAPTION, CaptionOutput, join_texts, without_broken
from .captions import PictureCaption
from .pictures import FolderPictures


class SidecarFiles(CaptionOutput):
    """A text file for each picture of a folder: beside it, or at the same place in another folder."""

    pictures: FolderPictures

    def __init__(
        self, folder: Path | None, pictures: FolderPictures, existing: str, num_captions: int, extension: str
    ):
        self.folder = pictures.folder if folder is None else folder
        self.extension = extension
        base = self.folder / f"captions{'' if extension == '.txt' else extension}"
        super().__init__(self.folder, base, pictures, existing, num_captions)
        self.sidecars = [find_beside(self.folder / name, extension) for name in pictures.names]
        first: dict[Path, str] = {}
        for name, sidecar in zip(pictures.names, self.sidecars, strict=True):
            if sidecar in first:
                raise CollectionError(
                    f"{first[sidecar]} and {name} would both have the captions of {sidecar}. Take --format jsonl or "
                    "parquet, or rename one."
                )
            first[sidecar] = name

    def has_captions(self) -> bool:
        # Without settings, texts beside pictures are those of the user
        return self.has_parts() or (bool(self._found) and any(self.folder.rglob(f"*{self.extension}")))

    def captioned(self) -> Iterator[int]:
        return (index for index, sidecar in enumerate(self.sidecars) if sidecar.exists())

    def folders(self) -> set[Path]:
        return {self.folder, *(path.parent for path in self.sidecars)}

    def value(self, texts: list[str]) -> str:
        return "".join(f"{' '.join(text.split()) if self.is_list else text}\n" for text in texts)

    def joined(self, first: str, second: str) -> str:
        first, second = first.strip(), second.strip()
        return (f"{first}\n{second}" if first and second and self.is_list else join_texts(first, second)) + "\n"

    def before(self, index: int) -> str | None:
        sidecar = self.sidecars[index]
        return sidecar.read_bytes().decode("utf-8-sig", "surrogateescape") if sidecar.exists() else None

    def write(self, add: Callable[[Any], None], caption: PictureCaption) -> bool:
        record = self.record(caption)
        if self.existing != "skip" or CAPTION not in record:
            add(record)  # first, so that `prepare` can tell whether the text is written
        if CAPTION in record:
            self._write_text(caption.index, record[CAPTION])
        return CAPTION in record

    def _write_text(self, index: int, text: str):
        sidecar = self.sidecars[index]
        sidecar.parent.mkdir(parents=True, exist_ok=True)
        write_text(sidecar, text)

    def prepare(self, settings: Mapping[str, Any]):
        super().prepare(settings)
        for record in chain(*map(self.read, self.parts())):
            index = self.pictures.position(record)
            # Another text than the one before is the new one, or the user's
            if CAPTION in record and index is not None and self.before(index) == record.get(BEFORE):
                self._write_text(index, record[CAPTION])

    def join(self, parts: list[Path], broken: list[dict[str, Any]]):
        for _ in without_broken(self.in_order(*map(self.read, parts)), broken):
            pass  # the texts are there
