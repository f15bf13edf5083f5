"""Pictures of rows: where a row may lead, for all that reads rows of datasets."""

import io
import os
import zipfile

import datasets
import numpy as np
import pytest
from picture_server import PICTURE, picture_bytes, picture_server
from PIL import Image
from tiny import make_image_processor, make_model

from blip2_hf.capfilt import capfilt_dataset
from blip2_hf.capfilt.captioned_pictures import CaptionedPictures
from blip2_hf.captioning import RowPictures
from blip2_hf.data import ImageTextPairs, ImageTextStream, cache_features, load_cached_features
from blip2_hf.data.rows import open_image, select_columns
from blip2_hf.evaluation import read_caption_rows, read_question_rows
from blip2_hf.evaluation.samples import open_sample_image
from blip2_hf.models import image_fetching
from blip2_hf.models.image_loading import ImageLoadError


@pytest.fixture(scope="module")
def server():
    with picture_server() as server:
        yield server


@pytest.fixture(autouse=True)
def count(server):
    server.connections = 0


def same(image):
    np.testing.assert_array_equal(np.asarray(image), np.asarray(PICTURE))


def captioned_picture(rows, allow_urls=False):
    found = CaptionedPictures(rows, "image", "caption", allow_urls)[1]
    if found.bad is not None:
        raise ImageLoadError(found.bad.reason)
    return found.picture


READERS = {
    "pairs": lambda rows, **allowed: ImageTextPairs(rows, **allowed)[1]["image"],
    "shared pictures": lambda rows, **allowed: ImageTextPairs(
        [{"image": 1, "caption": "a"}] * 2, images=rows, **allowed
    )[1]["image"],
    "stream": lambda rows, **allowed: list(ImageTextStream(rows.to_iterable_dataset(), **allowed))[1]["image"],
    "captioning": lambda rows, **allowed: RowPictures(rows, **allowed)[1],
    "capfilt": captioned_picture,
    "captions": lambda rows, **allowed: open_sample_image(read_caption_rows(rows, **allowed)[1]),
    "questions": lambda rows, **allowed: open_sample_image(
        read_question_rows(rows, question_column="caption", answer_column="caption", **allowed)[1]
    ),
}


def make_rows(kind, url):
    """Two rows, the second of which has a URL."""
    pictures = {"bytes": picture_bytes(), "path": None}, {"bytes": None, "path": url}
    if kind == "texts":
        return datasets.Dataset.from_list([{"image": path, "caption": "a"} for path in ("a.png", url)])
    rows = datasets.Dataset.from_list([{"image": picture, "caption": "a"} for picture in pictures])
    return rows.cast_column("image", datasets.Image()) if kind == "pictures of datasets" else rows


