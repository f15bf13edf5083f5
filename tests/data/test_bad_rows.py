"""Rows that can't be learned from are named, counted, reported, and left out only when asked."""

import io
import json
import logging
import os
import pickle
import tarfile

import datasets
import numpy as np
import pytest
import torch
import transformers
from tiny import encode, make_image, make_processor
from torch.utils.data import DataLoader

from blip2_hf.data import (
    BadRow,
    BadRowError,
    ImageTextPairs,
    ImageTextStream,
    LanguageModelCollator,
    RandomResizedCropAndFlip,
    check_pairs,
    hold_out,
    leave_out_bad_rows,
    load_rows,
    report_bad_rows,
)
from blip2_hf.data.bad_rows import RowName
from blip2_hf.models.image_loading import ImageLoadError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pictures in files, of which number 4 is cut off."""
    folder = tmp_path_factory.mktemp("Pictures")
    for i in range(6):
        data = encode(make_image(i))
        (folder / f"{i}.png").write_bytes(data[:60] if i == 4 else data)
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    """Rows 1, 2, 3, 4 and 6 are bad, each in its way."""
    captions = ["a dog", "...", None, "a cat", "a bus", "a red bus", [], "two people"]
    pictures = [0, 1, 2, None, 4, 5, 0, 1]
    return [
        {"image": None if number is None else str(folder / f"{number}.png"), "caption": caption}
        for number, caption in zip(pictures, captions, strict=True)
    ]


KINDS = {
    1: "text empty",
    2: "text missing",
    3: "picture missing",
    4: "picture unreadable",
    6: "text missing",
}


def contents(item):
    return np.asarray(item["image"]).tobytes(), item["text"], item["image_id"], item["row"]


def test_an_item_knows_its_name(rows, folder):
    name = ImageTextPairs(rows)[0]["row"]
    assert name == f"row 0 ({folder}/0.png)"
    assert (name.number, name.file) == (0, f"{folder}/0.png")
    assert ImageTextPairs(rows, source="coco")[5]["row"] == f"row 5 of coco ({folder}/5.png)"
    stored = datasets.Dataset.from_list(rows[:1]).cast_column("image", datasets.Image())
    assert ImageTextPairs(stored)[0]["row"] == f"row 0 ({folder}/0.png)"
    for picture in (make_image(), encode(make_image()), np.zeros((4, 4, 3), np.uint8)):
        assert ImageTextPairs([{"image": picture, "caption": "a"}])[0]["row"] == "row 0"
    again = pickle.loads(pickle.dumps(name))
    assert again == name and type(again) is RowName and (again.number, again.file) == (0, f"{folder}/0.png")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (1, r"^Row 1 \(.*Pictures.*/1\.png\) has '\.\.\.', of which cleaning leaves nothing, in column 'caption'"),
        (2, r"^Row 2 \(.*Pictures.*/2\.png\) has None in column 'caption'; a text, or a list of texts, was expected"),
        (3, "^Row 3 has no picture in column 'image'"),
        (4, r"^row 4 \('.*Pictures.*/4\.png'\): the image is broken or truncated"),
        (6, r"^Row 6 \(.*\) has \[\] in column 'caption'"),
    ],
)
def test_bad_rows_say_what_they_have(row, words, rows):
    for train in (True, False):
        with pytest.raises(BadRowError, match=words) as error:
            ImageTextPairs(rows, train=train)[row]
        assert (error.value.row, error.value.kind) == (row, KINDS[row])
        picture = rows[row]["image"]
        assert error.value.file == picture
        assert isinstance(error.value, ImageLoadError) == KINDS[row].startswith("picture")


@pytest.mark.parametrize(
    ("caption", "kind"),
    [
        ("", "text empty"),
        (" \n", "text empty"),
        (3, "text missing"),
        (b"a", "text missing"),
        (["a dog", ""], "text empty"),
        (["a dog", None], "text missing"),
        ([["a dog"]], "text missing"),
    ],
)
def test_a_text_that_is_none(caption, kind):
    # Whichever of several texts is drawn
    for clean_text in (True, False):
        with pytest.raises(BadRowError, match="Row 0 has") as error:
            ImageTextPairs([{"image": make_image(), "caption": caption}], clean_text=clean_text)[0]
        assert error.value.kind == kind
    assert ImageTextPairs([{"image": make_image(), "caption": "..."}], clean_text=False)[0]["text"] == "..."


@pytest.mark.parametrize("question", [None, "", "(!)"])
def test_a_question_that_is_none(question):
    pairs = ImageTextPairs(
        [{"image": make_image(), "caption": "a", "question": question}], prompt="{}", prompt_column="question"
    )
    with pytest.raises(BadRowError, match="Row 0 has .* in column 'question'") as error:
        pairs[0]
    assert error.value.kind == ("text missing" if question is None else "text empty")


def test_pictures_that_are_none():
    for picture in (None, {"bytes": None, "path": None}):
        with pytest.raises(ImageLoadError, match="Row 0 has no picture"):
            ImageTextPairs([{"image": picture, "caption": "a"}])[0]
    stored = datasets.Dataset.from_list([{"image": make_image(), "caption": "a"}, {"image": None, "caption": "b"}])
    with pytest.raises(BadRowError, match="Row 1 has no picture"):
        ImageTextPairs(stored)[1]


def test_texts_with_half_a_character():
    """A lone surrogate, which JSON can hold and no tokenizer reads, is found before a batch is made."""
    for column in ("caption", "question"):
        row = {"image": make_image(), "caption": "a", "question": "what?"} | {column: "a dog \ud83d"}
        with pytest.raises(BadRowError, match=f"Row 0 has 'a dog .*ud83d' in column '{column}'") as error:
            ImageTextPairs([row], prompt="{}", prompt_column="question")[0]
        assert error.value.kind == "text unreadable" and str(error.value).encode()
    assert ImageTextPairs([{"image": make_image(), "caption": "ein Hund \U0001f415"}])[0]["text"].endswith(
        "\U0001f415"
    )


def held_out_parts(rows, **columns):
    train, held_out = hold_out(rows, 3, seed=1)
    return ImageTextPairs(train, **columns), ImageTextPairs(held_out, train=False, **columns)


def test_rows_of_a_part_have_the_numbers_of_the_whole(tmp_path):
    """After some rows are held out, bad ones are still those of the user's file."""
    captions = ["..." if number in KINDS else "a dog" for number in range(8)]
    file = {"image": [encode(make_image(i)) for i in range(8)], "caption": captions}
    datasets.Dataset.from_dict(file).to_parquet(tmp_path / "rows.parquet")
    whole = load_rows(tmp_path / "rows.parquet")
    parts = held_out_parts(whole)
    numbers = [[pairs.row_number(i) for i in range(len(pairs))] for pairs in parts]
    assert sorted(numbers[0] + numbers[1]) == list(range(8)) and numbers[0] != list(range(5))
    bad = [check_pairs(pairs, show_progress=False) for pairs in parts]
    assert {row.row for part in bad for row in part} == set(KINDS)
    for pairs, part, own in zip(parts, bad, numbers, strict=True):
        assert all(row.reason.startswith(f"Row {row.row} has '...'") for row in part)
        good = pairs.without(part)
        left = [number for number in own if number not in KINDS]
        assert [good.row_number(i) for i in range(len(good))] == left
        assert [good[i]["row"].number for i in range(len(good))] == left
        # What is drawn, and the id, do not depend on which rows are held out
        assert [good[i]["image_id"] for i in range(len(good))] == left
        with pytest.raises(ValueError, match="no row 99"):
            pairs.without([99])
    left_out = next(number for number in range(8) if number not in numbers[0])
    with pytest.raises(ValueError, match=f"no row {left_out}"):
        parts[0].without([left_out])


