"""Videos of every kind to a number of frames, spread evenly, and errors that say which video is broken."""

import importlib
import mimetypes
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.utils import is_av_available, is_torchcodec_available
from transformers.video_utils import VideoMetadata, load_video

from .image_loading import as_load_error, is_url


NUM_FRAMES = 4  # as many as InstructBLIP-Video reads
VIDEO_TOKEN = "<video>"
VIDEO_ENDINGS = (  # in lower case
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".mts", ".ogv", ".webm", ".wmv"),
)


@dataclass(frozen=True)
class Video:
    """A video in a list of images, which stands for its frames."""

    source: Any


class _Problem(Exception):
    """Says what is wrong with a video, and `sample_frames` adds the video's name."""


def is_video_name(name: str | os.PathLike) -> bool:
    """
    Tell whether a file is a video by the ending of its name. A GIF is a picture, its first, unless it is given as a
    video.

    Args:
        name (`str` or `os.PathLike`):
            Name of the file.

    Returns:
        `bool`.
    """
    return os.path.splitext(os.fspath(name))[1].lower() in VIDEO_ENDINGS


def is_video(value: Any) -> bool:
    """
    Tell whether what stands in the place of a picture is a video: a file by its name, or a list of pictures.

    Args:
        value:
            Anything that [`~image_loading.load_image`] or [`sample_frames`] takes.

    Returns:
        `bool`.
    """
    path = value.get("path") if isinstance(value, Mapping) else value
    return isinstance(value, (list, tuple)) or (isinstance(path, (str, os.PathLike)) and is_video_name(path))


