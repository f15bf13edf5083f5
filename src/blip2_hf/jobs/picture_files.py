"""Which files are pictures, or videos: one table of endings, and one walk through a folder."""

import functools
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image
from transformers.utils import logging

from ..models.video_loading import is_video_name
from .errors import CollectionError


logger = logging.get_logger(__name__)

_WITH_A_PLUGIN = {
    ".avif",
    ".heic",
    ".heif",
    ".hif",
    ".jxl",
}  # found without the plug-in too, so that the error can ask for it
_NO_PICTURES = {"BUFR", "GRIB", "HDF5", "MPEG"}  # PIL knows these formats by name, and can't decode them


@functools.cache
def picture_endings() -> frozenset[str]:
    """Return the endings of files that PIL reads, in lower case, such as `.jpg`."""
    Image.init()
    known = Image.registered_extensions().items()
    return frozenset(_WITH_A_PLUGIN | {e for e, name in known if name in Image.OPEN and name not in _NO_PICTURES})


def is_picture_name(name: str) -> bool:
    """Tell whether a file is a picture by the ending of its name."""
    return os.path.splitext(name)[1].lower() in picture_endings()


def is_picture_or_video_name(name: str) -> bool:
    """Tell whether a file is a picture or a video by the ending of its name."""
    return is_picture_name(name) or is_video_name(name)


def find_beside(picture: Path, ending: str) -> Path:
    """Return the path of the file beside a picture with this ending, which is in upper case if that file is there."""
    stem = os.path.splitext(picture)[0]
    paths = [Path(f"{stem}{own}") for own in (ending, ending.upper())]
    return next((path for path in paths if path.is_file()), paths[0])


def find_picture_files(
    folder: str | os.PathLike, left_out: str | os.PathLike | None = None
) -> dict[str, os.stat_result]:
    """
    Find the pictures in a folder and in the folders inside it, by the endings of their names. Return the size and the
    times of each, by its path inside `folder`, in the order of these paths. Names that begin with a dot and the folder
    `left_out` are passed over, links to folders are not followed, and what is no file, such as a named pipe, is no
    picture.
    """
    return dict(sorted(_walk(Path(folder), left_out)))


def find_pictures_or_videos(folder: str | os.PathLike) -> list[str]:
    """
    Return the paths of the pictures in a folder or, if there are none, of the videos. Telephones write short videos
    beside pictures, under the same names.
    """
    found = sorted(name for name, _ in _walk(Path(folder), is_wanted=is_picture_or_video_name))
    pictures = [name for name in found if is_picture_name(name)]
    if pictures and (passed_over := len(found) - len(pictures)):
        logger.warning(
            f"{folder}: {passed_over:,} videos are passed over, because there are pictures. Name the videos "
            "themselves, as in 'folder/*.mp4'."
        )
    return pictures or found


def has_pictures_or_videos(folder: str | os.PathLike) -> bool:
    """Tell whether `find_pictures_or_videos` finds any, without a walk through the whole folder."""
    return any(True for _ in _walk(Path(folder), is_wanted=is_picture_or_video_name))


def _walk(
    folder: Path,
    left_out: str | os.PathLike | None = None,
    is_wanted: Callable[[str], bool] = is_picture_name,
) -> Iterator[tuple[str, os.stat_result]]:
    if not folder.is_dir():
        raise CollectionError(f"{folder}: no such folder. Give a folder of pictures.")
    passed_over = None if left_out is None else Path(left_out).resolve()
    for parent, folders, names in os.walk(folder, onerror=_warn):
        folders[:] = [name for name in folders if name[0] != "." and Path(parent, name).resolve() != passed_over]
        for name in names:
            if name[0] != "." and is_wanted(name):
                path = Path(parent, name)
                try:
                    status = path.stat()
                except OSError as error:  # removed just now, or a link to nothing or to itself
                    _warn(error)
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield path.relative_to(folder).as_posix(), status


def _warn(error: OSError):
    logger.warning(f"Left out: {error}")