@pytest.mark.parametrize("kind", ["texts", "records", "pictures of datasets"])
@pytest.mark.parametrize("reader", READERS)
def test_a_url_in_a_row_is_fetched_only_if_it_is_allowed(reader, kind, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PICTURE.save("a.png")
    url, read = f"{server.url}/picture.png", READERS[reader]
    rows = make_rows(kind, url)
    with pytest.raises(ImageLoadError, match=rf"row 1.*'{url}'.*allow_urls=True \(--allow-urls\)"):
        read(rows)
    with pytest.raises(ImageLoadError, match=rf"row 1.*'{url}'.*127.0.0.1 has the address.*not public"):
        read(rows, allow_urls=True)
    assert server.connections == 0
    same(read(rows, allow_urls=["127.0.0.1"]))
    assert server.connections == 1


@pytest.mark.parametrize("reader", ["pairs", "shared pictures", "captioning", "captions", "questions"])
def test_a_url_in_a_row_that_is_made_on_the_fly(reader, server):
    rows = make_rows("pictures of datasets", f"{server.url}/picture.png").with_transform(lambda batch: batch)
    with pytest.raises(ImageLoadError, match=r"row 1.*allow_urls=True \(--allow-urls\)"):
        READERS[reader](rows)
    assert server.connections == 0
    same(READERS[reader](rows, allow_urls=["127.0.0.1"]))


def test_features_of_pictures_by_url(server, tmp_path):
    rows = make_rows("pictures of datasets", f"{server.url}/picture.png")
    arguments = rows, make_model().eval(), make_image_processor()
    with pytest.raises(ImageLoadError, match=r"row 1 .*allow_urls=True"):
        cache_features(*arguments, tmp_path / "refused")
    assert server.connections == 0
    features = load_cached_features(cache_features(*arguments, tmp_path / "allowed", allow_urls=["127.0.0.1"]))
    assert features[0]["image_embeds"] == features[1]["image_embeds"]


@pytest.mark.parametrize(
    "column", [datasets.Image(), datasets.List(datasets.Image()), {"text": datasets.Image(), "id": datasets.Image()}]
)
def test_no_column_has_datasets_fetch_what_it_holds(column, server):
    record = {"bytes": None, "path": f"{server.url}/picture.png"}
    value = [record] if isinstance(column, datasets.List) else record
    if isinstance(column, dict):
        value = {"text": record, "id": record}
    features = datasets.Features({"caption": column})
    for rows in (
        datasets.Dataset.from_dict({"caption": [value]}, features=features),
        datasets.Dataset.from_dict({"caption": [value]}, features=features).to_iterable_dataset(),
    ):
        assert next(iter(select_columns(rows, ["caption"]))) == {"caption": value}
    assert server.connections == 0


def test_capfilt_does_not_fetch_what_other_columns_name(server, tmp_path):
    thumbnail = {"bytes": None, "path": f"{server.url}/picture.png"}
    rows = make_rows("pictures of datasets", None).select([0])
    rows = rows.add_column("thumbnail", [thumbnail]).cast_column("thumbnail", datasets.Image())
    capfilt_dataset(rows, None, lambda pictures, captions: [[1.0] * len(texts) for texts in captions], tmp_path)
    result = datasets.load_dataset(str(tmp_path), split="train").cast_column("thumbnail", datasets.Image(decode=False))
    assert result[0]["thumbnail"] == thumbnail
    assert server.connections == 0


# --- other file systems ---


@pytest.mark.parametrize(
    "path, host",
    [
        ("s3://bucket/x.png", "bucket"),
        ("ftp://127.0.0.1:1/x.png", "127.0.0.1"),
        ("webhdfs://me@127.0.0.1:1/x.png", "127.0.0.1"),
        ("zip://a.png::http://127.0.0.1:1/x.zip", "127.0.0.1"),
        ("simplecache::http://127.0.0.1:1/x.png", None),
        ("zip://a.png::simplecache::http://127.0.0.1:1/x.png", None),
        ("reference://a.png::x.json", "a.png"),
        ("unknown://x.png", "x.png"),
    ],
)
def test_a_file_of_another_machine_is_opened_only_if_its_host_is_named(path, host, monkeypatch):
    opened = []
    monkeypatch.setattr("fsspec.open", lambda path, mode: opened.append(path) or io.BytesIO(picture_bytes()))
    record = {"path": path, "bytes": None}
    for allow_urls in (False, True, [], ["example.com"], f"{host}.example.com"):
        with pytest.raises(ImageLoadError, match=rf"row 3 \('{path}'\).*" + (f"'{host}'" if host else "no file")):
            open_image(record, "row 3", allow_urls)
    assert opened == []
    if host is not None and "::x.json" not in path:
        same(open_image(record, "row 3", [host]))
        same(open_image(record, "row 3", host))
        assert opened == [path] * 2


def test_files_of_this_machine_and_of_the_hub_are_opened(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    PICTURE.save(path)
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        archive.write(path, "a.png")
    for name in (
        f"file://{path}",
        f"zip://a.png::{tmp_path}/pictures.zip",
        f"zip://a.png::file://{tmp_path}/pictures.zip",
    ):
        same(open_image({"path": name, "bytes": None}, "row 3"))
    monkeypatch.setattr("fsspec.open", lambda path, mode: io.BytesIO(picture_bytes()))
    same(open_image({"path": "hf://datasets/me/ds/a.png", "bytes": None}, "row 3"))


def test_a_fifo_and_a_device_are_no_pictures(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name in ("file:///dev/zero", f"file://{tmp_path}/fifo", f"zip://a.png::{tmp_path}/fifo", "zip://a::/dev/zero"):
        with pytest.raises(ImageLoadError, match=rf"row 3 \('{name}'\).*a FIFO, a device or a socket"):
            open_image({"path": name, "bytes": None}, "row 3")


def test_a_file_in_an_archive_is_read_no_further_than_a_picture_may_go(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(2**24))
    monkeypatch.setattr(image_fetching, "MAX_BYTES", 2**20)
    path = f"zip://a.png::{tmp_path}/bomb.zip"
    with pytest.raises(ImageLoadError, match=rf"row 3 \('{path}'\): there are more than 1,048,576 bytes"):
        open_image({"path": path, "bytes": None}, "row 3")


@pytest.mark.parametrize("value", [{"path": 1}, {"path": 1, "bytes": None}, {"path": True}, {"bytes": 1}, 1])
def test_a_number_is_no_picture(value):
    with pytest.raises(ImageLoadError, match="row 3 .*(1|True|int)"):
        open_image(value, "row 3")


def test_a_picture_that_is_given_as_it_is_counts_as_typed():
    assert open_image(PICTURE, "row 3").size == PICTURE.size
    assert isinstance(open_image(np.asarray(PICTURE), "row 3"), Image.Image)
