"""Videos of every kind to frames, and what errors say."""

import numpy as np
import pytest
import torch
import transformers.utils
from PIL import Image
from tiny import encode, make_image
from videos import HEIGHT, WIDTH, make_frames, numbers_of, write_sound, write_video

from blip2_hf import ImageLoadError
from blip2_hf.models import video_loading
from blip2_hf.models.video_loading import frame_numbers, is_video_name, list_videos, sample_frames


@pytest.mark.parametrize("total, num_frames", [(8, 4), (9, 4), (100, 4), (7, 3), (5, 5), (30, 1)])
def test_frames_are_those_of_lavis(total, num_frames):
    assert frame_numbers(total, num_frames) == np.arange(0, total, total / num_frames).astype(int).tolist()


def test_a_short_video_has_frames_several_times():
    assert frame_numbers(2, 4) == [0, 0, 1, 1]
    assert frame_numbers(3, 4) == [0, 0, 1, 2]
    assert frame_numbers(1, 4) == [0, 0, 0, 0]


# Matroska's header does not tell how many frames there are
@pytest.mark.parametrize("ending, codec", [("mp4", "mpeg4"), ("mkv", "mpeg4"), ("avi", "mpeg4"), ("webm", "vp8")])
def test_files(tmp_path, ending, codec):
    path = write_video(tmp_path / f"clip.{ending}", codec=codec)
    data = path.read_bytes()
    for video in (path, str(path), data, {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}):
        frames = sample_frames(video)
        assert np.asarray(frames).shape == (4, HEIGHT, WIDTH, 3)
        assert numbers_of(frames) == [0, 2, 4, 6]
    assert numbers_of(sample_frames(path, 3)) == [0, 2, 5]
    assert numbers_of(sample_frames(path, 8)) == numbers_of(sample_frames(path, None)) == list(range(8))
    short = write_video(tmp_path / f"short.{ending}", make_frames(2), codec)
    assert numbers_of(sample_frames(short)) == [0, 0, 1, 1]


def test_a_gif_that_is_given_as_a_video(tmp_path):
    pytest.importorskip("av", reason="PyAV reads the videos")
    first, *others = [Image.fromarray(frame) for frame in make_frames()]
    first.save(tmp_path / "clip.gif", save_all=True, append_images=others)
    assert numbers_of(sample_frames(tmp_path / "clip.gif")) == [0, 2, 4, 6]


def test_arrays_and_lists(tmp_path):
    frames = make_frames()
    channels_first = frames.transpose(0, 3, 1, 2)
    pictures = [Image.fromarray(frame) for frame in frames]
    for video in (frames, channels_first, torch.tensor(channels_first), pictures, tuple(pictures)):
        assert numbers_of(sample_frames(video)) == [0, 2, 4, 6]
    paths = []
    for i, picture in enumerate(pictures):
        paths.append(tmp_path / f"{i}.png")
        picture.save(paths[-1])
    assert sample_frames(paths, 2) == [paths[0], paths[4]]


def test_what_is_one_video_and_what_several():
    pictures, frames = [make_image(), make_image(1)], make_frames()
    assert list_videos("a.mp4") == ["a.mp4"]
    assert list_videos(["a.mp4", "b.mp4"]) == ["a.mp4", "b.mp4"]
    assert list_videos(pictures) == [pictures]
    assert list_videos([pictures, "a.mp4"]) == [pictures, "a.mp4"]
    assert list_videos([["1.png", "2.png"]]) == [["1.png", "2.png"]]
    assert [len(videos) for videos in (list_videos(frames), list_videos(np.stack([frames] * 3)))] == [1, 3]
    assert [len(videos) for videos in (list_videos(list(frames)), list_videos([frames, frames]))] == [1, 2]


