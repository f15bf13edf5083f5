"""The pictures of a folder, and the model's input for them."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..models.image_loading import ImageLoadError, load_image_for


logger = logging.get_logger(__name__)

SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)


def find_pictures(folder: str | os.PathLike, directory: str | os.PathLike | None = None) -> dict[str, list[int]]:
    r"""
    The pictures of a folder and of the folders in it, by the endings of their names. Names that begin with a dot are
    passed over, links to folders are not followed.

    Args:
        folder (`str` or `os.PathLike`):
            The folder.
        directory (`str` or `os.PathLike`, *optional*):
            A folder that is left out: that of the index.

    Returns:
        `dict[str, list[int]]`: size in bytes and time of the last change in nanoseconds, by the path inside `folder`.

    Raises:
        ValueError: if there are none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder. Give a folder of pictures.")
    left_out = None if directory is None else Path(directory).resolve()
    found = {}
    for parent, folders, files in os.walk(folder, onerror=lambda error: logger.warning(f"Left out: {error}")):
        folders[:] = [name for name in folders if name[0] != "." and Path(parent, name).resolve() != left_out]
        for name in files:
            path = Path(parent, name)
            if name[0] != "." and path.suffix.lower() in SUFFIXES:
                try:
                    status = path.stat()
                except FileNotFoundError:  # it was removed just now, or is a link to nothing
                    continue
                found[path.relative_to(folder).as_posix()] = [status.st_size, status.st_mtime_ns]
    if not found:
        raise ValueError(f"{folder} has no pictures: files that end in {', '.join(SUFFIXES)} were looked for.")
    return dict(sorted(found.items()))


class PictureInputs(torch.utils.data.Dataset):
    """The model's input for each picture, or why there is none."""

    def __init__(self, folder: Path, paths: list[str], image_processor: Any):
        self.folder = folder
        self.paths = paths
        self.image_processor = image_processor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[int, torch.Tensor | None, str]:
        try:
            image = load_image_for(self.image_processor, self.folder / self.paths[number])
        except ImageLoadError as error:
            return number, None, str(error)
        return number, self.image_processor(images=[image], return_tensors="pt")["pixel_values"], ""


def collate(
    items: Iterable[tuple[int, torch.Tensor | None, str]],
) -> tuple[list[int], torch.Tensor | None, list[tuple[int, str]]]:
    """Numbers of the pictures that could be read, the model's input for them; numbers of the others, and why."""
    items = list(items)
    readable = [(number, pixel_values) for number, pixel_values, _ in items if pixel_values is not None]
    broken = [(number, reason) for number, pixel_values, reason in items if pixel_values is None]
    shapes = {tuple(pixel_values.shape[1:]) for _, pixel_values in readable}
    if len(shapes) > 1:
        raise ValueError(
            f"The image processor made pictures of several sizes, {sorted(shapes)}. Give one that makes them of one "
            "size."
        )
    pixel_values = torch.cat([pixel_values for _, pixel_values in readable]) if readable else None
    return [number for number, _ in readable], pixel_values, broken


__all__ = ["find_pictures"]
