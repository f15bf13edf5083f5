"""Files with rows: their endings, annotations, the places of their pictures, and what is refused."""

import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from blip2_hf.data import ImageTextPairs, ImageTextStream, find_id_column, find_splits, load_rows


ROWS = {"image": ["a.png", "in/b.png"], "caption": ["a bus", "NA"]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    for number, name in enumerate(("a.png", "in/b.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + number, 6)).save(folder / name)
    return folder


def write_ipc(open_writer):
    def write(path: Path):
        table = pa.table(ROWS)
        with open_writer(str(path), table.schema) as writer:
            writer.write_table(table)

    return write


def write_text(text: str):
    return lambda path: path.write_text(text)


def write_gzip(text: str):
    return lambda path: path.write_bytes(gzip.compress(text.encode()))


LINES = "".join(json.dumps({"image": i, "caption": c}) + "\n" for i, c in zip(*ROWS.values(), strict=True))
LIST = json.dumps([json.loads(line) for line in LINES.splitlines()])
CSV = "image,caption\na.png,a bus\nin/b.png,NA\n"
WRITERS = {
    "rows.CSV": write_text(CSV),
    "rows.tsv": write_text(CSV.replace(",", "\t")),
    "rows.JSON": write_text(LIST),
    "lines.json": write_text(LINES),
    "rows.jsonl": write_text(LINES),
    "rows.ndjson": write_text(LINES),
    "rows.csv.gz": write_gzip(CSV),
    "rows.jsonl.GZ": write_gzip(LINES),
    "rows.parquet": lambda path: datasets.Dataset.from_dict(ROWS).to_parquet(path),
    "rows.pq": lambda path: datasets.Dataset.from_dict(ROWS).to_parquet(path),
    "file.arrow": write_ipc(pa.ipc.new_file),
    "stream.arrow": write_ipc(pa.ipc.new_stream),
    "rows[1].csv": write_text(CSV),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["rows", "stream"])
@pytest.mark.parametrize("name", WRITERS)
def test_endings(name, streaming, folder):
    WRITERS[name](folder / name)
    rows = list(load_rows(folder / name, streaming=streaming))
    assert rows == [
        {"image": f"{folder}/a.png", "caption": "a bus"},
        {"image": f"{folder}/in/b.png", "caption": "NA"},
    ]


@pytest.mark.parametrize("column", ["caption", "answers"])
def test_texts_of_which_some_are_lists(column, folder):
    lines = [{"image": "a.png", column: "a bus"}, {"image": "in/b.png", column: ["a cat", "a red cat"]}]
    if column == "answers":
        lines.append({"image": "a.png", column: [{"answer": "a bus"}, {"answer": "bus"}]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = [["a bus"], ["a cat", "a red cat"], ["a bus", "bus"]][: len(lines)]
    rows = load_rows(folder / "rows.jsonl")
    assert ImageTextPairs(rows, text_column=column).references() == expected
    stream = ImageTextStream(load_rows(folder / "rows.jsonl", streaming=True), text_column=column, train=False)
    assert [item["text"] for item in stream] == [texts[0] for texts in expected]


def test_several_files(folder):
    for name in ("file.arrow", "stream.arrow"):
        WRITERS[name](folder / name)
    assert load_rows(folder / "*.arrow")["caption"][:] == ROWS["caption"] * 2
    # Each file names the pictures beside it
    for inner in ("x", "y"):
        (folder / inner).mkdir()
        Image.new("RGB", (2, 2)).save(folder / inner / "a.png")
        (folder / inner / "rows.csv").write_text(f"image,caption\na.png,{inner}\n")
    expected = [{"image": f"{folder}/{inner}/a.png", "caption": inner} for inner in ("x", "y")]
    assert (
        list(load_rows(f"{folder}/?/rows.csv")) == list(load_rows(f"{folder}/?/rows.csv", streaming=True)) == expected
    )
    assert list(load_rows(f"{folder}/**/rows.csv", "train[1:]")) == expected[1:]


def test_files_whose_columns_differ(folder):
    for inner, number in (("x", "3"), ("y", "three")):
        (folder / inner).mkdir()
        (folder / inner / "rows.csv").write_text(f"caption,number\n{inner},{number}\n")
    with pytest.raises(ValueError, match="column 'number' is .*int64.* in .*x/rows.csv, and .*string.*y/rows.csv"):
        load_rows(f"{folder}/?/rows.csv")


def test_paths_start_from_image_root_if_they_are_not_beside(folder, tmp_path):
    (tmp_path / "tables").mkdir()
    table = tmp_path / "tables" / "rows.csv"
    table.write_text(CSV)
    with pytest.raises(ValueError, match=f"'a.png', which is not in {tmp_path}/tables. .*--image-root") as error:
        load_rows(table)
    assert "\n" not in str(error.value)
    for streaming in (False, True):
        rows = load_rows(table, streaming=streaming, image_root=folder)
        assert [row["image"] for row in rows] == [f"{folder}/a.png", f"{folder}/in/b.png"]
    # What is beside the table comes first
    Image.new("RGB", (1, 1)).save(tmp_path / "tables" / "a.png")
    assert load_rows(table, image_root=folder)["image"][:] == [f"{tmp_path}/tables/a.png", f"{folder}/in/b.png"]
    assert ImageTextPairs(load_rows(table, image_root=folder))[1]["image"].size == (9, 6)
    with pytest.raises(ValueError, match="not in .*/tables and not in .*/cache"):
        (tmp_path / "tables" / "a.png").unlink()
        (tmp_path / "cache").mkdir(exist_ok=True)
        load_rows(table, image_root=tmp_path / "cache")
    with pytest.raises(ValueError, match="nosuch: no such folder"):
        load_rows(table, image_root=tmp_path / "nosuch")


@pytest.mark.parametrize("streaming", [False, True], ids=["rows", "stream"])
@pytest.mark.parametrize("column", ["file_name", "file"])
@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.csv", "rows.parquet"])
def test_a_table_that_names_files(name, column, streaming, folder, tmp_path):
    rows = datasets.Dataset.from_dict({column: ROWS["image"], "caption": ROWS["caption"]})
    ending = name.partition(".")[2]
    {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[ending](folder / name)
    expected = [
        {column: file, "caption": caption, "image": f"{folder}/{file}"}
        for file, caption in zip(*ROWS.values(), strict=True)
    ]
    assert list(load_rows(folder / name, streaming=streaming)) == expected
    # In a folder of tables, which are not beside their pictures
    (tmp_path / "tables").mkdir()
    (folder / name).rename(tmp_path / "tables" / f"rows.{ending}")
    assert list(load_rows(tmp_path / "tables", streaming=streaming, image_root=folder)) == expected
    with pytest.raises(
        ValueError, match=f"names the picture 'a.png', which is not in {tmp_path}/tables.*--image-root"
    ):
        load_rows(tmp_path / "tables" / f"rows.{ending}", streaming=streaming)
    given = load_rows(tmp_path / "tables", streaming=streaming, image_root=folder, image_column=column)
    assert next(iter(given)) == {column: f"{folder}/a.png", "caption": "a bus"}


def test_only_relative_paths_change(folder, monkeypatch):
    kept = [
        f"{folder}/a.png",
        "https://example.com/a.png",
        "data:image/png;base64,AAAA",
        "iVBORw0KGgo=" * 200,
        "",
        None,
    ]
    table = folder / "rows.parquet"
    datasets.Dataset.from_dict({"picture": ["in/b.png", *kept], "image": ["a.png"] * 7}).to_parquet(table)
    rows = load_rows(table, image_column="picture")
    assert rows["picture"][:] == [f"{folder}/in/b.png", *kept]
    assert rows["image"][:] == ["a.png"] * 7
    # Paths from the folder in which the command runs, as ever
    monkeypatch.chdir(folder.parent)
    (folder / "from_here.csv").write_text("image\ndata/a.png\n")
    assert load_rows("data/from_here.csv")["image"][:] == ["data/a.png"]


def test_paths_that_datasets_holds(folder):
    table = folder / "rows.parquet"
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = datasets.Dataset.from_dict({"image": [{"path": "a.png", "bytes": None}]}, features=features)
    pq.write_table(rows.cast_column("image", datasets.Image()).data.table, table)
    found = load_rows(table)
    assert found.features["image"] == datasets.Image() and found["image"][0].size == (8, 6)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("half.json", b'[{"a": 1}, {"a"', "can't be read"),
        ("half.jsonl", b'{"a": 1}\n{"a"', "can't be read"),
        ("object.json", b'{"a": 1,\n"b"', "can't be read"),
        ("empty.json", b"", "there are no rows in it"),
        ("list.json", b"[]", "there are no rows in it"),
        ("header.csv", b"image,caption\n", "there are no rows in it"),
        ("empty.csv", b"", "can't be read"),
        ("empty.parquet", b"", "can't be read"),
        ("cut.parquet", b"PAR1abc", "can't be read"),
        ("cut.arrow", b"ARROW1", "can't be read"),
        ("latin.csv", "caption\nStraße\n".encode("latin-1"), "can't be read.*UTF-8"),
        ("latin.jsonl", '{"a": "Straße"}\n'.encode("latin-1"), "can't be read.*UTF-8"),
        ("latin.json", '{"a": "Straße"}\n'.encode("latin-1"), "can't be read.*UTF-8"),
        ("ragged.csv", b"a,b\n1,2\n1,2,3,4\n", "Expected 2 fields in line 3, saw 4. Put texts .* in quotes"),
        ("shifted.csv", b"image,caption\na.png,a, b\n", "saw more in the first row. Put texts .* in quotes"),
        ("shifted.tsv", b"image\tcaption\na.png\ta\tb\tc\n", "saw more in the first row. Put texts .* in quotes"),
        ("no.csv.gz", b"image\n", "can't be read"),
        ("empty.tar", b"", "is not a tar file|can't be read"),
        ("notes.txt", b"Buy milk\n", "a text file is read if it is Flickr8k's captions.txt"),
        ("empty.txt", b"", "a text file is read if it is Flickr8k's captions.txt"),
        ("latin.txt", "image,caption\na.png,Straße\n".encode("latin-1"), "UTF-8"),
    ],
)
def test_broken_files_are_told_in_a_line(name, content, message, folder, capfd):
    (folder / name).write_bytes(content)
    for streaming in (False, True):
        with pytest.raises(ValueError, match=message) as error:
            load_rows(folder / name, streaming=streaming)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert "Failed to" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["rows.xlsx", "a.png", "*.png", "in/*"])
def test_other_endings_are_refused(name, folder):
    (folder / "rows.xlsx").touch()
    with pytest.raises(ValueError, match=r"with one of the endings \.parquet, \.pq, \.json, .*was expected"):
        load_rows(folder / name)


@pytest.mark.parametrize(
    "name",
    ["nosuch.csv", "nosuch.xlsx", "nosuch", "./nosuch", "data/nosuch", "a/b/c", "/nosuch/x", "~/nosuch", "no/*.csv"],
)
def test_what_is_not_there_is_no_dataset_of_the_hub(name, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(datasets, "load_dataset", None)
    for load in (load_rows, find_splits):
        with pytest.raises(FileNotFoundError, match="There is no file|no file is called"):
            load(name)


def test_arguments_that_have_no_use(folder):
    WRITERS["rows.CSV"](folder / "rows.csv")
    for arguments in ({"split": "test"}, {"split": "test", "streaming": True}):
        with pytest.raises(ValueError, match="rows.csv has no splits, but 'test' was asked for"):
            load_rows(folder / "rows.csv", **arguments)
    with pytest.raises(ValueError, match="The configuration 'english' .--config. was given, but .* has none"):
        load_rows(folder / "rows.csv", config="english")
    with pytest.raises(ValueError, match="The split 'test' was given, but the name 'me/ds:train' ends in 'train'"):
        load_rows("me/ds:train", "test")
    with pytest.raises(ValueError, match="The configuration 'a' was given, but the name is 'me/ds:b:train'"):
        load_rows("me/ds:b:train", config="a")


COCO = {
    "info": {"year": 2017},
    "images": [{"id": 9, "file_name": "000000000009.jpg"}, {"id": 25, "file_name": "000000000025.jpg"}],
    "annotations": [
        {"image_id": 25, "id": 1, "caption": "a giraffe"},
        {"image_id": 9, "id": 2, "caption": "some food"},
        {"image_id": 25, "id": 3, "caption": "two giraffes"},
    ],
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("root", ["", "train2017"])
def test_captions_of_coco(indent, root, tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "coco" / "train2017").mkdir(parents=True)
    for entry in COCO["images"]:
        Image.new("RGB", (4, 4)).save(tmp_path / "coco" / "train2017" / entry["file_name"])
    path = tmp_path / "annotations" / "captions_train2017.json"
    path.write_text(json.dumps(COCO, indent=indent))
    expected = [
        {"image": f"{tmp_path}/coco/train2017/000000000009.jpg", "image_id": 9, "caption": ["some food"]},
        {
            "image": f"{tmp_path}/coco/train2017/000000000025.jpg",
            "image_id": 25,
            "caption": ["a giraffe", "two giraffes"],
        },
    ]
    rows = load_rows(path, image_root=tmp_path / "coco" / root)
    assert list(rows) == list(load_rows(path, streaming=True, image_root=tmp_path / "coco")) == expected
    assert ImageTextPairs(rows).references() == [["some food"], ["a giraffe", "two giraffes"]]
    assert find_id_column(rows) == "image_id" and find_splits(path) == []
    # As COCO is laid out
    (tmp_path / "annotations").rename(tmp_path / "coco" / "annotations")
    assert list(load_rows(tmp_path / "coco" / "annotations" / path.name)) == expected
    assert list(load_rows(tmp_path / "coco" / "annotations" / "captions_*.json", "train[1:]")) == expected[1:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [{"id": 9}]}, r"images\[0\] has no 'file_name', but \['id'\]"),
        ({"annotations": [{"image_id": 9, "bbox": []}]}, r"annotations\[0\] has no 'caption'"),
        ({"annotations": [{"image_id": 7, "caption": "x"}]}, "no 'image_id' of its annotations is an 'id'"),
        ({"annotations": 3}, "annotations"),
    ],
)
def test_other_annotations_of_coco(change, message, tmp_path):
    (tmp_path / "instances.json").write_text(json.dumps(COCO | change))
    with pytest.raises(ValueError, match=message):
        load_rows(tmp_path / "instances.json")


def test_questions_without_answers_are_refused(tmp_path):
    questions = {"data_subtype": "val2014", "questions": [{"question_id": 1, "question": "what?", "image_id": 2}]}
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    with pytest.raises(ValueError, match="file of questions.*evaluate vqav2"):
        load_rows(tmp_path / "questions.json")


def test_captions_of_karpathy(folder):
    entries = [("a.png", "restval", 1), ("b.png", "test", 2), ("c.png", "train", 3), ("d.png", "val", 4)]
    images = [
        {"filepath": "in", "filename": name, "split": split, "cocoid": number, "sentences": [{"raw": f"no {number}"}]}
        for name, split, number in entries
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    for name, _, _ in entries:
        Image.new("RGB", (4, 4)).save(folder / "in" / name)
    rows = load_rows(folder / "dataset_coco.json")
    assert rows["image"][:] == [f"{folder}/in/a.png", f"{folder}/in/c.png"]
    assert rows["image_id"][:] == [1, 3] and rows["caption"][:] == [["no 1"], ["no 3"]]
    for split in ("val", "validation"):
        assert load_rows(folder / "dataset_coco.json", split)["image_id"][:] == [4]
        assert load_rows(f"{folder}/dataset_coco.json:{split}")["image_id"][:] == [4]
    with pytest.raises(ValueError, match="has the splits train, test, validation, but 'extra' was asked for"):
        load_rows(folder / "dataset_coco.json", "extra")
    WRITERS["rows.JSON"](folder / "rows.json")
    with pytest.raises(ValueError, match="dataset_coco.json has annotations, and other files beside it are tables"):
        load_rows(folder / "*.json")
    assert next(iter(load_rows(folder / "dataset_coco.json", "test", streaming=True)))["image_id"] == 2
    assert sorted(find_splits(folder / "dataset_coco.json")) == ["test", "train", "validation"]


def test_captions_of_flickr(folder, tmp_path):
    (folder / "captions.txt").write_text(
        'image,caption\na.png,a bus\na.png,"a red, old bus"\nin/b.png,a cat, asleep .\n'
    )
    (folder / "Flickr8k.token.txt").write_text(
        "a.png#0\ta bus\na.png#1\ta red, old bus\nin/b.png#0\ta cat, asleep .\n"
    )
    for name in ("captions.txt", "Flickr8k.token.txt"):
        rows = load_rows(folder / name)
        assert rows["image"][:] == [f"{folder}/a.png", f"{folder}/in/b.png"]
        assert ImageTextPairs(rows, clean_text=False).references()[0] == ["a bus", "a red, old bus"]
        assert rows["caption"][1][0].replace(" ", "") == "acat,asleep."
    # As Flickr8k is unpacked
    (tmp_path / "flickr").mkdir()
    folder.rename(tmp_path / "flickr" / "Images")
    (tmp_path / "flickr" / "Images" / "captions.txt").rename(tmp_path / "flickr" / "captions.txt")
    assert load_rows(tmp_path / "flickr" / "captions.txt")["image"][0] == f"{tmp_path}/flickr/Images/a.png"


def test_annotations_of_lavis(folder):
    captions = [{"image": "in/b.png", "image_id": "coco_9", "caption": "a bus"}]
    (folder / "coco_karpathy_train.json").write_text(json.dumps(captions))
    rows = load_rows(folder / "coco_karpathy_train.json")
    assert list(rows) == [{"image": f"{folder}/in/b.png", "image_id": "coco_9", "caption": "a bus"}]
    questions = [{"image": "a.png", "question_id": 1, "question": "what is it?", "answer": ["bus", "bus", "car"]}]
    (folder / "vqa_train.json").write_text(json.dumps(questions))
    pairs = ImageTextPairs(
        load_rows(folder / "vqa_train.json"),
        text_column="answer",
        prompt="Question: {} Answer:",
        prompt_column="question",
    )
    assert pairs.references() == [["bus", "bus", "car"]]
    assert pairs[0]["prompt"] == "Question: what is it? Answer:"