def test_parts_of_parts_and_their_order(rows):
    whole = datasets.Dataset.from_list([{"caption": str(i), "image": encode(make_image(i))} for i in range(12)])
    train = hold_out(whole, 4)[0]
    for part in (train.shuffle(seed=3), train.filter(lambda row: int(row["caption"]) % 2), hold_out(train, 2)[0]):
        pairs = ImageTextPairs(part)
        assert [str(pairs.row_number(i)) for i in range(len(pairs))] == part["caption"][:]
        assert all(f"row {item['text']}" == item["row"] for item in (pairs[i] for i in range(len(pairs))))
    subset = torch.utils.data.Subset(ImageTextPairs(train), [5, 2])
    assert [item["row"] for item in subset] == [f"row {train[i]['caption']}" for i in (5, 2)]
    stream = ImageTextStream(train.to_iterable_dataset(num_shards=2).shuffle(seed=0))
    assert {item["row"] for item in stream} == {f"row {text}" for text in train["caption"]}
    # Otherwise a stream does not know
    stream = ImageTextStream(whole.to_iterable_dataset().shuffle(seed=0))
    assert {item["row"] for item in stream} == {f"row {i} of the stream" for i in range(12)}


def test_parts_of_several_data_sets_are_numbered_anew():
    """Their own numbers stand twice, and would take two pictures for one."""
    wholes = [
        datasets.Dataset.from_list([{"caption": f"{name} {i}", "image": encode(make_image(i))} for i in range(6)])
        for name in "ab"
    ]
    both = datasets.concatenate_datasets([hold_out(whole, 2)[0] for whole in wholes])
    for rows in (both, hold_out(both, 2)[0]):
        pairs = ImageTextPairs(rows)
        assert len({item["image_id"] for item in (pairs[i] for i in range(len(pairs)))}) == len(pairs)
        assert len(pairs.without([pairs.row_number(1)])) == len(pairs) - 1


