"""Which files are pictures: the same ones for every job."""

import os

import pytest
from tiny import make_image

from blip2_hf.captioning import FolderPictures
from blip2_hf.jobs.errors import CollectionError
from blip2_hf.jobs.picture_files import find_picture_files
from blip2_hf.search import find_pictures


NAMES = ["B.JPG", "a/x.heic", "a/y.jp2", "a/z/w.webp", "a.png", "b.jpeg", "c.Tiff", "d.gif", "e.ico", "f.avif"]
NONE = ["notes.txt", "png", "movie.mpg", "x.h5", ".hidden.png", ".thumbnails/a.png", "a/.b/c.jpg", "a/._x.jpg"]


@pytest.fixture
def folder(tmp_path):
    for name in (*NAMES, *NONE):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * len(name))
    return tmp_path / "photos"


def test_captions_and_an_index_are_of_the_same_files(folder):
    assert (
        list(find_picture_files(folder))
        == FolderPictures(folder).names
        == list(find_pictures(folder))
        == sorted(NAMES)
    )
    assert find_pictures(folder)["a/x.heic"] == [8, (folder / "a/x.heic").stat().st_mtime_ns]


def test_links_that_lead_in_circles_or_nowhere(folder):
    (folder / "a" / "up").symlink_to(folder)
    (folder / "a" / "self.png").symlink_to(folder / "a" / "self.png")
    (folder / "gone.png").symlink_to(folder / "nosuch.png")
    (folder / "link.png").symlink_to(folder / "a.png")
    assert list(find_picture_files(folder)) == sorted([*NAMES, "link.png"])
    (folder.parent / "same").symlink_to(folder)
    assert list(find_picture_files(folder.parent / "same")) == sorted([*NAMES, "link.png"])


def test_what_is_no_file(folder):
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    assert list(find_picture_files(folder)) == sorted(NAMES)


def test_a_folder_that_is_left_out(folder):
    assert list(find_picture_files(folder, folder / "a")) == sorted(name for name in NAMES if name[:2] != "a/")
    with pytest.raises(CollectionError, match="nosuch: no such folder"):
        find_picture_files(folder / "nosuch")
    with pytest.raises(CollectionError, match="a.png: no such folder"):
        FolderPictures(folder / "a.png")
    make_image().save(folder / "a.png")
    assert FolderPictures(folder)[FolderPictures(folder).names.index("a.png")].size == make_image().size
