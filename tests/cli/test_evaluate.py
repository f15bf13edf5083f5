"""`blip2-hf evaluate` of data of one's own: which pictures count, and which columns are there."""

import json
from pathlib import Path

import pytest
from saved_models import save_captioner
from tiny import make_image

from blip2_hf.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_captioner(tmp_path_factory.mktemp("model"))


@pytest.fixture
def photos(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for seed, text in enumerate(["a red bus", "", " \n"]):
        make_image(seed).save(tmp_path / "photos" / f"{seed}.png")
        (tmp_path / "photos" / f"{seed}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


@pytest.fixture
def run(model):
    def run(task, *arguments):
        main(["evaluate", task, "--model", str(model), "--output", "scores", "--device", "cpu", *arguments])

    return run


def test_an_empty_text_is_no_caption(photos, run, capsys):
    run("caption", "--data", "photos", "--generate", "max_new_tokens=5", "min_new_tokens=0")
    assert json.loads(Path("scores/results.json").read_text())["num_scored"] == {"overall": 1}
    assert "2 of 3 rows have no caption, and are left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "option", "column"),
    [
        ("caption", "--caption-column", "words"),
        ("vqa", "--question-column", "asked"),
        ("vqa", "--image-id-column", "picture"),
        ("caption", "--id-column", "number"),
    ],
)
def test_a_column_that_is_not_there(photos, run, task, option, column):
    row = {"question": "what?", "answer": "a bus", "caption": "a bus", "image": "0.png"}
    (photos / "rows.jsonl").write_text(json.dumps(row))
    expected = f"photos/rows.jsonl has no column '{column}'; its columns are answer, .*Name the right one: {option}"
    with pytest.raises(SystemExit, match=expected):
        run(task, "--data", "photos/rows.jsonl", option, column)
