"""Every command reads a folder of pictures in the same way, also after `caption` has written into it."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import pytest
from saved_models import save_captioner, save_stage1
from tiny import make_image

from blip2_hf.cli import main
from blip2_hf.data import ImageTextPairs, load_cached_features, load_rows


NAMES = ["a.png", "b.jpg", "trips/c.PNG", "trips/sea/d.png"]
BROKEN = "e.heic"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_captioner(folder / "captioner")
    save_stage1(folder / "stage1")
    return folder


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    for seed, name in enumerate([*NAMES, ".trash/f.png"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make_image(seed).save(folder / name)
    (folder / BROKEN).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    return folder


def caption(models, *arguments):
    main(
        [
            "caption",
            "photos",
            "--model",
            f"{models}/captioner",
            "--max-new-tokens",
            "5",
            "--num-workers",
            "0",
            *arguments,
        ]
    )


def capfilt(models, *arguments):
    options = ["--filter", f"{models}/stage1", "--output", "filtered", "--num-workers", "0", "--max-new-tokens", "5"]
    main(["capfilt", "photos", *options, *arguments])
    return load_rows("filtered")


def test_a_folder_that_was_captioned(models, photos, capsys):
    assert load_rows("photos")["file_name"][:] == sorted([*NAMES, BROKEN])
    # Without texts, as a captioner proposes them
    found = capfilt(models, "--captioner", f"{models}/captioner", "--num-captions", "2")
    assert found["file_name"][:] == NAMES and all(found["kept_captions"][:])

    caption(models)
    rows = load_rows("photos")
    texts = [(photos / name).with_suffix(".txt").read_text().strip() for name in NAMES]
    assert {
        name: text for name, text in zip(rows["file_name"], rows["caption"], strict=True) if text is not None
    } == dict(zip(NAMES, texts, strict=True))
    (photos / "a.txt").write_text("a red bus", encoding="utf-8")

    main(["index", "photos", "--model", f"{models}/stage1", "--num-workers", "0"])
    capsys.readouterr()
    main(["search", "a dog", "--index", "photos", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert sorted(Path(row["path"]).relative_to(photos).as_posix() for row in found) == NAMES
    broken = json.loads((photos / ".blip2-index" / "broken.json").read_text())
    assert list(broken) == [BROKEN] and "pip install pillow-heif" in json.dumps(broken)

    rows = load_rows("photos")
    assert rows["file_name"][:] == sorted([*NAMES, BROKEN]) and rows["caption"][0] == "a red bus"
    found = capfilt(models, "--num-captions", "0", "--overwrite")
    assert found["file_name"][:] == NAMES and found["caption"][0] == "a red bus"

    features = ["--size", "28", "--dtype", "float32", "--skip-broken", "--output", "features"]
    main(["cache-features", "photos", "--model", f"{models}/stage1", *features])
    assert load_cached_features("features")["file_name"][:] == NAMES
    assert ImageTextPairs(load_cached_features("features"))[0]["text"] == "a red bus"

    evaluate = ["evaluate", "caption", "--data", "photos", "--model", f"{models}/captioner", "--output", "scores"]
    main([*evaluate, "--generate", "max_new_tokens=5", "min_new_tokens=0"])
    assert json.loads(Path("scores/results.json").read_text())["num_scored"] == {"overall": len(NAMES)}
    assert "1 of 5 rows have no caption, and are left out" in capsys.readouterr().err


def test_a_text_whose_ending_is_in_upper_case(models, photos):
    (photos / "a.TXT").write_text("a red bus")
    caption(models)
    assert not (photos / "a.txt").exists() and (photos / "b.txt").exists()
    assert load_rows("photos")["caption"][0] == "a red bus"
    caption(models, "--overwrite")
    assert not (photos / "a.txt").exists() and (photos / "a.TXT").read_text() != "a red bus"


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_captions_in_metadata_are_those_of_datasets(ending, models, photos):
    caption(models, "--output", f"photos/metadata.{ending}")
    rows = load_rows("photos")
    theirs = datasets.load_dataset("photos", split="train")
    assert theirs["caption"][:] == rows["caption"][: len(NAMES)]
    assert rows["file_name"][:] == [*NAMES, BROKEN] and rows["caption"][-1] is None
    stored = [found.cast_column("image", datasets.Image(decode=False))["image"][:] for found in (theirs, rows)]
    assert [row["path"] for row in stored[0]] == [row["path"] for row in stored[1][: len(NAMES)]]


@pytest.mark.parametrize(
    ("command", "option", "message"),
    [
        ("caption", ["--split", "test"], "photos is a folder of pictures"),
        ("caption", ["--image-column", "jpg"], "photos is a folder of pictures"),
        ("cache-features", ["--split", "test"], "photos has no splits, but 'test' was asked for"),
        ("cache-features", ["--config", "english"], "--config. was given, but photos has none"),
        ("cache-features", ["--image-column", "jpg"], "photos is a folder of pictures, without a column 'jpg'"),
        ("capfilt", ["--text-column", "text"], "no column 'text'"),
        ("evaluate", ["--split", "test"], "photos has no splits, but 'test' was asked for"),
    ],
)
def test_options_that_have_no_use_for_a_folder(command, option, message, models, photos):
    arguments = {
        "caption": ["caption", "photos", "--model", f"{models}/captioner"],
        "cache-features": ["cache-features", "photos", "--model", f"{models}/stage1", "--output", "out"],
        "capfilt": ["capfilt", "photos", "--filter", f"{models}/stage1", "--num-captions", "0", "--output", "out"],
        "evaluate": ["evaluate", "caption", "--data", "photos", "--model", f"{models}/captioner", "--output", "out"],
    }
    with pytest.raises(SystemExit, match=message) as error:
        main([*arguments[command], *option])
    assert "\n" not in str(error.value)


def test_evaluation_takes_the_test_split_if_there_is_one(models, photos):
    for split, name in (("train", "a.png"), ("test", "b.jpg"), ("test", "trips/c.PNG")):
        place = photos.parent / "splits" / split / Path(name).name
        place.parent.mkdir(parents=True, exist_ok=True)
        (photos / name).rename(place)
        place.with_suffix(".txt").write_text("a red bus")
    evaluate = ["evaluate", "caption", "--data", "splits", "--model", f"{models}/captioner", "--output", "scores"]
    main([*evaluate, "--generate", "max_new_tokens=5", "min_new_tokens=0"])
    assert json.loads(Path("scores/results.json").read_text())["num_scored"] == {"overall": 2}


def test_tables_name_pictures_that_lie_elsewhere(models, photos):
    (photos.parent / "tables").mkdir()
    table = photos.parent / "tables" / "rows.CSV"
    table.write_text("image,caption\na.png,a red bus\ntrips/c.PNG,a dog\n")
    options = ["--model", f"{models}/stage1", "--size", "28", "--output", "features"]
    with pytest.raises(SystemExit, match="'a.png', which is not in .*/tables. .*--image-root"):
        main(["cache-features", str(table), *options])
    main(["cache-features", str(table), *options, "--image-root", "photos"])
    assert load_cached_features("features")["caption"][:] == ["a red bus", "a dog"]
    evaluate = ["evaluate", "caption", "--data", str(table), "--image-root", "photos", "--output", "scores"]
    evaluate += ["--model", f"{models}/captioner"]
    main([*evaluate, "--generate", "max_new_tokens=5", "min_new_tokens=0"])
    assert json.loads(Path("scores/results.json").read_text())["num_scored"] == {"overall": 2}


@pytest.mark.parametrize("endings", [("jpg", "jpg"), ("jpg", "png")], ids=["one_ending", "two_endings"])
def test_shards(endings, models, photos):
    with tarfile.open("0.tar", "w") as tar:
        for number, ending in enumerate(endings):
            picture = io.BytesIO()
            make_image(number).save(picture, format={"jpg": "JPEG", "png": "PNG"}[ending])
            for name, content in ((ending, picture.getvalue()), ("txt", b"a red bus")):
                info = tarfile.TarInfo(f"{number}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    evaluate = ["evaluate", "caption", "--data", "*.tar", "--caption-column", "txt", "--output", "scores"]
    evaluate += ["--model", f"{models}/captioner"]
    main([*evaluate, "--generate", "max_new_tokens=5", "min_new_tokens=0"])
    assert json.loads(Path("scores/results.json").read_text())["num_scored"] == {"overall": 2}
    features = ["--size", "28", "--output", "features"]
    main(["cache-features", "0.tar", "--model", f"{models}/stage1", *features])
    assert load_cached_features("features")["txt"][:] == ["a red bus"] * 2
