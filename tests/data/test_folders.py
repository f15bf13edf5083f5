"""A folder of pictures as rows: texts beside them, metadata files, splits."""

import json
from pathlib import Path

import datasets
import pytest
from PIL import Image

from blip2_hf.captioning import FolderPictures
from blip2_hf.data import ImageTextPairs, find_id_column, find_splits, hold_out, load_rows


def add_pictures(folder: Path, *names: str):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (number * 20, 0, 0)).save(folder / name)


def write_lines(path: Path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "photos"
    add_pictures(folder, "a.png", "b.JPG", "cats/c.png", "dogs/d.png", ".hidden.png", ".trash/e.png")
    (folder / "f.heic").write_bytes(b"not a picture yet")
    return folder


NAMES = ["a.png", "b.JPG", "cats/c.png", "dogs/d.png", "f.heic"]


def test_pictures_alone(photos):
    rows = load_rows(photos)
    assert rows.column_names == ["image", "file_name"]
    assert rows["file_name"][:] == NAMES == FolderPictures(photos).names
    assert rows.features["image"] == datasets.Image()
    assert rows.select([1])["image"][0].size == (8, 6)
    assert [
        row["file_name"]
        for row in load_rows(photos, streaming=True).cast_column("image", datasets.Image(decode=False))
    ] == NAMES
    assert load_rows(photos, "train[1:3]")["file_name"][:] == ["b.JPG", "cats/c.png"]


def test_texts_beside_the_pictures(photos):
    (photos / "a.txt").write_text("\ufeff a bus\n", encoding="utf-8")
    (photos / "cats" / "c.caption").write_text("eine Katze überquert die Straße", encoding="utf-8")
    (photos / "dogs" / "d.TXT").write_text("a dog")
    (photos / "README.txt").write_text("not beside a picture")
    # What `caption` leaves
    (photos / ".a.lock").touch()
    for name in (".settings.json", "captions.settings.json", ".broken.jsonl", "x.broken.jsonl"):
        (photos / name).write_text("{}")
    add_pictures(photos / ".blip2-index", "z.png")
    rows = load_rows(photos)
    assert rows["file_name"][:] == NAMES
    assert rows["caption"][:] == ["a bus", None, "eine Katze überquert die Straße", "a dog", None]
    assert ImageTextPairs(rows)[0]["text"] == "a bus"


def test_a_text_that_is_not_in_utf_8(photos):
    (photos / "a.txt").write_bytes("Straße".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt is not in UTF-8.*Save the text anew"):
        load_rows(photos)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_metadata(photos, ending):
    rows = [{"file_name": "dogs/d.png", "caption": "a dog"}, {"file_name": "a.png", "caption": "a bus"}]
    rows.append({"file_name": "a.png", "caption": "NA"})
    table = datasets.Dataset.from_list(rows)
    path = photos / f"metadata.{ending}"
    {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[ending](path)
    found = load_rows(photos)
    assert found.column_names == ["image", "file_name", "caption"]
    assert found["file_name"][:] == ["dogs/d.png", "a.png", "a.png", "b.JPG", "cats/c.png", "f.heic"]
    assert found["caption"][:] == ["a dog", "a bus", "NA", None, None, None]
    theirs = datasets.load_dataset(str(photos), split="train")
    if ending != "csv":  # in which `datasets` takes "NA" for nothing
        assert theirs["caption"][:] == found["caption"][:3]
    stored = [rows.cast_column("image", datasets.Image(decode=False))["image"][:] for rows in (theirs, found)]
    assert [row["path"] for row in stored[0]] == [row["path"] for row in stored[1][:3]]


def test_pictures_are_held_out_with_all_their_captions(photos):
    names = ["a.png", "cats/c.png", "dogs/d.png"] * 4
    write_lines(photos / "metadata.jsonl", [{"file_name": name, "caption": str(n)} for n, name in enumerate(names)])
    rows = load_rows(photos)
    assert find_id_column(rows) == "file_name"
    train, held_out = hold_out(rows, 2, find_id_column(rows))
    assert len(set(held_out["file_name"])) == 2 and not set(held_out["file_name"]) & set(train["file_name"])


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"image": ["a.png"], "image_id": [3], "file_name": ["a.png"]}, "image_id"),
        ({"image": ["a.png"], "image_id": [0.5], "file_name": ["a.png"]}, "file_name"),
        ({"image": ["a.png"], "caption": ["a bus"]}, "image"),
        ({"image": [7], "caption": ["a bus"]}, "image"),
        ({"picture": ["a.png"], "image": [None]}, "picture"),
        ({"caption": ["a bus"]}, None),
    ],
)
def test_the_column_that_names_the_picture(columns, expected):
    column = "picture" if "picture" in columns else "image"
    assert find_id_column(datasets.Dataset.from_dict(columns), column) == expected


