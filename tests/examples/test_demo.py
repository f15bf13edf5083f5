"""The demo from its scenes to the commands that it prints, with tiny models."""

import contextlib
import io
import re
import shlex
import sys

import pytest
from PIL import Image
from tiny_examples import tiny_examples

from blip2_hf import Blip2ForConditionalGeneration, Blip2ForPreTraining
from blip2_hf.cli import main


TEST = 8
FEW = shlex.split("--scenes 64 --stage1-steps 2 --matching-steps 1 --stage2-steps 2")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The script, imported by its name."""
    with tiny_examples(tmp_path_factory.mktemp("cache")) as patch:
        import demo

        patch.setattr(demo, "TEST", TEST)
        yield demo


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def printed(demo, output):
    """What the demo prints when it is run for the first time."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        run(demo, output)
    return text.getvalue()


def run(demo, output, *options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["demo.py", "--output", str(output), *FEW, *options])
        demo.main()


def test_models_a_table_and_a_sheet_are_written(printed, output):
    table = (output / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == [
        "stage 1: ITC",
        "stage 1: ITC, re-ranked by ITM",
        "stage 1: captions by the Q-Former (ITG)",
        "stage 2: captions by the language model",
        "nearest neighbour in the frozen tower",
    ]
    assert all(re.search(r"\d%", line) for line in table[2:])
    with Image.open(output / "captions.png") as sheet:
        assert min(sheet.size) > 400
    assert len(list((output / "scenes").iterdir())) == TEST
    captioner = Blip2ForConditionalGeneration.from_pretrained(output / "model")
    retriever = Blip2ForPreTraining.from_pretrained(output / "retriever")
    for model in (captioner, retriever):
        assert model.config.num_query_tokens == 8 and model.vision_model is not None


def test_the_lines_that_come_next_run(printed, output, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [shlex.split(line) for line in printed.splitlines() if line.strip().startswith("blip2-hf ")]
    assert [line[1] for line in lines] == ["caption", "ask", "index", "search", "look"]
    outputs = {}
    for _, *words in lines:
        main(words)
        outputs[words[0]] = capsys.readouterr().out
    scenes = sorted(path.name for path in (output / "scenes").glob("*.png"))
    assert all((output / "scenes" / name).with_suffix(".txt").is_file() for name in scenes)
    found = re.findall(r"\d{3}\.png", outputs["search"])
    assert len(found) == len(set(found)) > 0 and set(found) <= set(scenes)
    with Image.open("look.png") as picture:
        assert min(picture.size) > 100


def test_what_was_trained_with_the_same_settings_is_used_again(demo, printed, output, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(demo, "train", lambda *arguments, **options: trained.append(arguments[5]))
    run(demo, output)
    written = capsys.readouterr()
    assert not trained and "The models of the last run are used" in written.out
    assert written.err.count(" 0 bytes to be written now") == 2  # of the features
    run(demo, output, "--retrain")
    assert trained == [2, 1, 2]
    run(demo, output, "--stage2-steps", "3")
    assert trained == [2, 1, 2, 2, 1, 3]


def test_a_stage_that_is_done_is_not_done_again(demo, tmp_path, monkeypatch):
    trained, losses = [], []
    train, stage2 = demo.train, demo.train_stage2

    def record(model, *options):
        trained.append(options[4])
        if isinstance(model, demo.ChosenLosses):
            losses.append((model.losses, options[5], options[-1] is demo.LearnsFromTwins))
        return train(model, *options)

    monkeypatch.setattr(demo, "train", record)

    def stop(*arguments):
        raise InterruptedError

    monkeypatch.setattr(demo, "train_stage2", stop)
    with pytest.raises(InterruptedError):
        run(demo, tmp_path)
    monkeypatch.setattr(demo, "train_stage2", stage2)
    run(demo, tmp_path)
    assert trained == [2, 1, 2]
    # The losses of each training of stage 1, its batch size, and whether it has twins
    assert losses == [(("itc", "itg"), 64, True), (("itc", "itm", "itg"), 32, True)]


def test_too_few_scenes_for_a_step_are_refused(demo, output, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--scenes", "63"])
    with pytest.raises(SystemExit):
        demo.main()
    assert "--scenes 63: a step of stage 1 takes 64 scenes, so give 64 at least." in capsys.readouterr().err
