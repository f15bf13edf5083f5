"""
Make scenes of one to three drawings on white, with all true captions, wrong captions, and questions with answers.

    python examples/scenes.py --output scenes --count 4000
    blip2-hf cache-features scenes --vision-model facebook/dinov2-small --size 168 --output features
    blip2-hf pretrain features --stage 1 --vision-model facebook/dinov2-small --image-size 168 \\
        --text-column captions --output stage1

Features come first, because `pretrain` mirrors and crops pictures, after which relations and counts are wrong. The
folder `scenes/questions` has a row for each question. `load_dataset` reads both folders, and finds their splits.

The drawings are those of `data/emoji`. A scene is one thing, two or three of it, or a thing to the left of another or
above it. One in ten pairs of things is in no scene for training.

| split | scenes |
|---|---|
| train | all styles but Fluent and `--hold-out` |
| validation | the style of `--hold-out`; without it, more scenes in the styles of train |
| test_seen | more scenes in the styles of train |
| test_compositions | pairs of things that train does not have, in the styles of train |
| test_style | scenes in Fluent |

Licences: scenes with drawings of OpenMoji (`openmoji`) may be passed on only under CC-BY-SA 4.0, with its name; those
of Twemoji and EmojiOne need their names and a link to CC-BY 4.0. `data/emoji/LICENSES.md` has the names and links.
"""

import argparse
import functools
import io
import random
import re
import shutil
import zlib
from pathlib import Path

import datasets
import pyarrow.parquet
from PIL import Image, ImageChops, ImageFilter, ImageOps


DATA = Path(__file__).parent / "data" / "emoji"
STYLES = ("noto", "noto-2016", "twemoji", "openmoji", "emojione")
VALIDATION_STYLE, TEST_STYLE = "openmoji", "fluent"
SIDE = 192  # of a scene, in pixels
LISTED = (
    "airplane,ant,backpack,banana,bear,bicycle,bomb,bus,butterfly,cactus,camera,candle,carrot,castle,cookie,crab,"
    "crocodile,crown,doughnut,drum,duck,egg,elephant,fish,fox,guitar,hammer,helicopter,honeybee,horse,hot dog,laptop,"
    "lemon,light bulb,mushroom,octopus,owl,palm tree,panda,pencil,penguin,pig,pineapple,pizza,rocket,sailboat,shark,"
    "snake,snowman,soccer ball,spider,strawberry,sunflower,taxi,tiger,tomato,tractor,trumpet,turtle,umbrella,violin,"
    "watermelon,whale"
)
THINGS = tuple(LISTED.split(","))  # which can be told apart in every style
KINDS = ("one", "two", "three", "left", "above")  # of scenes, equally likely
RELATIONS = {"left": ("to the left of", "to the right of"), "above": ("above", "below")}
COUNTS = {"two": "three", "three": "two"}  # and what a wrong caption has in their place
COPY, PAIRED, ALONE = (52, 62), (70, 92), (80, 126)  # sides of drawings, in pixels
GAP = 4  # between drawings, and at the edge
SMALL_SHARE = 8  # train has so many times the scenes of any other split
TEXT = datasets.Value("string")
PICTURE = {"image": datasets.Image(), "image_id": datasets.Value("int64"), "style": TEXT}
QUESTION = {"question": TEXT, "answer": TEXT, "kind": TEXT}
TRUTH = {
    "caption": TEXT,
    "captions": [TEXT],
    "swapped": [TEXT],
    "objects": [TEXT],
    "kind": TEXT,
    "questions": [QUESTION],
}


def plural(name: str) -> str:
    """Return the plural of a thing's name."""
    if name.endswith("man"):
        return f"{name[:-3]}men"
    if name.endswith("y"):
        return f"{name[:-1]}ies"
    if name == "fish":
        return name
    return name + ("es" if name.endswith(("s", "x", "to")) else "s")