def test_the_place_of_a_row_and_its_number():
    whole = datasets.Dataset.from_list([{"caption": str(i), "image": encode(make_image(i))} for i in range(8)])
    part = hold_out(whole, 3)[0]
    pairs = ImageTextPairs(part)
    pairs = pairs.without([pairs.row_number(1)])
    assert [part[pairs.place(i)]["caption"] for i in range(4)] == [str(pairs.row_number(i)) for i in range(4)]
    assert [item["row"] for item in ImageTextStream(part)] == [f"row {text}" for text in part["caption"]]


def test_a_part_keeps_what_it_makes_of_its_rows():
    whole = datasets.Dataset.from_list([{"caption": str(i), "image": encode(make_image(i))} for i in range(6)])
    whole = whole.with_transform(lambda batch: batch | {"caption": [f"made {text}" for text in batch["caption"]]})
    for pairs in held_out_parts(whole):
        assert [pairs[i]["text"] for i in range(3)] == [f"made {pairs.row_number(i)}" for i in range(3)]


def test_pictures_that_cannot_be_fetched(tmp_path, capsys):
    """Whatever file systems and HTTP clients raise names the row, and is left out when asked."""
    (tmp_path / "broken.zip").write_bytes(b"no zip file")
    paths = ["http://a..b/x.png", f"zip://a.png::{tmp_path}/broken.zip", "unknown://x.png", "a\0b.png", "a\ud800.png"]
    records = [*paths[:1], *({"path": path, "bytes": None} for path in paths)]
    rows = [{"image": record, "caption": "a"} for record in [*records, make_image()]]
    pairs = ImageTextPairs(rows)
    for row, path in enumerate([paths[0], *paths]):
        with pytest.raises(ImageLoadError, match=f"row {row} ") as error:
            pairs[row]
        assert error.value.kind == "picture unreadable" and path[-4:] in str(error.value)
    left = leave_out_bad_rows(pairs, path=tmp_path / "bad.jsonl")
    assert [left.row_number(i) for i in range(len(left))] == [len(records)]
    report = capsys.readouterr().out
    # A path that is not UTF-8 can be printed too
    assert "6 picture unreadable" in report and report.encode("utf-8")
    assert [item["image_id"] for item in ImageTextStream(rows, skip_broken=True)] == [len(records)]


