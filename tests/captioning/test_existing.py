"""Captions that are there already: they stay, are replaced, or added to once; metadata, CSV, several captions."""

import csv
import json

import datasets
import processes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from saved_models import save_captioner
from tiny import make_image, make_model, make_processor

from blip2_hf.captioning import CollectionError, FolderPictures, RowPictures, caption_dataset, caption_images
from blip2_hf.captioning.captions import CaptionWriter, with_affixes
from blip2_hf.cli import main
from blip2_hf.jobs.errors import StateFileError


TOKENS = 4
NAMES = ["0.png", "1.png", "sub/2.png"]


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    return make_model().eval(), make_processor()


@pytest.fixture(scope="module")
def expected(parts) -> dict[str, str]:
    found = caption_images(*parts, [make_image(seed) for seed in range(3)], max_new_tokens=TOKENS)
    return {name: caption.text for name, caption in zip(NAMES, found, strict=True)}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for seed, name in enumerate(NAMES):
        make_image(seed).save(folder / name)
    return folder


@pytest.fixture
def caption(parts, photos):
    def caption(output=None, pictures=photos, **options):
        return caption_dataset(*parts, pictures, output, max_new_tokens=TOKENS, **options)

    return caption


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def cells(path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("existing, joined", [("append", "{mine}, {new}"), ("prepend", "{new}, {mine}")])
def test_a_caption_is_added_to_a_text_once(photos, caption, expected, existing, joined):
    (photos / "0.txt").write_text("my own words\n", encoding="utf-8-sig")
    for _ in range(2):
        caption(existing=existing)
        added = joined.format(mine="my own words", new=expected["0.png"].strip())
        assert (photos / "0.txt").read_text() == added + "\n"
        assert (photos / "1.txt").read_text() == expected["1.png"] + "\n"
    # What is known as added stays as the user changes it, and a picture that is new gets its caption
    (photos / "0.txt").write_text("changed")
    make_image(2).save(photos / "new.png")
    assert caption(existing=existing).captioned == 1
    assert (photos / "0.txt").read_text() == "changed"
    assert (photos / "new.txt").read_text() == expected["sub/2.png"] + "\n"
    # Without the option, new pictures are captioned, and what was added is not forgotten
    make_image(1).save(photos / "newer.png")
    assert caption().captioned == 1
    assert caption(existing=existing).captioned == 1  # to the new text
    assert (photos / "0.txt").read_text() == "changed"
    # Other captions are added by other settings
    caption(existing=existing, prefix="sks")
    assert "sks" in (photos / "0.txt").read_text() and "changed" in (photos / "0.txt").read_text()


def test_sentences_and_tags_are_joined(photos, caption, expected):
    for name, text in {"0.txt": "A dog runs.", "1.txt": "dog, grass", "sub/2.txt": " \n"}.items():
        (photos / name).write_text(text)
    caption(existing="append")
    new = [expected[name].strip() for name in NAMES]
    found = [(photos / name).read_text() for name in ("0.txt", "1.txt", "sub/2.txt")]
    assert found == [f"A dog runs. {new[0]}\n", f"dog, grass, {new[1]}\n", f"{new[2]}\n"]


@pytest.mark.parametrize("existing", ["append", "prepend"])
def test_a_caption_is_a_line_of_its_own_beside_several(photos, caption, expected, existing):
    (photos / "0.txt").write_text("a dog\non grass\n")
    caption(existing=existing)
    new = expected["0.png"].strip()
    texts = ["a dog\non grass", new] if existing == "append" else [new, "a dog\non grass"]
    assert (photos / "0.txt").read_text() == "\n".join(texts) + "\n"


@pytest.mark.parametrize("empty", ["", " \n"])
@pytest.mark.parametrize("name", ["texts", "captions.jsonl", "photos/metadata.csv", "photos/metadata.jsonl"])
def test_an_empty_text_is_no_caption(photos, caption, expected, tmp_path, name, empty):
    output = tmp_path / name
    rows = [{"file_name": name, "caption": empty if name == "1.png" else "mine"} for name in NAMES]
    if output.suffix == "":
        (output / "sub").mkdir(parents=True)
        for row in rows:
            (output / row["file_name"]).with_suffix(".txt").write_text(row["caption"])
    elif output.suffix == ".csv":
        with open(output, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        caption(output)
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        output.write_text(text.replace("file_name", "file") if output.name == "captions.jsonl" else text)
    assert caption(output).captioned == 1
    if output.suffix == "":
        found = [(output / name).with_suffix(".txt").read_text() for name in NAMES]
    else:
        found = [row["caption"] for row in (cells if output.suffix == ".csv" else lines)(output)]
    assert [text.strip() for text in found] == ["mine", expected["1.png"].strip(), "mine"]


def test_a_model_that_writes_nothing(photos, parts, caption, tmp_path, monkeypatch):
    monkeypatch.setattr(CaptionWriter, "_write", lambda self, pixel_values: [([""], None) for _ in pixel_values])
    for output in (None, tmp_path / "captions.jsonl", photos / "metadata.csv"):
        for _ in range(2):
            assert caption(output).captioned == 3
    assert [row["caption"] for row in lines(tmp_path / "captions.jsonl")] == [""] * 3


def test_two_processes_add_each_caption_once(photos, tmp_path):
    model = save_captioner(tmp_path / "model")
    for name in ("0.txt", "1.txt", "sub/2.txt"):
        (photos / name).write_text("mine")
    command = ["caption", str(photos), "--model", str(model), "--existing", "append", "--num-workers", "0"]
    command += ["--max-new-tokens", str(TOKENS)]
    for _ in range(2):
        processes.run(main, command, folder=tmp_path, processes=2)
        texts = [(photos / name).read_text() for name in ("0.txt", "1.txt", "sub/2.txt")]
        assert all(text.startswith("mine, ") and text.count("mine, ") == 1 for text in texts)
        assert [row["before"] for row in lines(photos / "captions.added.jsonl")] == ["mine"] * 3
    assert len(set(texts)) == 3


def test_a_text_of_another_encoding_is_listed(photos, caption):
    (photos / "0.txt").write_bytes("ein Bär".encode("latin-1"))
    assert caption(existing="append").broken == 1
    assert "text is not in UTF-8" in lines(photos / "captions.broken.jsonl")[0]["reason"]
    assert (photos / "0.txt").read_bytes() == b"ein B\xe4r"
    assert caption(existing="overwrite").broken == 0


@pytest.mark.parametrize("existing", ["append", "overwrite"])
@pytest.mark.parametrize("name", ["texts", "captions.jsonl"])
def test_a_run_that_has_changed_nothing_binds_no_later_one(photos, caption, tmp_path, name, existing):
    output = None if name == "texts" else tmp_path / name
    caption(output)
    make_image(1).save(photos / "new.png")
    with pytest.raises(ValueError, match="num_beam'"):
        caption(output, existing=existing, num_beam=2)
    assert caption(output).captioned == 1
    with pytest.raises(CollectionError, match="made otherwise .*prompt"):
        caption(output, prompt="a")
    if output is not None:
        settings = output.with_name(f"{name}.settings.json").read_text()
        with pytest.raises(CollectionError, match="a list of captions was expected"):
            caption(output, existing="append", num_captions=2, num_beams=2)
        assert output.with_name(f"{name}.settings.json").read_text() == settings


def test_a_text_that_is_corrected_while_a_run_is_stopped_stays(photos, caption, monkeypatch):
    for name in ("0.txt", "1.txt", "sub/2.txt"):
        (photos / name).write_text("mine")

    def fail(*_):
        raise OSError("full")

    with monkeypatch.context() as patch:
        patch.setattr("blip2_hf.captioning.sidecars.SidecarFiles.join", fail)
        with pytest.raises(OSError, match="full"):
            caption(existing="overwrite")
    (photos / "0.txt").write_text("corrected")
    caption(existing="overwrite")
    assert (photos / "0.txt").read_text() == "corrected" and (photos / "1.txt").read_text() != "mine"


def test_what_is_overwritten_is_replaced_one_by_one(photos, caption, expected, monkeypatch):
    for name in ("0.txt", "1.txt", "sub/2.txt"):
        (photos / name).write_text("mine")
    seen, write = [], CaptionWriter._write

    def stop(self, pixel_values):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(1)
        return write(self, pixel_values)

    with monkeypatch.context() as patch:
        patch.setattr(CaptionWriter, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            caption(existing="overwrite", batch_size=1)
    assert (photos / "0.txt").read_text() == expected["0.png"] + "\n"
    assert (photos / "sub/2.txt").read_text() == "mine"
    with pytest.raises(CollectionError, match="made otherwise"):
        caption(prompt="a")
    # It goes on, also without being told to overwrite
    assert caption(batch_size=1).captioned == 1
    assert (photos / "sub/2.txt").read_text() == expected["sub/2.png"] + "\n"
    assert caption(existing="skip").captioned == 0
    assert caption(overwrite=True).captioned == 3


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_metadata_of_the_user_are_completed(photos, caption, expected, ending):
    own = [
        {"file_name": "sub/2.png", "stars": "4", "caption": None},
        {"file_name": "gone.png", "stars": "1", "caption": "ein Bär\nthat is gone, really"},
        {"file_name": "0.png", "stars": "5", "caption": "mine"},
    ]
    path = photos / f"metadata.{ending}"
    if ending == "jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in own))  # the last line has no end
    elif ending == "csv":
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, own[0])
            writer.writeheader()
            writer.writerows(own)
    else:
        pq.write_table(pa.Table.from_pylist(own), path)
    read = {"jsonl": lines, "csv": cells, "parquet": lambda path: pq.read_table(path).to_pylist()}[ending]
    caption(path)
    rest = read(path)
    assert [row["file_name"] for row in rest if row["file_name"] != "1.png"] == [row["file_name"] for row in own]
    by_name = {row["file_name"]: row for row in rest}
    assert ending == "parquet" or "Bär" in path.read_text(encoding="utf-8")
    assert by_name["sub/2.png"] == {**own[0], "caption": expected["sub/2.png"]}
    assert by_name["gone.png"] == own[1] and by_name["0.png"] == own[2]
    assert by_name["1.png"]["caption"] == expected["1.png"]
    caption(path, existing="append")
    by_name = {row["file_name"]: row for row in read(path)}
    assert by_name["0.png"]["caption"] == f"mine, {expected['0.png'].strip()}"
    assert by_name["gone.png"] == own[1]
    caption(path, existing="overwrite")
    by_name = {row["file_name"]: row for row in read(path)}
    assert by_name["0.png"] == {**own[2], "caption": expected["0.png"]} and by_name["gone.png"] == own[1]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_datasets_reads_the_folder(photos, caption, expected, tmp_path, monkeypatch, ending):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (photos / "broken.png").write_bytes(b"no picture")
    caption(photos / f"metadata.{ending}")
    (photos / "broken.png").unlink()
    rows = datasets.load_dataset(str(photos), split="train")
    found = {row["image"].tobytes(): row["caption"] for row in rows}
    assert found == {make_image(seed).tobytes(): expected[name] for seed, name in enumerate(NAMES)}


def test_metadata_above_the_pictures_and_elsewhere(photos, caption, tmp_path):
    caption(tmp_path / "metadata.jsonl")
    assert [row["file_name"] for row in lines(tmp_path / "metadata.jsonl")] == [f"photos/{name}" for name in NAMES]
    with pytest.raises(CollectionError, match="metadata.jsonl is there already, and `datasets` reads one"):
        caption(tmp_path / "metadata.csv")
    (photos / "sub" / "metadata.csv").write_text("file_name,caption\n2.png,mine\n")
    for output in (tmp_path, photos):
        with pytest.raises(CollectionError, match="sub/metadata.csv describes some .*Caption .*photos/sub with it"):
            caption(output / "metadata.jsonl")
    assert caption(photos / "sub" / "metadata.csv", photos / "sub").captioned == 0
    (photos / "sub" / "metadata.csv").unlink()
    (tmp_path / "other").mkdir()
    with pytest.raises(CollectionError, match="does not find the pictures of .*photos"):
        caption(tmp_path / "other" / "metadata.jsonl")
    rows = RowPictures(datasets.Dataset.from_dict({"image": [str(photos / "0.png")]}))
    with pytest.raises(CollectionError, match="describes a folder of pictures"):
        caption(photos / "metadata.parquet", rows)
    (photos / "metadata.jsonl").write_text('{"name": "0.png"}\n')
    with pytest.raises(StateFileError, match="file_name was expected.*Mend it"):
        caption(photos / "metadata.jsonl")
    (photos / "metadata.jsonl").write_text('{"file_name": "0.png", "caption": ["a", "b"]}\n')
    with pytest.raises(CollectionError, match=r"\['a', 'b'\], and one text was expected"):
        caption(photos / "metadata.jsonl")


def test_csv(photos, caption, expected, tmp_path):
    (photos / "broken.png").write_bytes(b"no picture")
    caption(tmp_path / "captions.csv", suffix=', "painting"')
    found = cells(tmp_path / "captions.csv")
    assert found == [{"file": name, "caption": f'{text}, "painting"'.strip()} for name, text in expected.items()]
    assert caption(tmp_path / "captions.csv", suffix=', "painting"').captioned == 0
    rows = RowPictures(datasets.Dataset.from_dict({"image": [str(photos / name) for name in NAMES]}))
    for done in (0, 3):
        assert caption(tmp_path / "rows.csv", rows).done_before == done
    assert cells(tmp_path / "rows.csv")[2] == {"row": "2", "caption": expected["sub/2.png"]}
    (tmp_path / "rows.csv").write_text("row;caption\n1;a\n")
    with pytest.raises(StateFileError, match="rows.csv has the columns row;caption, and row was expected"):
        caption(tmp_path / "rows.csv", rows)
    (tmp_path / "rows.csv").write_text("row,caption\n1,a,b\n")
    with pytest.raises(StateFileError, match="line 2 has more cells"):
        caption(tmp_path / "rows.csv", rows)
    (tmp_path / "rows.csv").write_text("caption,row\na\n")
    with pytest.raises(StateFileError, match="line 2 has too few cells"):
        caption(tmp_path / "rows.csv", rows)


def test_a_row_that_is_corrected_while_a_run_is_stopped_stays(photos, caption, monkeypatch):
    path = photos / "metadata.jsonl"
    path.write_text("".join(json.dumps({"file_name": name, "caption": "mine"}) + "\n" for name in NAMES))

    def fail(*_):
        raise OSError("full")

    with monkeypatch.context() as patch:
        patch.setattr("blip2_hf.captioning.table_output.CaptionFile.join", fail)
        with pytest.raises(OSError, match="full"):
            caption(path, existing="append")
    path.write_text(path.read_text().replace("mine", "corrected", 1))
    assert caption(path, existing="append").captioned == 0
    found = [row["caption"] for row in lines(path)]
    assert found[0] == "corrected" and all(text.startswith("mine, ") for text in found[1:])


@pytest.mark.parametrize("existing", ["append", "overwrite"])
def test_a_table_of_other_settings(photos, caption, expected, tmp_path, existing):
    output = tmp_path / "captions.jsonl"
    caption(output, prefix="old")
    make_image(0).save(photos / "0b.png")
    for _ in range(2):
        caption(output, existing=existing)
        found = {row["file"]: row["caption"] for row in lines(output)}
        old = f"old {expected['1.png']}".strip()
        new = {"append": f"{old}, {expected['1.png'].strip()}", "overwrite": expected["1.png"]}[existing]
        assert found["1.png"] == new and found["0b.png"] == expected["0.png"]
    # Rows are told apart by their numbers
    rows = [RowPictures(datasets.Dataset.from_dict({"image": [str(photos / name)]})) for name in NAMES[:2]]
    caption(tmp_path / "rows.jsonl", rows[0])
    if existing == "append":
        with pytest.raises(CollectionError, match="made otherwise.*pictures"):
            caption(tmp_path / "rows.jsonl", rows[1], existing=existing)
    else:
        caption(tmp_path / "rows.jsonl", rows[1], existing=existing)
        assert lines(tmp_path / "rows.jsonl") == [{"row": 0, "caption": expected["1.png"]}]


def test_nothing_is_added_to_what_another_run_has_not_finished(caption, tmp_path, monkeypatch):
    output = tmp_path / "captions.jsonl"

    def fail(*_):
        raise OSError("full")

    with monkeypatch.context() as patch:
        patch.setattr("blip2_hf.captioning.table_output.CaptionFile.join", fail)
        with pytest.raises(OSError, match="full"):
            caption(output, prompt="a")
    with pytest.raises(CollectionError, match="is not finished: a run with other options"):
        caption(output, existing="append")
    caption(output, prompt="a")
    caption(output, existing="append")
    assert len(lines(output)) == 3


def test_several_captions_of_a_picture(photos, parts, caption, tmp_path):
    options = {"num_captions": 2, "num_beams": 3, "prefix": "sks"}
    found = list(caption_images(*parts, [make_image(0), make_image(1)], max_new_tokens=TOKENS, **options))
    assert all(len(set(each.texts)) == 2 and each.text == each.texts[0] for each in found)
    caption(tmp_path / "captions.jsonl", **options)
    caption(tmp_path / "captions.parquet", **options)
    rows = lines(tmp_path / "captions.jsonl")
    assert rows == pq.read_table(tmp_path / "captions.parquet").to_pylist()
    assert [row["caption"] for row in rows[:2]] == [each.texts for each in found]
    assert all(text.startswith("sks ") for row in rows for text in row["caption"])
    caption(**options)
    assert (photos / "0.txt").read_text().split("\n") == [" ".join(text.split()) for text in found[0].texts] + [""]
    with pytest.raises(CollectionError, match="made otherwise .*num_captions: 2 there, None now"):
        caption(tmp_path / "captions.jsonl", num_beams=3, prefix="sks")
    caption(tmp_path / "captions.jsonl", existing="append", num_captions=2, do_sample=True, seed=1)
    assert [len(row["caption"]) for row in lines(tmp_path / "captions.jsonl")] == [4, 4, 4]
    with pytest.raises(CollectionError, match="A cell of CSV has one caption"):
        caption(tmp_path / "captions.csv", **options)
    with pytest.raises(ValueError, match="num_captions=0"):
        next(caption_images(*parts, [make_image(0)], num_captions=0))


def test_a_seed(parts):
    images, options = [make_image(seed) for seed in range(4)], {"do_sample": True, "batch_size": 2}

    def texts(seed):
        torch.rand(1)  # what was drawn before does not matter
        found = caption_images(*parts, images, max_new_tokens=8, seed=seed, **options)
        return [caption.text for caption in found]

    assert texts(3) == texts(3) != texts(4)
    state = torch.get_rng_state()
    texts(3)
    torch.rand(1)
    state_of = torch.Generator()
    state_of.set_state(state)
    torch.rand(1, generator=state_of)
    torch.rand(1, generator=state_of)
    assert torch.equal(torch.get_rng_state(), state_of.get_state())


@pytest.mark.parametrize(
    ("prefix", "suffix", "expected"),
    [
        (None, None, "a cat"),
        ("sks", None, "sks a cat"),
        ("sks, ", None, "sks, a cat"),
        (None, ", oil painting", "a cat, oil painting"),
        ("photo of", "in paris", "photo of a cat in paris"),
    ],
)
def test_prefix_and_suffix(prefix, suffix, expected):
    assert with_affixes("a cat", prefix, suffix) == expected


def test_pictures_that_are_named(photos, parts, expected):
    pictures = FolderPictures(photos, ["sub/2.png", "0.png"])
    caption_dataset(*parts, pictures, max_new_tokens=TOKENS)
    assert sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.txt")) == ["0.txt", "sub/2.txt"]
    caption_dataset(*parts, photos, max_new_tokens=TOKENS, extension=".caption")
    assert (photos / "1.caption").read_text() == expected["1.png"] + "\n"
    (photos / "0.caption").write_text("mine")
    for extension in (".txt", ".caption"):  # the files of each have a state of their own
        caption_dataset(*parts, photos, max_new_tokens=TOKENS, extension=extension, existing="append")
        assert (photos / f"0{extension}").read_text().endswith(f", {expected['0.png'].strip()}\n")
    with pytest.raises(CollectionError, match="--extension .PNG"):
        caption_dataset(*parts, photos, extension=".PNG")
    with pytest.raises(ValueError, match="existing='keep': one of skip, overwrite"):
        caption_dataset(*parts, photos, existing="keep")
