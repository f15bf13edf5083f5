"""WebDataset's tar files: pictures of one ending, and of several."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import datasets
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from blip2_hf.captioning import TarPictures
from blip2_hf.data import ImageTextPairs, ImageTextStream, load_rows
from blip2_hf.evaluation.readers import read_caption_rows


FORMATS = {"jpg": "JPEG", "JPG": "JPEG", "png": "PNG", "webp": "WEBP", "seg.png": "PNG"}


def write_shard(path: Path, samples: dict[str, tuple[str, ...]]):
    """Write samples whose pictures have the given endings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, (key, endings) in enumerate(samples.items()):
            files = {}
            for ending in endings:
                files[ending] = io.BytesIO()
                Image.new("RGB", (4 + number, 4)).save(files[ending], format=FORMATS[ending])
            texts = {"txt": f"a {key}".encode(), "json": json.dumps({"caption": f"the {key}"}).encode()}
            for ending, content in ({n: f.getvalue() for n, f in files.items()} | texts).items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("streaming", [False, True], ids=["rows", "stream"])
def test_one_ending_is_the_column(tmp_path, streaming):
    write_shard(tmp_path / "0.tar", {"bus": ("jpg",), "cat": ("jpg",)})
    rows = load_rows(tmp_path / "*.tar", streaming=streaming)
    assert [(row["__key__"], row["jpg"].size, row["txt"]) for row in rows] == [
        ("bus", (4, 4), "a bus"),
        ("cat", (5, 4), "a cat"),
    ]


@pytest.mark.parametrize("streaming", [False, True], ids=["rows", "stream"])
@pytest.mark.parametrize(
    "shards",
    [
        [{"bus": ("jpg",), "cat": ("png",)}],
        [{"bus": ("jpg",)}, {"cat": ("png",)}],
        [{"bus": ("JPG",)}, {"cat": ("jpg",)}],
        [{"bus": ("webp",)}, {"cat": ("jpg",)}],
    ],
    ids=["one_shard", "two_shards", "case", "webp"],
)
def test_pictures_of_several_endings_are_one_column(tmp_path, shards, streaming):
    for number, samples in enumerate(shards):
        write_shard(tmp_path / "shards" / f"{number}.tar", samples)
    for data in (tmp_path / "shards" / "*.tar", tmp_path / "shards"):
        rows = load_rows(data, streaming=streaming)
        assert isinstance(rows.features["image"], datasets.Image)
        assert {row["__key__"]: row["txt"] for row in rows} == {"bus": "a bus", "cat": "a cat"}
    kwargs = {"text_column": "json.caption", "id_column": "__key__"}
    if streaming:
        pairs = ImageTextStream(rows, **kwargs)
    else:
        pairs = ImageTextPairs(rows, **kwargs)
        samples = read_caption_rows(rows, caption_column="txt", id_column="__key__")
        assert [sample.captions for sample in samples] == [["a bus"], ["a cat"]]
    items = list(DataLoader(pickle.loads(pickle.dumps(pairs)), batch_size=None, num_workers=2))
    assert {item["text"] for item in items} == {"the bus", "the cat"}
    assert all("shards" in item["row"] for item in items)
    captioned = TarPictures(sorted((tmp_path / "shards").iterdir()))
    sizes = {captioned.identity(number)["key"]: captioned[number].size for number in range(2)}
    assert {item["text"].removeprefix("the "): item["image"].size for item in items} == sizes


def test_several_pictures_of_a_sample_are_several_columns(tmp_path):
    write_shard(tmp_path / "0.tar", {"bus": ("jpg", "seg.png"), "cat": ("jpg", "seg.png")})
    assert {"jpg", "seg.png"} <= set(load_rows(tmp_path / "0.tar").column_names)


def test_a_shard_that_changed_is_read_anew(tmp_path):
    write_shard(tmp_path / "0.tar", {"bus": ("jpg",), "cat": ("png",)})
    assert load_rows(tmp_path / "0.tar")["__key__"][:] == ["bus", "cat"]
    write_shard(tmp_path / "0.tar", {"dog": ("jpg",), "cat": ("png",), "bus": ("webp",)})
    assert load_rows(tmp_path / "0.tar")["__key__"][:] == ["dog", "cat", "bus"]