def test_a_file_system_without_its_package(monkeypatch):
    def open_without_package(path, mode):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.open", open_without_package)
    rows = [{"image": {"path": "s3://bucket/x.png", "bytes": None}, "caption": "a"}]
    with pytest.raises(ImageLoadError, match=r"row 0 \('s3://bucket/x.png'\).*Install s3fs") as error:
        ImageTextPairs(rows, allow_urls=["bucket"])[0]
    assert error.value.file == "s3://bucket/x.png"


def test_numbers_of_pictures_that_are_none():
    images = [{"image": make_image()}, {"image": b"no picture"}]
    rows = [{"picture": number, "caption": "a"} for number in (0, None, 2, -1, "0", 1)]
    pairs = ImageTextPairs(rows, image_column="picture", images=images)
    assert pairs[0]["image_id"] == 0
    for row in (1, 2, 3, 4):
        with pytest.raises(ImageLoadError, match=f"Row {row} has .* in column 'picture'.*0 to 1") as error:
            pairs[row]
        assert error.value.kind == "picture missing"
    with pytest.raises(BadRowError, match="row 5.*not an image"):
        pairs[5]


def test_what_is_shown_of_a_value_is_short():
    with pytest.raises(BadRowError) as error:
        ImageTextPairs([{"image": make_image(), "caption": b"a" * 10_000}])[0]
    assert len(str(error.value)) < 250


def test_workers_name_the_row(rows):
    errors = {2: (BadRowError, "Row 2 .*in column 'caption'"), 4: (ImageLoadError, "row 4 .*broken")}
    for number, (kind, message) in errors.items():
        loader = DataLoader(ImageTextPairs(rows), batch_size=None, num_workers=1, sampler=[0, number])
        with pytest.raises(kind, match=message) as caught:
            list(loader)
        # It keeps the workers, and as garbage they take five seconds to end
        caught.value.__traceback__ = None
        del caught


def test_a_check_finds_every_bad_row(rows, capsys, monkeypatch):
    # Other tests run without progress bars
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", True)
    bad = check_pairs(ImageTextPairs(rows), show_progress=False)
    assert {row.row: row.kind for row in bad} == KINDS
    assert [row.file for row in bad] == [rows[row.row]["image"] for row in bad]
    assert all(f"ow {row.row} " in row.reason for row in bad)
    assert capsys.readouterr().err == ""
    assert check_pairs(ImageTextPairs(rows)) == bad
    assert "8/8" in capsys.readouterr().err
    assert check_pairs(ImageTextPairs([rows[0], rows[5]]), show_progress=False) == []


def test_a_check_with_a_collator(rows):
    long = [*rows, dict(rows[5], caption=" ".join(["dog"] * 30)), dict(rows[0], caption="a dog")]
    prompted = {"prompt": "a photo of"}
    collator = LanguageModelCollator(make_processor(), max_positions=40)
    bad = check_pairs(ImageTextPairs(long, **prompted), collator, show_progress=False)
    assert {row.row: row.kind for row in bad} == KINDS | {8: "text too long"}
    assert bad[-1].file == rows[5]["image"] and "has 40" in bad[-1].reason
    cut = LanguageModelCollator(make_processor(), max_length=4)
    kinds = {row.row: row.kind for row in check_pairs(ImageTextPairs(long, **prompted), cut, show_progress=False)}
    assert kinds == dict.fromkeys((0, 5, 7, 8, 9), "nothing to learn") | KINDS


def test_errors_of_another_kind_are_not_bad_rows(rows):
    with pytest.raises(ValueError, match="no column 'text'"):
        check_pairs(ImageTextPairs(rows[:1], text_column="text"), show_progress=False)