def article(name: str) -> str:
    """Return a thing's name after its article: `an ant`."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def make_scenes(
    styles: tuple[str, ...],
    count: int,
    seed: int | str = 0,
    compositions: str = "seen",
    restyle: bool = False,
) -> datasets.Dataset:
    """
    Make scenes, in twins: a pair of things and the same in the other order, two and three of a thing, or one thing and
    another thing.

    Args:
        styles (`tuple[str, ...]`):
            Styles of the drawings, which take turns from twins to twins.
        count (`int`):
            Number of scenes.
        seed (`int` or `str`, *optional*, defaults to 0):
            Seed. The same one gives the same bytes.
        compositions (`str`, *optional*, defaults to `"seen"`):
            `"seen"`, or `"held out"` for pairs of things that no scene with `"seen"` has.
        restyle (`bool`, *optional*, defaults to `False`):
            Whether to change two of three drawings: to grey, outlines, other colours, or few colours with outlines.
            Models then do better in styles that they have not seen.

    Returns:
        `datasets.Dataset`: rows with `image` of 192 x 192 pixels, `image_id`, the number of the scene, `style`,
        `caption`, `captions`, all true ones, that one first, `swapped`, the same with a wrong relation or count (none
        for one thing), `objects`, the thing of each drawing (of a pair the left or upper one first), `kind` (`"one"`,
        `"two"`, `"three"`, `"left"`, `"above"`) and `questions`, those of [`questions_of`].

    Raises:
        ValueError: if a style or `compositions` is unknown.
    """
    if unknown := [style for style in styles if style not in (*STYLES, TEST_STYLE)]:
        raise ValueError(f"There is no style {unknown[0]!r}. Give some of {', '.join((*STYLES, TEST_STYLE))}.")
    if compositions not in ("seen", "held out"):
        raise ValueError(f"compositions={compositions!r}: 'seen' or 'held out' was expected.")
    rows = []
    for number in range(count):
        style = styles[number // 2 % len(styles)]
        rows.append(_scene(number, style, seed, compositions == "held out", restyle))
    return _as_dataset(rows, PICTURE | TRUTH)


def questions_of(scene: dict) -> list[dict[str, str]]:
    """
    Ask about a row of [`make_scenes`]. What is drawn by chance, such as an absent thing, follows from the row.

    Each `dict` has `question`, `answer` and `kind`: `"what"`, `"where"`, `"how many"`, or one of `"thing"`,
    `"relation"` and `"number"`, which are yes/no questions with as many yes as no.
    """
    chance = random.Random(f"{scene['image_id']} {scene['style']} {scene['captions'][0]}")
    kind, objects = scene["kind"], scene["objects"]
    thing = chance.choice(objects)
    absent = chance.choice([name for name in THINGS if name not in objects])
    found = [
        ("thing", f"is there {article(thing)} in the picture?", "yes"),
        ("thing", f"is there {article(absent)} in the picture?", "no"),
    ]
    if kind in RELATIONS:
        # The one that is asked about, the other, and the relation between them
        one, other, relation = chance.choice(_both_ways(kind, *objects))
        found += [
            ("relation", f"is the {one} {relation} the {other}?", "yes"),
            ("relation", f"is the {other} {relation} the {one}?", "no"),
            ("what", f"what is {relation} the {other}?", article(one)),
        ]
        one, other, relation = chance.choice(_both_ways(kind, *objects))
        found.append(("where", f"where is the {one}?", f"{relation} the {other}"))
    else:
        found.append(("what", "what is in the picture?", scene["captions"][0]))
    if kind in COUNTS:
        found.append(("number", f"are there {kind} {plural(thing)}?", "yes"))
        found.append(("number", f"are there {COUNTS[kind]} {plural(thing)}?", "no"))
    # One and none are asked seldom, so that two and three are right often
    if kind not in RELATIONS or chance.random() < 1 / 6:
        found.append(("how many", f"how many {plural(thing)} are there?", kind if kind in COUNTS else "one"))
    if chance.random() < 1 / 6:
        found.append(("how many", f"how many {plural(absent)} are there?", "none"))
    return [{"question": question, "answer": answer, "kind": kind} for kind, question, answer in found]


def objects_in(text: str) -> set[str]:
    """Return the things that a text names, in the singular or plural."""
    return {_names()[name] for name in _any_name().findall(text.lower())}


def object_scores(captions: list[str], scenes: datasets.Dataset) -> dict[str, float]:
    """
    Return `precision`, the share of the things in captions that are in the scenes, and `recall`, the share of the
    things in the scenes that are in the captions. There is a caption for each row of [`make_scenes`].
    """
    named, there = [objects_in(caption) for caption in captions], [set(objects) for objects in scenes["objects"]]
    right = sum(len(a & b) for a, b in zip(named, there, strict=True))
    return {"precision": right / max(1, sum(map(len, named))), "recall": right / max(1, sum(map(len, there)))}


def exact(captions: list[str], scenes: datasets.Dataset) -> float:
    """Return the share of captions that are one of the true captions of their scenes."""
    right = [caption.strip() in true for caption, true in zip(captions, scenes["captions"], strict=True)]
    return sum(right) / max(1, len(right))


def is_held_out(one: str, other: str) -> bool:
    """Tell whether a pair of things, in any order, is left out of the scenes for training."""
    return zlib.crc32("|".join(sorted((one, other))).encode()) % 10 == 0


def _scene(number: int, style: str, seed: int | str, is_new: bool, restyle: bool) -> dict:
    chance = random.Random(f"{seed} {number // 2}")
    kind = chance.choice([*RELATIONS]) if is_new else chance.choice(KINDS)
    things = [name for name in THINGS if (style, name) in _drawings()]
    one, other = chance.sample(things, 2)
    while is_held_out(one, other) != is_new:
        one, other = chance.sample(things, 2)
    if number % 2:
        # The twin of the scene before
        kind = COUNTS.get(kind, kind)
        one, other = (one, other) if kind in COUNTS else (other, one)
    chance = random.Random(f"{seed} {number} places")
    if kind in RELATIONS:
        objects, ways = [one, other], _both_ways(kind, one, other)
        captions = [f"{article(a)} {relation} {article(b)}" for a, b, relation in ways]
        swapped = [f"{article(b)} {relation} {article(a)}" for a, b, relation in ways]
    elif kind in COUNTS:
        objects = [one] * (2 if kind == "two" else 3)
        captions, swapped = [f"{kind} {plural(one)}"], [f"{COUNTS[kind]} {plural(one)}"]
    else:
        objects, captions, swapped = [one], [article(one)], []
    places = _places(kind, chance)
    restyled = random.Random(f"{seed} {number} restyled") if restyle else None
    image = {"bytes": _draw(style, objects, places, chance, restyled), "path": None}
    scene = {"image": image, "image_id": number, "kind": kind, "style": style, "objects": objects}
    scene |= {"caption": captions[0], "captions": captions, "swapped": swapped}
    return scene | {"questions": questions_of(scene)}


def _both_ways(kind: str, one: str, other: str) -> list[tuple[str, str, str]]:
    """Return a pair in both orders, each with the relation that then holds."""
    return [(one, other, RELATIONS[kind][0]), (other, one, RELATIONS[kind][1])]


def _places(kind: str, chance: random.Random) -> list[tuple[int, int, int]]:
    """Return left edge, upper edge and side of each drawing, in pixels."""
    if kind in RELATIONS:
        shared = chance.randint(-24, 24)
        places = []
        for start in (0, SIDE // 2):
            side = chance.randint(*PAIRED)
            along = start + chance.randint(GAP // 2, SIDE // 2 - side - GAP // 2)
            across = SIDE // 2 + shared + chance.randint(-12, 12) - side // 2
            places.append((along, across, side) if kind == "left" else (across, along, side))
        return places
    sides = {"one": [ALONE], "two": [COPY] * 2, "three": [COPY] * 3}[kind]
    while True:
        squares = [chance.randint(*side) for side in sides]
        places = [(*(chance.randint(GAP, SIDE - GAP - side) for _ in "xy"), side) for side in squares]
        if all(_are_apart(a, b) for i, a in enumerate(places) for b in places[:i]):
            return places


def _are_apart(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    return any(a[i] + a[2] + GAP <= b[i] or b[i] + b[2] + GAP <= a[i] for i in (0, 1))


def _draw(
    style: str,
    objects: list[str],
    places: list[tuple[int, int, int]],
    chance: random.Random,
    restyled: random.Random | None,
) -> bytes:
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    for name, (x, y, side) in zip(objects, places, strict=True):
        drawing = _drawings()[style, name].resize((side, side), Image.Resampling.BICUBIC)
        if restyled is not None:
            drawing = _restyle(drawing, restyled)
        is_mirrored = chance.random() < 0.5
        canvas.paste(drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_mirrored else drawing, (x, y))
    file = io.BytesIO()
    canvas.save(file, "PNG", compress_level=3)
    return file.getvalue()


def _restyle(drawing: Image.Image, chance: random.Random) -> Image.Image:
    way = chance.choice(("as it is", "as it is", "grey", "other colours", "outlines", "few colours"))
    if way == "as it is":
        return drawing
    grey = ImageOps.grayscale(drawing)
    edges = grey.filter(ImageFilter.FIND_EDGES).point(lambda value: 255 * (value > 50))
    edges = edges.filter(ImageFilter.MaxFilter(3))
    if way == "other colours":
        hue, *rest = drawing.convert("HSV").split()
        turn = chance.randrange(256)
        restyled = Image.merge("HSV", (hue.point(lambda value: (value + turn) % 256), *rest)).convert("RGB")
    elif way == "outlines":
        restyled = ImageOps.invert(edges).convert("RGB")
    elif way == "few colours":
        restyled = ImageOps.posterize(drawing.filter(ImageFilter.ModeFilter(5)), 3)
        restyled.paste("black", mask=edges)
    else:
        restyled = grey.convert("RGB")
    # What is around the drawing stays white
    white = Image.new("RGB", drawing.size, "white")
    white.paste(restyled, mask=_ink(drawing).filter(ImageFilter.MaxFilter(3)))
    return white


def _ink(drawing: Image.Image) -> Image.Image:
    """Return the mask of what is not white. Faint marks of compression are no ink."""
    difference = ImageChops.difference(drawing, Image.new("RGB", drawing.size, "white"))
    return difference.convert("L").point(lambda value: 255 * (value > 12))


@functools.cache
def _drawings() -> dict[tuple[str, str], Image.Image]:
    """Read the drawings of all things by style and name, without their margins, on squares."""
    found = {}
    for file in ("train.parquet", "test.parquet"):
        columns = ["image", "name", "style"]
        rows = pyarrow.parquet.read_table(DATA / file, columns=columns, filters=[("name", "in", THINGS)])
        for row in rows.to_pylist():
            image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
            image = image.crop(_ink(image).getbbox())
            square = Image.new("RGB", (max(image.size),) * 2, "white")
            square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
            found[row["style"], row["name"]] = square
    return found


@functools.cache
def _names() -> dict[str, str]:
    return {form: name for name in THINGS for form in (name, plural(name))}


@functools.cache
def _any_name() -> re.Pattern:
    return re.compile(rf"\b(?:{'|'.join(_names())})\b")


def question_rows(scenes: datasets.Dataset) -> datasets.Dataset:
    """Return a row for each question: `image`, `image_id`, `style`, `question`, `answer` and the question's `kind`."""
    stored = scenes.with_format("arrow")[:].to_pylist()
    rows = [{name: row[name] for name in PICTURE} | question for row in stored for question in row["questions"]]
    return _as_dataset(rows, PICTURE | QUESTION)