def frame_numbers(total: int, num_frames: int) -> list[int]:
    """
    Spread frames over a video as LAVIS does: frame `i` of `num_frames` is number `i * total // num_frames`. The first
    frame is always taken, the last one only if all are. If there are fewer frames than asked for, some stand several
    times in a row: of 2 frames, 4 are 0, 0, 1, 1.

    Args:
        total (`int`):
            Frames of the video.
        num_frames (`int`):
            Frames to take.

    Returns:
        `list[int]`: numbers of frames, in ascending order.
    """
    return [i * total // num_frames for i in range(num_frames)]


def sample_frames(video: Any, num_frames: int | None = NUM_FRAMES, name: str | None = None) -> list:
    """
    Take frames of a video, spread evenly ([`frame_numbers`]), as pictures for [`~image_loading.load_image_for`].

    Args:
        video (`str`, `os.PathLike`, `bytes`, `np.ndarray`, `torch.Tensor`, `list` or `dict`):
            A file, or its bytes, which PyAV reads or, if only that is installed, torchcodec; an array of shape
            `(frames, height, width, channels)` or `(frames, channels, height, width)`; a list of pictures of any kind
            that [`~image_loading.load_image`] takes; a `{"bytes": ..., "path": ...}` record as in `datasets`. A URL is
            not fetched.
        num_frames (`int`, *optional*, defaults to 4):
            Frames to take. There are always as many, also of a shorter video. `None` takes all.
        name (`str`, *optional*):
            What an error calls the video, such as `"video 3 of 8"`. The path is always added.

    Returns:
        `list`: the pictures, of which those of a file are upright 8-bit RGB.

    Raises:
        ValueError: if `num_frames` is less than 1.
        ImageLoadError: if the video can't be read: it is missing, broken, truncated, no video, has no frames, or has
            frames larger than `PIL.Image.MAX_IMAGE_PIXELS`, or neither PyAV nor torchcodec is installed.
    """
    if num_frames is not None and (not isinstance(num_frames, int) or num_frames < 1):
        raise ValueError(f"num_frames={num_frames!r}: a whole number of at least 1 was expected.")
    try:
        return _sample(video, num_frames)
    except _Problem as problem:
        raise as_load_error(str(problem), video, name) from problem.__cause__


def list_videos(videos: Any) -> list:
    """
    Return videos as a list: one video as a list of one. A list of pictures of PIL, or of arrays of a picture each, is
    one video.

    Args:
        videos:
            A video of any kind that [`sample_frames`] takes, or a list of videos, or an array of shape
            `(videos, frames, ...)`.

    Returns:
        `list`: the videos.
    """
    if isinstance(videos, (list, tuple)):
        are_frames = len(videos) > 0 and all(isinstance(v, Image.Image) or _dims(v) in (2, 3) for v in videos)
        return [videos] if are_frames else list(videos)
    return list(videos) if _dims(videos) == 5 else [videos]


def _dims(value: Any) -> int | None:
    return value.ndim if isinstance(value, (np.ndarray, torch.Tensor)) else None


def _sample(video: Any, num_frames: int | None) -> list:
    if isinstance(video, Mapping):
        video = video.get("path") if video.get("bytes") is None else video["bytes"]
    if isinstance(video, (bytes, bytearray)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "video")
            path.write_bytes(video)
            return _read_file(str(path), num_frames)
    if isinstance(video, (str, os.PathLike)):
        return _read_file(os.fspath(video), num_frames)
    if not isinstance(video, (list, tuple)) and _dims(video) != 4:
        shape = f" of {_dims(video)} dimensions" if _dims(video) is not None else ""
        raise _Problem(
            f"cannot make a video of a {type(video).__name__}{shape}. Give a path, an array of shape (frames, height, "
            "width, channels) or (frames, channels, height, width), or a list of pictures"
        )
    if len(video) == 0:
        raise _Problem("the video has no frames. Give one of at least one frame")
    return [video[number] for number in frame_numbers(len(video), num_frames or len(video))]


def _read_file(path: str, num_frames: int | None) -> list[np.ndarray]:
    if is_url(path):
        raise _Problem("a video is not fetched by its URL. Download the file, and give its path")
    if not os.path.isfile(path):
        raise _Problem("no such file. Give the path of a video" if not os.path.exists(path) else "this is no file")
    kind = mimetypes.guess_type(path)[0] or ""
    if kind.startswith("image/") and kind != "image/gif":
        raise _Problem("this is a picture, not a video. Several pictures that are one video are given as a list")
    backend = "pyav" if is_av_available() else "torchcodec" if is_torchcodec_available() else None
    if backend is None:
        raise _Problem("videos are read by PyAV, which is not installed: pip install av (or blip2-hf[video])")
    wanted: list[int] = []

    def choose(metadata: VideoMetadata, **kwargs) -> np.ndarray:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and (metadata.width or 0) * (metadata.height or 0) > limit:
            raise _Problem(f"its frames have {metadata.width}x{metadata.height} pixels, the limit is {limit}")
        total = metadata.total_num_frames or _count_frames(path)
        if not total:
            raise _Problem("the video has no frames. Record or save it again")
        wanted.extend(frame_numbers(total, num_frames or total))
        return np.unique(wanted)

    try:
        turns = _quarter_turns(path) if backend == "pyav" else 0
        frames, _ = load_video(path, backend=backend, sample_indices_fn=choose)
    except (_Problem, MemoryError):
        raise
    except Exception as error:  # decoders raise whatever they like
        raise _Problem(
            f"no video that {backend} can read, or a broken one ({type(error).__name__}: {error}). Give a video file, "
            "or save it again"
        ) from error
    numbers = np.unique(wanted)
    if len(frames) < len(numbers):
        raise _Problem(f"the video ends before frame {numbers[len(frames)]}: it is truncated. Fetch or save it again")
    frames = np.rot90(frames, turns, axes=(1, 2)) if turns else frames
    return [frames[place] for place in np.searchsorted(numbers, wanted)]


def _count_frames(path: str) -> int:
    """Count the frames of a file whose header does not tell, such as Matroska's, without decoding them."""
    # Not `import av`, which remote code would be taken to need
    av: Any = importlib.import_module("av")
    with av.open(path) as container:
        return sum(packet.size > 0 for packet in container.demux(video=0))


def _quarter_turns(path: str) -> int:
    """Return how often the frames are to be turned left by 90 degrees, as telephones write it into the file."""
    av: Any = importlib.import_module("av")
    with av.open(path) as container:
        if not container.streams.video:
            raise _Problem("the file has no video, only sound or other streams. Give a video file")
        first = next(container.decode(video=0), None)
        return 0 if first is None else round(first.rotation / 90) % 4


__all__ = ["Video", "frame_numbers", "is_video", "is_video_name", "list_videos", "sample_frames"]