def test_a_report(rows, tmp_path):
    bad = check_pairs(ImageTextPairs(rows), show_progress=False)
    path = tmp_path / "bad.jsonl"
    path.write_text("of the last run")
    report = report_bad_rows(bad, path)
    first, *others = report.splitlines()
    assert first == "5 bad rows: 2 text missing, 1 text empty, 1 picture missing, 1 picture unreadable."
    assert [line.strip() for line in others] == [row.reason for row in bad]
    assert [BadRow(**json.loads(line)) for line in path.read_text().splitlines()] == bad
    assert list(tmp_path.iterdir()) == [path]
    assert report_bad_rows(bad) == report


def test_a_report_of_many_rows_and_of_none(tmp_path):
    bad = [BadRow(i, None, f"Row {i} is bad", "text empty") for i in range(1200)]
    path = tmp_path / "bad.jsonl"
    lines = report_bad_rows(bad, str(path)).splitlines()
    assert lines[0] == "1,200 bad rows: 1,200 text empty."
    assert len(lines) == 7 and "1,195 more" in lines[-1] and str(path) in lines[-1]
    assert len(path.read_text().splitlines()) == 1200
    assert report_bad_rows([], path) == "No bad rows."
    assert path.read_text() == ""
    assert report_bad_rows(bad[:1]).splitlines() == ["1 bad row: 1 text empty.", "  Row 0 is bad"]


def test_the_rows_that_are_left_stay_what_they_were(rows):
    pairs = ImageTextPairs(rows, transform=RandomResizedCropAndFlip(16))
    pairs.set_epoch(3)
    good = pairs.without(check_pairs(pairs, show_progress=False))
    assert (len(good), len(pairs)) == (3, 8)
    assert [good.row_number(i) for i in range(3)] == [0, 5, 7]
    expected = [contents(pairs[number]) for number in (0, 5, 7)]
    assert [contents(good[i]) for i in range(3)] == expected
    assert contents(good[-1]) == expected[-1]
    assert [contents(item) for item in DataLoader(good, batch_size=None, num_workers=2)] == expected
    with pytest.raises(IndexError, match="no row 3"):
        good[3]
    assert check_pairs(good, show_progress=False) == []


def test_rows_are_left_out_again_and_by_number(rows):
    pairs = ImageTextPairs(rows)
    good = pairs.without([1, 2]).without([2, 3, BadRow(4, None, "", ""), 6])
    assert [good.row_number(i) for i in range(len(good))] == [0, 5, 7]
    assert len(pairs.without([])) == 8
    with pytest.raises(ValueError, match="no row 8: the dataset has 8"):
        pairs.without([8])
    with pytest.raises(ValueError, match="none is left"):
        pairs.without(range(8))


def test_a_copy_has_an_epoch_of_its_own(rows):
    pairs = ImageTextPairs(rows)
    good = pairs.without([1])
    good.set_epoch(2)
    assert (pairs.epoch, good.epoch) == (0, 2)


def test_the_number_is_that_of_the_data_set_in_a_second_check(rows):
    good = ImageTextPairs(rows).without([1, 2])
    assert [row.row for row in check_pairs(good, show_progress=False)] == [3, 4, 6]


def test_a_stream_leaves_out_what_is_bad_when_asked(rows, caplog):
    with caplog.at_level(logging.WARNING):
        items = list(ImageTextStream(rows, skip_broken=True))
    assert [item["image_id"] for item in items] == [0, 5, 7]
    assert [contents(item) for item in items] == [contents(ImageTextPairs(rows)[i]) for i in (0, 5, 7)]
    last = caplog.messages[-1]
    assert "Left out 5 so far (2 text missing, 1 text empty, 1 picture missing, 1 picture unreadable)" in last
    assert "Row 6 " in last
    for row, kind in KINDS.items():
        with pytest.raises(BadRowError) as error:
            list(ImageTextStream(rows[row : row + 1]))
        assert error.value.kind == kind


