"""examples/scenes.py: scenes whose captions, objects and answers are true of the picture."""

import re
from collections import Counter, defaultdict

import datasets
import numpy as np
import pytest
from paths import EXAMPLES
from PIL import Image, ImageFilter
from saved_models import save_captioner, save_stage1

from blip2_hf.cli import main
from blip2_hf.data import load_rows


COUNT = 300
SPLITS = ("train", "validation", "test_seen", "test_compositions", "test_style")
NUMBERS = {"none": 0, "one": 1, "two": 2, "three": 3}


@pytest.fixture(scope="module")
def scenes():
    """The script, imported by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import scenes

        yield scenes


@pytest.fixture(scope="module")
def seen(scenes):
    return scenes.make_scenes((*scenes.STYLES, scenes.TEST_STYLE), COUNT)


@pytest.fixture(scope="module")
def held_out(scenes):
    return scenes.make_scenes(scenes.STYLES, COUNT, compositions="held out")


@pytest.fixture(scope="module")
def written(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    scenes.main(["--output", str(folder), "--count", "64", "--hold-out", scenes.VALIDATION_STYLE])
    return folder


def ink(image: Image.Image) -> np.ndarray:
    """Return where a picture is not white, apart from faint marks."""
    return np.asarray(image.convert("L")) < 243


def square(image: Image.Image) -> np.ndarray:
    """Return the drawing in a picture without its margins, on a square of 32 pixels."""
    rows, columns = (np.flatnonzero(ink(image).any(axis)) for axis in (1, 0))
    image = image.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    canvas = Image.new("RGB", (max(image.size),) * 2, "white")
    canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
    return np.asarray(canvas.resize((32, 32), Image.Resampling.BILINEAR), dtype=np.float32)


def count_parts(marks: np.ndarray) -> int:
    """Count the connected parts of marks that touch, also at corners."""
    rest, count = {*zip(*np.nonzero(marks), strict=True)}, 0
    while rest:
        count, border = count + 1, [rest.pop()]
        while border:
            y, x = border.pop()
            found = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & rest
            rest -= found
            border += found
    return count


def stored(rows: datasets.Dataset) -> list[dict]:
    return rows.with_format("arrow")[:].to_pylist()


def test_a_seed_gives_the_same_bytes(scenes, seen):
    styles = (*scenes.STYLES, scenes.TEST_STYLE)
    first = stored(seen)[:40]
    assert stored(scenes.make_scenes(styles, 40)) == first
    assert stored(scenes.make_scenes(styles, 40, seed=1)) != first
    assert Counter(seen["style"]) == dict.fromkeys(styles, COUNT // 6)


def test_scenes_come_in_twins(seen, held_out):
    for rows in (seen, held_out):
        rows = rows.remove_columns("image")
        for first, second in zip(rows.select(range(0, COUNT, 2)), rows.select(range(1, COUNT, 2)), strict=True):
            assert first["style"] == second["style"]
            if first["kind"] == "one":
                assert second["kind"] == "one" and first["objects"] != second["objects"]
            else:
                assert sorted(first["swapped"]) == sorted(second["captions"])


def test_restyled_drawings_stay_where_they_are(scenes, seen):
    styles = (*scenes.STYLES, scenes.TEST_STYLE)
    restyled = scenes.make_scenes(styles, COUNT, restyle=True)
    assert stored(restyled.remove_columns("image")) == stored(seen.remove_columns("image"))
    changed = 0
    for before, after in zip(seen["image"], restyled["image"], strict=True):
        around = np.asarray(before.convert("L").filter(ImageFilter.MinFilter(5))) < 255
        assert not (ink(after) & ~around).any()
        assert ink(after).any()
        changed += before != after
    # One drawing of three stays as it is
    assert 0.6 < changed / COUNT < 1


def test_styles_and_compositions_that_do_not_exist_are_refused(scenes):
    with pytest.raises(ValueError, match="There is no style 'noto-2017'. Give some of noto, noto-2016, twemoji"):
        scenes.make_scenes(("noto", "noto-2017"), 1)
    with pytest.raises(ValueError, match="compositions='held-out': 'seen' or 'held out' was expected"):
        scenes.make_scenes(scenes.STYLES, 1, compositions="held-out")


def test_a_thing_that_a_style_lacks_is_not_drawn_in_it(scenes, monkeypatch):
    few = {key: drawing for key, drawing in scenes._drawings().items() if key[1] in ("ant", "owl", "fox")}
    del few["noto", "fox"]
    monkeypatch.setattr(scenes, "_drawings", lambda: few)
    found = defaultdict(set)
    for row in scenes.make_scenes(("noto", "twemoji"), 60).remove_columns("image"):
        found[row["style"]].update(row["objects"])
    assert found == {"noto": {"ant", "owl"}, "twemoji": {"ant", "owl", "fox"}}


@pytest.mark.parametrize("part", ["seen", "held_out"])
def test_pairs_are_where_the_caption_says(scenes, part, request):
    """Each half of the picture is compared with all drawings of its style."""
    drawings = {key: square(image) for key, image in scenes._drawings().items()}
    kinds = set()
    for row in request.getfixturevalue(part):
        if row["kind"] not in scenes.RELATIONS:
            continue
        kinds.add(row["kind"])
        half, side = scenes.SIDE // 2, scenes.SIDE
        is_left = row["kind"] == "left"
        boxes = [(0, 0, half, side), (half, 0, side, side)] if is_left else [(0, 0, side, half), (0, half, side, side)]
        found = []
        for drawing in (square(row["image"].crop(box)) for box in boxes):
            names = [name for style, name in drawings if style == row["style"]]
            distances = {
                name: min(np.abs(drawings[row["style"], name] - it).mean() for it in (drawing, drawing[:, ::-1]))
                for name in names
            }
            found.append(min(distances, key=distances.get))
        assert found == row["objects"]
        first, second = (scenes.article(name) for name in found)
        way = {"left": ("to the left of", "to the right of"), "above": ("above", "below")}[row["kind"]]
        assert row["captions"] == [f"{first} {way[0]} {second}", f"{second} {way[1]} {first}"]
        assert row["swapped"] == [f"{second} {way[0]} {first}", f"{first} {way[1]} {second}"]
    assert kinds == {"left", "above"}


def test_relations_are_unambiguous(seen):
    """The centres lie further apart along the relation than across it."""
    for row in seen:
        marks = ink(row["image"])
        if row["kind"] == "above":
            marks = marks.T
        elif row["kind"] != "left":
            continue
        halves = np.split(marks, 2, axis=1)
        centres = [[np.flatnonzero(half.any(axis))[[0, -1]].mean() for axis in (0, 1)] for half in halves]
        (along, across), (other_along, other_across) = centres
        assert other_along + marks.shape[1] / 2 - along > 1.5 * abs(other_across - across)


def test_there_are_as_many_drawings_as_the_caption_says(scenes, seen):
    counted = Counter()
    for row in seen:
        name, number = row["objects"][0], NUMBERS.get(row["kind"])
        if number is None or counted[number] == 12:
            continue
        drawing = scenes._drawings()[row["style"], name]
        if any(count_parts(ink(drawing.resize((side, side)))) > 1 for side in (*scenes.COPY, *scenes.ALONE)):
            continue  # a drawing of several parts can't be counted so
        counted[number] += 1
        assert count_parts(ink(row["image"])) == number and row["objects"] == [name] * number
        one, two, three = scenes.article(name), f"two {scenes.plural(name)}", f"three {scenes.plural(name)}"
        assert (row["captions"], row["swapped"]) == [([one], []), ([two], [three]), ([three], [two])][number - 1]
    assert counted == {1: 12, 2: 12, 3: 12}


def test_nothing_is_cut_off_by_the_edge(seen):
    for image in seen["image"]:
        marks = ink(image)
        assert not (marks[[0, -1]].any() or marks[:, [0, -1]].any())


def test_held_out_pairs_are_in_no_seen_scene(scenes, seen, held_out):
    pairs = [{frozenset(row) for row in part["objects"] if len({*row}) == 2} for part in (seen, held_out)]
    assert pairs[0] and pairs[1] and not pairs[0] & pairs[1]
    assert {*held_out["kind"]} == {"left", "above"}
    everything = [frozenset((a, b)) for i, a in enumerate(scenes.THINGS) for b in scenes.THINGS[:i]]
    assert 0.07 < sum(scenes.is_held_out(*pair) for pair in everything) / len(everything) < 0.13
    assert all(scenes.is_held_out(*pair) == scenes.is_held_out(*sorted(pair, reverse=True)) for pair in everything)


def test_questions_follow_from_the_row(scenes, seen):
    for row in seen.remove_columns("image").select(range(50)):
        assert scenes.questions_of(row) == row["questions"]


def claim(scenes, kind: str, question: str, answer: str) -> str:
    """Turn a question about a relation, and its answer, into the caption that a yes claims."""
    way = "(to the left of|to the right of|above|below)"
    if kind == "relation":
        one, relation, other = re.fullmatch(rf"is the (.+) {way} the (.+)\?", question).groups()
    elif kind == "what":
        relation, other = re.fullmatch(rf"what is {way} the (.+)\?", question).groups()
        return f"{answer} {relation} {scenes.article(other)}"
    else:
        (one,) = re.fullmatch(r"where is the (.+)\?", question).groups()
        relation, other = re.fullmatch(rf"{way} the (.+)", answer).groups()
    return f"{scenes.article(one)} {relation} {scenes.article(other)}"


def test_answers_about_relations_are_true(scenes, seen):
    asked = Counter()
    for row in seen.remove_columns("image").filter(lambda row: row["kind"] in ("left", "above")):
        for question in row["questions"]:
            if (kind := question["kind"]) in ("relation", "what", "where"):
                asked[kind] += 1
                is_no = question["answer"] == "no"
                assert claim(scenes, **question) in row["swapped" if is_no else "captions"]
    assert asked["what"] == asked["where"] == asked["relation"] / 2 > 100


def test_answers_about_things_and_numbers_are_true(scenes, seen):
    names = {form: name for name in scenes.THINGS for form in (scenes.article(name), scenes.plural(name))}
    patterns = {
        "thing": r"is there (?P<thing>.+) in the picture\?",
        "number": r"are there (?P<number>two|three) (?P<thing>.+)\?",
        "how many": r"how many (?P<thing>.+) are there\?",
    }
    answers = set()
    for row in seen.remove_columns("image"):
        for question in row["questions"]:
            kind, answer = question["kind"], question["answer"]
            if kind not in patterns:
                continue
            found = re.fullmatch(patterns[kind], question["question"]).groupdict()
            there = row["objects"].count(names[found["thing"]])
            if kind == "how many":
                assert NUMBERS[answer] == there
            else:
                assert (answer == "yes") == (there == NUMBERS[found["number"]] if kind == "number" else there > 0)
            answers.add((kind, answer))
    assert answers == {(kind, answer) for kind in ("thing", "number") for answer in ("yes", "no")} | {
        ("how many", number) for number in NUMBERS
    }


def test_what_is_in_a_picture_of_one_kind_of_thing_is_its_caption(seen):
    rows = [row for row in seen.remove_columns("image") if row["kind"] in NUMBERS]
    assert len(rows) > 100
    for row in rows:
        what = [question for question in row["questions"] if question["kind"] == "what"]
        assert what == [{"kind": "what", "question": "what is in the picture?", "answer": row["captions"][0]}]


def test_neither_yes_nor_no_is_right_more_often(seen):
    answers, words = Counter(), defaultdict(Counter)
    for question in (question for row in seen["questions"] for question in row):
        if question["answer"] in ("yes", "no"):
            answers[question["kind"], question["answer"]] += 1
            words[re.sub(r"(above|below|left|right|two|three)|.", r"\1", question["question"])][
                question["answer"]
            ] += 1
    assert all(answers[kind, "yes"] == answers[kind, "no"] > 50 for kind in ("thing", "relation", "number"))
    # Nor does the question tell
    assert words.keys() == {"", "above", "below", "left", "right", "two", "three"}
    assert all(0.35 < found["yes"] / found.total() < 0.65 for found in words.values())


@pytest.mark.parametrize(
    ("text", "things"),
    [
        ("an elephant", {"elephant"}),
        ("an ant to the left of a carrot", {"ant", "carrot"}),
        ("Three hot dogs", {"hot dog"}),
        ("a palm tree above two snowmen", {"palm tree", "snowman"}),
        ("a light bulb, a soccer ball and strawberries.", {"light bulb", "soccer ball", "strawberry"}),
        ("two fish below the buses", {"fish", "bus"}),
        ("a giant eggplant, a pigeon, a dog, a tree", set()),
        ("", set()),
    ],
)
def test_things_that_a_text_names(scenes, text, things):
    assert scenes.objects_in(text) == things


def test_all_captions_name_their_objects(scenes, seen):
    for objects, captions, swapped in zip(seen["objects"], seen["captions"], seen["swapped"], strict=True):
        assert all(scenes.objects_in(text) == {*objects} for text in captions + swapped)
    plurals = [
        scenes.plural(name) for name in ("butterfly", "cactus", "fox", "tomato", "snowman", "fish", "palm tree")
    ]
    assert plurals == ["butterflies", "cactuses", "foxes", "tomatoes", "snowmen", "fish", "palm trees"]


def test_scores(scenes, seen):
    true = [captions[-1] for captions in seen["captions"]]
    assert scenes.exact(true, seen) == 1
    assert scenes.object_scores(true, seen) == {"precision": 1, "recall": 1}
    # Scenes of one thing have no wrong caption
    wrong = [swapped[0] if swapped else "a dragon\n" for swapped in seen["swapped"]]
    assert scenes.exact(wrong, seen) == 0
    assert scenes.exact([f"{caption}\n" for caption in true[:1]] + wrong[1:], seen) == pytest.approx(1 / COUNT)
    scores = scenes.object_scores(wrong, seen)
    assert scores["precision"] == 1 and 0.5 < scores["recall"] < 1
    pair = {"objects": [["ant", "owl"], ["fox"]]}
    scores = scenes.object_scores(["an ant above two pigs", "a fox"], pair)
    assert scores == {"precision": pytest.approx(2 / 3), "recall": pytest.approx(2 / 3)}
    assert scenes.object_scores(["", ""], pair) == {"precision": 0, "recall": 0}


def test_the_folder_is_a_dataset(scenes, written):
    found = {split: datasets.load_dataset(str(written), split=split) for split in SPLITS}
    assert {split: len(rows) for split, rows in found.items()} == {"train": 64, **dict.fromkeys(SPLITS[1:], 8)}
    trained = {*scenes.STYLES} - {scenes.VALIDATION_STYLE}
    assert {*found["train"]["style"]} == {*found["test_seen"]["style"]} == trained
    assert {*found["test_compositions"]["style"]} == trained
    assert {*found["validation"]["style"]} == {scenes.VALIDATION_STYLE}
    assert {*found["test_style"]["style"]} == {scenes.TEST_STYLE}
    assert all(scenes.is_held_out(*objects) for objects in found["test_compositions"]["objects"])
    pictures = [row["image"]["bytes"] for split in SPLITS for row in stored(found[split])]
    assert len(pictures) == len({*pictures}) == 64 + 4 * 8


def test_questions_have_the_picture_and_a_row_each(written):
    rows, scenes = load_rows(f"{written}/questions:test_seen"), load_rows(f"{written}:test_seen")
    assert [(row["image_id"], row["question"], row["answer"], row["kind"]) for row in rows] == [
        (row["image_id"], *question.values()) for row in scenes for question in row["questions"]
    ]
    pictures = {row["image_id"]: row["image"] for row in stored(scenes)}
    assert all(row["image"] == pictures[row["image_id"]] for row in stored(rows))
    # The file has a picture once, however many questions are asked about it
    name = "data/test_seen-00000-of-00001.parquet"
    assert (written / "questions" / name).stat().st_size < 1.5 * (written / name).stat().st_size


def test_a_folder_that_is_written_anew_is_read_anew(scenes, tmp_path):
    for count in (8, 16):
        scenes.write_scenes(tmp_path, count)
        assert len(load_rows(tmp_path)) == count and len(load_rows(f"{tmp_path}:test_style")) == count / 8
        questions = load_rows(tmp_path / "questions")
        assert len({*questions["image_id"]}) == count


def test_commands_read_the_folder(written, tmp_path):
    stage1, captioner = str(save_stage1(tmp_path / "stage1")), str(save_captioner(tmp_path / "captioner"))
    learn = ["--max-steps", "1", "--batch-size", "4", "--held-out", "0", "--device", "cpu"]
    score = [
        "--data",
        f"{written}/questions",
        "--split",
        "test_seen",
        "--limit",
        "4",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    score += ["--model", captioner, "--generate", "max_new_tokens=2", "num_beams=1", "min_new_tokens=1"]
    commands = {
        "pretrain": [str(written), "--stage", "1", "--model", stage1, "--text-column", "captions", *learn],
        "finetune": [f"{written}/questions", "--task", "vqa", "--model", captioner, *learn],
        "evaluate": ["vqa", "--group-column", "kind", *score],
    }
    for command, options in commands.items():
        main([command, *options, "--output", str(tmp_path / command)])
    assert (tmp_path / "pretrain" / "model.safetensors").exists()
    assert (tmp_path / "finetune" / "adapter_model.safetensors").exists()
    table = (tmp_path / "evaluate" / "table.md").read_text(encoding="utf-8")
    assert "thing" in table