def test_metadata_in_folders_inside(photos):
    write_lines(
        photos / "cats" / "metadata.jsonl", [{"file_name": "c.png", "text": "a cat", "mask_file_name": "./c.png"}]
    )
    write_lines(photos / "dogs" / "metadata.jsonl", [{"file_name": "d.png", "text": "a dog"}])
    found = load_rows(photos)
    assert dict(zip(found["file_name"], found["text"], strict=True)) == {
        "cats/c.png": "a cat",
        "dogs/d.png": "a dog",
        "a.png": None,
        "b.JPG": None,
        "f.heic": None,
    }
    assert found["mask"][0].size == (8, 6) and found["mask"][1] is None
    assert "caption" not in found.column_names


def test_metadata_of_several_endings(photos):
    (photos / "cats" / "metadata.csv").write_text("file_name,caption,width,title\nc.png,a cat,8,\n")
    write_lines(photos / "metadata.jsonl", [{"file_name": "a.png", "caption": "a bus", "width": 3, "title": "Bus"}])
    rows = load_rows(photos)
    assert rows["caption"][:] == ["a bus", "a cat", None, None, None]
    assert rows["width"][:2] == [3, 8] and rows["title"][:2] == ["Bus", None]
    write_lines(photos / "metadata.jsonl", [{"file_name": "a.png", "caption": "a bus", "width": "wide"}])
    with pytest.raises(
        ValueError, match=r"column 'width' is .*string.* in .*/metadata.jsonl, and .*int64.*metadata.csv"
    ):
        load_rows(photos)


def test_rows_whose_pictures_were_deleted_are_left_out(photos, caplog):
    rows = [{"file_name": name, "caption": name} for name in ("a.png", "gone.png", "b.JPG", "old/gone.png")]
    write_lines(photos / "metadata.jsonl", rows)
    with transformers_warnings(caplog):
        found = load_rows(photos)
    assert found["file_name"][:] == ["a.png", "b.JPG", *NAMES[2:]]
    assert found["caption"][:] == ["a.png", "b.JPG", None, None, None]
    assert "2 of 4 rows are left out, because their pictures are not there, the first 'gone.png'" in caplog.text


def test_metadata_come_before_texts_beside_the_pictures(photos, caplog):
    (photos / "a.txt").write_text("a bus")
    write_lines(photos / "metadata.jsonl", [{"file_name": "a.png", "width": 8}])
    assert load_rows(photos)["caption"][0] == "a bus"
    write_lines(photos / "metadata.jsonl", [{"file_name": "a.png", "caption": "a red bus"}])
    with transformers_warnings(caplog):
        assert load_rows(photos)["caption"][:2] == ["a red bus", None]
    assert "the texts beside the pictures are not read, because the metadata have the column 'caption'" in caplog.text


def transformers_warnings(caplog):
    return caplog.at_level("WARNING", logger="blip2_hf.data.folders")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"metadata.jsonl": '{"file_name": "gone.png"}\n'},
            r"metadata.jsonl names the picture 'gone.png', which is not",
        ),
        ({"metadata.jsonl": '{"file_name": null}\n{"file_name": "a.png"}'}, "names the picture None. Give the path"),
        ({"metadata.jsonl": '{"file_name": "../photos/a.png"}\n'}, "which is not in the folder"),
        ({"metadata.csv": "name,text\na.png,a bus\n"}, r"has no column 'file_name', but \['name', 'text'\]"),
        (
            {"metadata.csv": "file_name\na.png\n", "metadata.jsonl": '{"file_name": "a.png"}'},
            "one of which was expected",
        ),
        ({"metadata.jsonl": '{"file_name": "a.png"'}, r"metadata.jsonl can't be read: .*Is the file complete"),
        ({"metadata.csv": ""}, r"metadata.csv can't be read"),
    ],
)
def test_metadata_that_do_not_fit(photos, files, message):
    for name, text in files.items():
        (photos / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_rows(photos)
    assert "\n" not in str(error.value)


def test_tables_beside_pictures_are_told_of(photos, caplog):
    (photos / "captions.settings.json").write_text("{}")
    with transformers_warnings(caplog):
        assert load_rows(photos).column_names == ["image", "file_name"]
        assert caplog.text == ""
        write_lines(photos / "train.jsonl", [{"image": "a.png", "caption": "a bus"}])
        assert load_rows(photos).column_names == ["image", "file_name"]
    assert "is read as a folder of pictures, without texts. To read train.jsonl, name that file." in caplog.text
    assert load_rows(photos / "train.jsonl")["caption"][:] == ["a bus"]


def test_metadata_without_pictures(tmp_path):
    write_lines(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "caption": "a bus"}])
    with pytest.raises(ValueError, match="names the picture 'a.png', which is not in the folder"):
        load_rows(tmp_path)