def test_a_stream_leaves_out_what_no_batch_can_be_made_of(rows, caplog):
    rows = [{**rows[0], "caption": caption} for caption in ("a dog", "a cat sat on a mat " * 9, "a bus")]
    collator = LanguageModelCollator(make_processor(), max_positions=24)
    stream = ImageTextStream(rows, check=collator.check)
    with pytest.raises(BadRowError, match="row 1 .* takes .* positions"):
        list(stream)
    with caplog.at_level(logging.WARNING):
        items = list(ImageTextStream(rows, skip_broken=True, check=collator.check))
    assert [item["image_id"] for item in items] == [0, 2]
    assert "Left out 1 so far (1 text too long)" in caplog.messages[-1]
    assert collator(items)["labels"].shape[0] == 2


def test_a_stream_does_not_leave_out_mistakes(rows):
    with pytest.raises(ValueError, match="no column 'text'"):
        list(ImageTextStream(rows, text_column="text", skip_broken=True))


def test_a_stream_of_bad_rows_ends(rows):
    assert list(ImageTextStream(rows[1:5], skip_broken=True, repeat=True)) == []


def test_a_row_of_webdataset_is_named_by_shard_and_key(tmp_path):
    path = tmp_path / "00000.tar"
    with tarfile.open(path, "w") as tar:
        for i, text in enumerate((b"a dog", b"", b"a cat")):
            picture = encode(make_image(i))
            for name, data in ((f"{i:03d}.png", picture[:60] if i == 2 else picture), (f"{i:03d}.txt", text)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    source = datasets.load_dataset("webdataset", data_files=[str(path)], split="train", streaming=True)
    stream = iter(ImageTextStream(source, image_column="png", text_column="txt"))
    assert next(stream)["row"] == f"row 0 of the stream ({path}::000)"
    with pytest.raises(BadRowError, match="Row 1 .*00000.tar::001.*empty text") as error:
        next(stream)
    assert error.value.file == f"{path}::001"
    stream = ImageTextStream(source.skip(2), image_column="png", text_column="txt")
    with pytest.raises(ImageLoadError, match="00000.tar::002: row 0 .*broken") as error:
        list(stream)
    assert error.value.file == f"{path}::002"


def test_features_with_a_bad_text(tmp_path):
    stored = {"image_embeds": np.zeros((1, 2, 3), np.float32).tobytes(), "image_embeds_shape": [1, 2, 3]}
    stored["image_embeds_dtype"] = "float32"
    dataset = datasets.Dataset.from_list([stored | {"caption": caption} for caption in ("a", None, "!")])
    bad = check_pairs(ImageTextPairs(dataset), show_progress=False)
    assert [(row.row, row.file, row.kind) for row in bad] == [(1, None, "text missing"), (2, None, "text empty")]


def test_nothing_is_left_of_nothing(rows):
    none = ImageTextPairs(datasets.Dataset.from_list(rows[:1]).select([]))
    assert len(none) == len(none.without([])) == 0
    assert check_pairs(none, show_progress=False) == []


def test_processes_that_report_at_the_same_time(tmp_path, monkeypatch):
    path, replace = tmp_path / "bad.jsonl", os.replace
    bad = [BadRow(1, None, "Row 1 is bad", "text empty")]

    def replace_behind_another(*names):
        # Another process comes first
        monkeypatch.setattr(os, "replace", replace)
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: 0)
            report_bad_rows(bad, path)
        replace(*names)

    monkeypatch.setattr(os, "replace", replace_behind_another)
    report_bad_rows(bad, path)
    assert [BadRow(**json.loads(line)) for line in path.read_text().splitlines()] == bad
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_reports(rank, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    path = tmp_path / "bad.jsonl"
    good = leave_out_bad_rows(ImageTextPairs(rows), path=path)
    assert [good.row_number(i) for i in range(len(good))] == [0, 5, 7]
    printed = capsys.readouterr().out
    assert ("5 bad rows" in printed, path.exists()) == ((True, True) if rank == 0 else (False, False))