# 16.16 fixed point, in the header of the track
MATRIX = b"\0\1\0\0" + b"\0" * 12 + b"\0\1\0\0" + b"\0" * 12 + b"\x40\0\0\0"
TO_THE_RIGHT = b"\0" * 4 + b"\0\1\0\0" + b"\0" * 4 + b"\xff\xff\0\0" + b"\0" * 16 + b"\x40\0\0\0"


def test_the_video_of_a_telephone_is_upright(tmp_path):
    path = write_video(tmp_path / "clip.mp4")
    data = path.read_bytes()
    start = data.index(MATRIX, data.index(b"tkhd"))
    path.write_bytes(data[:start] + TO_THE_RIGHT + data[start + len(MATRIX) :])
    frame = np.asarray(sample_frames(path)[0]).astype(int)
    # What is on the left was recorded to be seen above
    assert frame.shape == (WIDTH, HEIGHT, 3)
    assert frame[: WIDTH // 2 - 4].mean() < 5 < 35 < frame[WIDTH // 2 + 4 :].mean()


def told(video, **kwargs) -> str:
    with pytest.raises(ImageLoadError) as error:
        sample_frames(video, name="video 2 of 3", **kwargs)
    assert str(error.value).startswith("video 2 of 3 (")
    return str(error.value)


def test_errors_name_the_file_and_say_what_to_do(tmp_path, monkeypatch):
    whole = write_video(tmp_path / "whole.mp4", np.random.default_rng(0).integers(0, 256, (30, 48, 64, 3), np.uint8))
    for name in ("none.mp4", "broken.mp4", "cut.avi", "a.png", "empty.mp4"):
        assert repr(str(tmp_path / name))[1:-1] in told(tmp_path / name)
    assert "no such file" in told(tmp_path / "none.mp4")
    assert "this is no file" in told(tmp_path)
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    assert "no video that pyav can read, or a broken one" in told(tmp_path / "broken.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    assert "no video that pyav can read" in told(tmp_path / "empty.mp4")
    (tmp_path / "a.png").write_bytes(encode(make_image()))
    assert "this is a picture" in told(tmp_path / "a.png")
    cut = write_video(tmp_path / "cut.avi", np.random.default_rng(0).integers(0, 256, (30, 48, 64, 3), np.uint8))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    assert "truncated" in told(cut)
    assert "the file has no video, only sound or other streams" in told(write_sound(tmp_path / "sound.mp4"))
    assert "not fetched by its URL. Download the file" in told("https://example.com/a.mp4")
    assert "no frames" in told([])
    assert "cannot make a video of a ndarray of 3 dimensions" in told(make_frames()[0])
    assert "cannot make a video of a int" in told(3)
    with monkeypatch.context() as limited:
        limited.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        assert "64x48 pixels, the limit is 1000" in told(whole)
    with pytest.raises(ValueError, match="num_frames=0: a whole number of at least 1"):
        sample_frames(whole, 0)


def test_without_pyav_torchcodec_is_taken_or_asked_for(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.mp4")
    monkeypatch.setattr(video_loading, "is_av_available", lambda: False)
    monkeypatch.setattr(video_loading, "is_torchcodec_available", lambda: False)
    message = told(path)
    assert "clip.mp4" in message and "pip install av" in message
    monkeypatch.setattr(video_loading, "is_torchcodec_available", lambda: True)
    backends = []

    def load_video(path, backend, sample_indices_fn):
        backends.append(backend)
        numbers = sample_indices_fn(metadata=transformers.video_utils.VideoMetadata(total_num_frames=8))
        return torch.tensor(make_frames()[numbers]).permute(0, 3, 1, 2), None

    monkeypatch.setattr(video_loading, "load_video", load_video)
    frames = sample_frames(path, 3)
    assert backends == ["torchcodec"] and numbers_of(frames) == [0, 2, 5]


def test_names():
    assert all(map(is_video_name, ("a.mp4", "b/A.MOV", "x.webm")))
    assert not any(map(is_video_name, ("a.jpg", "mp4", "a.gif", "a.mp4.txt")))