def _as_dataset(rows: list[dict], features: dict) -> datasets.Dataset:
    columns = {name: [row[name] for row in rows] for name in features}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def write_scenes(folder: Path, count: int, seed: int = 0, hold_out: str | None = None):
    """Write all splits, of which train has `count` scenes, and their questions."""
    seen = tuple(style for style in STYLES if style != hold_out)
    few = -(-count // SMALL_SHARE)
    splits = {
        "train": (seen, count, "seen"),
        "validation": (seen if hold_out is None else (hold_out,), few, "seen"),
        "test_seen": (seen, few, "seen"),
        "test_compositions": (seen, few, "held out"),
        "test_style": ((TEST_STYLE,), few, "seen"),
    }
    folders = [folder / "data", folder / "questions" / "data"]
    for place in folders:
        place.mkdir(parents=True, exist_ok=True)
    for split, (styles, size, compositions) in splits.items():
        scenes = make_scenes(styles, size, f"{seed} {split}", compositions)
        for place, rows in zip(folders, (scenes, question_rows(scenes)), strict=True):
            # Not by datasets, which stores a picture once for each of its questions. It knows splits by such names
            file = place / f"{split}-00000-of-00001.parquet"
            pyarrow.parquet.write_table(rows.data.table, file, row_group_size=500)
        print(f"{split:18} {size:6} scenes")
    shutil.copy(DATA / "LICENSES.md", folder / "DRAWINGS.md")


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--output", type=Path, default=Path("scenes"), help="folder to write")
    parser.add_argument("--count", type=int, default=4000, help="scenes to learn from; other splits have an eighth")
    parser.add_argument("--seed", type=int, default=0, help="seed of all scenes")
    parser.add_argument("--hold-out", choices=STYLES, metavar="STYLE", help="style of validation, which train lacks")
    options = parser.parse_args(arguments)
    datasets.disable_progress_bars()
    write_scenes(options.output, options.count, options.seed, options.hold_out)


if __name__ == "__main__":
    main()
