"""Small videos that tests write themselves."""

from pathlib import Path

import numpy as np
import pytest


HEIGHT, WIDTH = 48, 64


def make_frames(num_frames: int = 8, first: int = 0) -> np.ndarray:
    """Grey frames, each lighter than the one before, the left half of each black."""
    frames = np.zeros((num_frames, HEIGHT, WIDTH, 3), np.uint8)
    frames[:, :, WIDTH // 2 :] = (first + 40 + 25 * np.arange(num_frames))[:, None, None, None]
    return frames


def write_video(path: Path, frames: np.ndarray | None = None, codec: str = "mpeg4") -> Path:
    """Write frames as a video, in the container that the ending of its name says."""
    av = pytest.importorskip("av", reason="PyAV writes and reads the videos")
    frames = make_frames() if frames is None else frames
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=5)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    """Write a file of a tenth of a second of silence, without video."""
    av = pytest.importorskip("av", reason="PyAV writes and reads the videos")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4410), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux([*stream.encode(frame), *stream.encode()])
    return path


def numbers_of(pictures) -> list[int]:
    """Which of the frames of `make_frames` each picture is, by how light its lightest pixels are."""
    return [round((float(np.quantile(np.asarray(picture), 0.75)) - 40) / 25) for picture in pictures]
