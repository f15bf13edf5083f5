"""Choosing the output of captions by its name and format, and refusing one that does not fit the pictures."""

import os
import re
from pathlib import Path, PurePosixPath

from ..jobs.errors import CollectionError
from ..jobs.picture_files import picture_endings
from .caption_output import CaptionOutput
from .caption_tables import TABLES
from .pictures import FolderPictures, Pictures
from .sidecars import SidecarFiles
from .table_output import METADATA, CaptionFile


EXISTING = ("skip", "overwrite", "append", "prepend")


def open_output(
    output: str | os.PathLike | None,
    output_format: str | None,
    pictures: Pictures,
    existing: str = "skip",
    num_captions: int = 1,
    extension: str = ".txt",
    with_confidence: bool = False,
) -> CaptionOutput:
    """
    Return the output of a format, by default the one that the ending of its name tells. Without `output`, text files
    lie in the folder of the pictures.
    """
    if existing not in EXISTING:
        raise ValueError(f"existing={existing!r}: one of {', '.join(EXISTING)} was expected.")
    path = None if output is None else Path(output)
    ending = "" if path is None or path.is_dir() else path.suffix.removeprefix(".").lower()
    output_format = output_format or {"": "txt"}.get(ending, ending)
    if output_format not in ("txt", *TABLES):
        raise CollectionError(
            f"{output}: the ending does not tell the format. Name a file that ends in {', '.join(TABLES)}, or give "
            f"--format txt, {', '.join(TABLES)}."
        )
    if output_format != "txt" and extension != ".txt":
        raise CollectionError(
            f"--extension {extension} is the ending of text files, and {output} is one file. Leave it out, or give a "
            "folder as --output."
        )
    if with_confidence and output_format == "txt":
        raise CollectionError(
            "Text files, which are written without --output, have no place for a confidence. Give a .jsonl, .csv or "
            ".parquet file as --output."
        )
    if with_confidence and existing in ("append", "prepend"):
        raise CollectionError(
            f"--existing {existing} joins captions, which then have no confidence of their own. Leave out one of the "
            "two."
        )
    if output_format == "txt":
        return _open_sidecars(path, pictures, existing, num_captions, extension)
    if path is None or path.is_dir():
        raise CollectionError(f"--format {output_format} needs the name of a file, --output captions.{output_format}.")
    if output_format == "csv" and num_captions > 1:
        raise CollectionError(
            "A cell of CSV has one caption. For several of a picture, give a .jsonl or a .parquet file."
        )
    if path.name in METADATA:
        pictures = _named_by_metadata(path, pictures)
    return CaptionFile(path, output_format, pictures, existing, num_captions, with_confidence)


def _named_by_metadata(path: Path, pictures: Pictures) -> FolderPictures:
    if not isinstance(pictures, FolderPictures):
        raise CollectionError(
            f"{path.name} describes a folder of pictures. Give another name, such as captions.jsonl."
        )
    if others := [name for name in sorted(METADATA - {path.name}) if path.with_name(name).exists()]:
        raise CollectionError(
            f"{path.with_name(others[0])} is there already, and `datasets` reads one metadata file of a folder. Give "
            "it as --output, or remove it."
        )
    named = pictures.named_from(path.parent)
    names = (named.identity(index)["file_name"] for index in range(len(named)))
    inner = sorted({path.parent / folder for name in names for folder in PurePosixPath(name).parents[:-1]})
    if found := [place for folder in inner for name in sorted(METADATA) if (place := folder / name).exists()]:
        raise CollectionError(
            f"{found[0]} describes some of the pictures already, which would stand in two files. Caption "
            f"{found[0].parent} with it as --output, or move its rows into {path}."
        )
    return named


def _open_sidecars(
    path: Path | None, pictures: Pictures, existing: str, num_captions: int, extension: str
) -> SidecarFiles:
    if not isinstance(pictures, FolderPictures):
        raise CollectionError(
            "A .txt for each picture needs a folder of pictures. Give --output a file that ends in .jsonl, .csv or "
            ".parquet."
        )
    if path is not None and path.is_file():
        raise CollectionError(f"{path} is a file, and --format txt needs a folder. Give another --output.")
    if not re.fullmatch(r"\.\w[\w.-]*", extension) or extension.lower() in picture_endings():
        raise CollectionError(f"--extension {extension}: the ending of a text file was expected, such as .caption.")
    if path is not None and not path.is_dir() and path.suffix.lower() in (".txt", extension.lower()):
        raise CollectionError(
            f"--output {path}: a folder was expected, of a text file for each picture. Give "
            f"{path.with_suffix('')}, or for one file a name that ends in .jsonl, .csv or .parquet."
        )
    return SidecarFiles(path, pictures, existing, num_captions, extension)