def test_folders_that_are_named_like_splits(tmp_path):
    add_pictures(tmp_path, "train/a.png", "train/cats/b.png", "val/c.png", "Test/d.png")
    (tmp_path / "val" / "c.txt").write_text("a cat")
    assert load_rows(tmp_path)["file_name"][:] == ["train/a.png", "train/cats/b.png"]
    for name in ("validation", "val", "valid", "dev"):
        assert load_rows(tmp_path, name)["caption"][:] == load_rows(f"{tmp_path}:{name}")["caption"][:] == ["a cat"]
    assert load_rows(tmp_path, "train[1:]+test")["file_name"][:] == ["train/cats/b.png", "Test/d.png"]
    assert sorted(find_splits(tmp_path)) == ["test", "train", "validation"]
    with pytest.raises(ValueError, match="has the splits test, train, validation, but 'extra' was asked for"):
        load_rows(tmp_path, "extra")
    # One picture elsewhere, and they are no splits
    add_pictures(tmp_path, "other/e.png")
    assert len(load_rows(tmp_path)) == 5 and find_splits(tmp_path) == []
    with pytest.raises(ValueError, match="has no splits, but 'test' was asked for"):
        load_rows(tmp_path, "test")


def test_arguments_that_have_no_use(photos):
    with pytest.raises(ValueError, match="The configuration 'english' .--config. was given, but .*photos has none"):
        load_rows(photos, config="english")
    with pytest.raises(ValueError, match="without a column 'jpg'.*Its columns are"):
        load_rows(photos, image_column="jpg")
    assert len(load_rows(photos, image_column="image")) == 5


def test_folders_without_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").touch()
    (tmp_path / "empty" / "notes.txt").write_text("Buy milk.")
    with pytest.raises(ValueError, match="empty is a folder without pictures and without files of rows") as error:
        load_rows(tmp_path / "empty")
    assert "\n" not in str(error.value)
    (tmp_path / "files").mkdir()
    for split in ("train", "test"):
        add_pictures(tmp_path, f"files-{split}.png")
        table = datasets.Dataset.from_dict({"caption": [split], "image": [f"../files-{split}.png"]})
        table.to_parquet(tmp_path / "files" / f"{split}.parquet")
    assert load_rows(tmp_path / "files", "test")[0] == {"caption": "test", "image": f"{tmp_path}/files-test.png"}
    assert find_splits(tmp_path / "files") == ["train", "test"]
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"files: (Unknown|Bad) split.*val.*train.*test[^?]*$"):
            load_rows(tmp_path / "files", "val", streaming=streaming)
    with pytest.raises(ValueError, match="files: BuilderConfig 'english' not found"):
        load_rows(tmp_path / "files", config="english")


def test_a_dataset_of_the_hub_that_was_fetched_is_no_folder_of_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "fetched"
    add_pictures(folder, "assets/logo.png")
    (folder / "data").mkdir()
    datasets.Dataset.from_dict({"caption": ["a bus"]}).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    assert load_rows(folder)["caption"][:] == ["a bus"]


def test_a_saved_dict(tmp_path):
    rows = datasets.Dataset.from_dict({"caption": ["a bus"]})
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    assert load_rows(tmp_path / "saved", "test")["caption"][:] == ["a bus"]
    assert find_splits(tmp_path / "saved") == ["train", "test"]
    with pytest.raises(ValueError, match="has the splits train, test, but 'val' was asked for"):
        load_rows(tmp_path / "saved", "val")
