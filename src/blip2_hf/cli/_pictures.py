"""Pictures and videos that a user names one by one: files, wildcards, URLs."""

import glob
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit


_TABLES = (".arrow", ".csv", ".json", ".jsonl", ".parquet", ".tar", ".tsv")  # URLs with these endings are no pictures


def named_pictures(name: str) -> list[str] | None:
    """
    Return the files of pictures and videos that an argument names: a file, those that a wildcard stands for, or a URL.
    `None` if it names something else. A `ValueError` if the ending is that of one, and there is none.
    """
    from ..jobs.picture_files import is_picture_or_video_name
    from ..models.image_loading import is_url
    from ..models.video_loading import is_video_name

    if is_url(name):
        return None if urlsplit(name).path.lower().endswith(_TABLES) else [name]
    if Path(name).exists():
        return [name] if Path(name).is_file() and is_picture_or_video_name(name) else None
    if glob.has_magic(name):
        found = sorted(path for path in glob.glob(name, recursive=True) if is_picture_or_video_name(path))
        if found:
            return found
    if is_picture_or_video_name(name):
        raise ValueError(f"There is no {'video' if is_video_name(name) else 'picture'} {name}. Check the path.")
    return None


@contextmanager
def pixel_limit(most: int | None) -> Iterator[None]:
    """Read pictures of up to a number of pixels; `None` leaves the limit as it is, about 89 million."""
    from PIL import Image

    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = before if most is None else most
    try:
        with warnings.catch_warnings():
            # Larger pictures are refused, which is told
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
