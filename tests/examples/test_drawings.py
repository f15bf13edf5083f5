"""examples/data: the drawings in the repository, and the script that makes them."""

from collections import Counter

import datasets
import pytest
from paths import EXAMPLES


DATA = EXAMPLES / "data" / "emoji"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "data")


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    files = {split: str(DATA / f"{split}.parquet") for split in ("train", "test")}
    return datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path_factory.mktemp("cache")))


def test_names_of_one_emoji_in_several_packages_are_one():
    from make_emoji import code_of

    assert code_of("1F436") == code_of("1f436-FE0F") == "1f436"
    assert code_of("1f469-200d-1f373") == code_of("1F469-1F373") != code_of("1f469")


def test_every_style_but_the_test_style_is_for_training(drawings):
    from make_emoji import INCOMPLETE_STYLES, STYLES, TEST_STYLE

    counts = {style: 606 if style in INCOMPLETE_STYLES else 803 for style in STYLES}
    assert Counter(drawings["test"]["style"]) == {TEST_STYLE: counts.pop(TEST_STYLE)}
    assert Counter(drawings["train"]["style"]) == counts


def test_a_thing_has_one_name_and_one_drawing_in_a_style(drawings):
    train = drawings["train"].remove_columns("image")
    assert max(Counter(zip(train["emoji"], train["style"], strict=True)).values()) == 1
    names = dict(zip(drawings["test"]["emoji"], drawings["test"]["name"], strict=True))
    assert all(names[row["emoji"]] == row["name"] for row in train)


def test_drawings_are_readable_and_on_white(drawings):
    from make_emoji import SIZE

    first = {row["style"]: row["image"] for row in drawings["train"].select(range(10))}
    assert {style: image.size for style, image in first.items()} == {
        "noto": (64, 64),
        "twemoji": (64, 64),
        "noto-2016": (64, 64),
        "openmoji": (SIZE, SIZE),
        "emojione": (128, 128),
    }
    assert all(image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255) for image in first.values())


def test_licences_name_every_style_and_version():
    from make_emoji import STYLES

    text = (DATA / "LICENSES.md").read_text(encoding="utf-8")
    for style, (package, _) in STYLES.items():
        name, version = package.rsplit("@", 1)
        assert f"| `{style}` |" in text and f"`{name}` {version} |" in text
