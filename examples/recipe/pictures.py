"""
Make the pictures of the recipe: everyday things, each drawn in several styles, with names and keywords.

    python examples/recipe/pictures.py            # a minute; needs npm, and on Debian apt-get for Open Clip Art

| split | drawings | of which things |
|---|---|---|
| train | Noto, Noto of 2016, Twemoji, OpenMoji, EmojiOne | nine of ten things |
| clip_art | Open Clip Art | objects, animals, food ...; a title each, none the name of a held-out thing |
| validation | one style of train (Twemoji), to choose settings by: such a run learns from the others | the same |
| test_seen | Fluent, a style without training data | the same |
| test_unseen | Fluent | the tenth without training data |

Noto, Twemoji and Fluent are in `../data/emoji`; the rest is downloaded. Licences: Noto Apache-2.0, OpenMoji CC-BY-SA
4.0, EmojiOne 2 CC-BY 4.0, Open Clip Art public domain. `../data/emoji/LICENSES.md` has those of the others.
"""

import argparse
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import datasets
import pyarrow.parquet
from datasets import concatenate_datasets


EXAMPLES = Path(__file__).parents[1]
sys.path += [str(EXAMPLES), str(EXAMPLES / "data")]
from make_emoji import STYLES, as_bitmap, code_of, encode, npm_pack, pictures_by_code  # noqa: E402
from real_assets import cache_folder  # noqa: E402


TEST_STYLE, VALIDATION_STYLE = "fluent", "twemoji"
SPLITS = ("train", "clip_art", "test_seen", "test_unseen")
MORE_STYLES = ("noto-2016", "openmoji", "emojione")
CLIP_ART = ("openclipart-png", "openclipart-svg")
CLIP_ART_FOLDERS = ("animals", "food", "transportation", "tools", "plants", "buildings", "office", "recreation")
CLIP_ART_FOLDERS += ("electronics", "education", "containers", "science", "people/clothing", "people/bodypart")
# Signs and patterns rather than things
NOT_THINGS = ("aiga-symbols", "roadsigns", "symbols", "cards", "chess", "icons", "crosswords", "maps", "silhouette")
DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"
LONGEST_TITLE = 4  # words


def drawings_of_style(style: str, concepts: datasets.Dataset) -> Iterator[dict]:
    """Yield the concepts that exist in a style, with their pictures."""
    package, where = STYLES[style]
    with tempfile.TemporaryDirectory() as folder:
        files = npm_pack(package, folder, where)
    by_code = pictures_by_code(files)
    for row in concepts:
        data = by_code.get(code_of("-".join(f"{ord(letter):x}" for letter in row["emoji"])))
        if data is not None:
            yield {**row, "style": style, "image": {"bytes": encode(as_bitmap(data)), "path": None}}


def clip_art_if_any(forbidden: set[str]) -> list[dict]:
    """Return the pictures of Open Clip Art, or none without its package: only one ablation needs them."""
    if not shutil.which("apt-get"):
        print("No Open Clip Art: it is a package of Debian, and there is no apt-get here.")
        return []
    try:
        return list(clip_art(forbidden))
    except subprocess.CalledProcessError as error:
        print(f"No Open Clip Art: {shlex.join(error.cmd)} failed.\n{error.stderr}")
        return []


def clip_art(forbidden: set[str]) -> Iterator[dict]:
    """Yield the pictures of things in Open Clip Art, the first of each title."""
    with tempfile.TemporaryDirectory() as folder:
        run = partial(subprocess.run, cwd=folder, check=True, stderr=subprocess.PIPE, text=True)
        for package in CLIP_ART:
            run(["apt-get", "download", "-q", package])
        for archive in Path(folder).glob("*.deb"):
            run(["dpkg-deb", "-x", str(archive), folder])
        root = Path(folder) / "usr" / "share" / "openclipart"
        seen = set(forbidden)
        for file in sorted(file for part in CLIP_ART_FOLDERS for file in (root / "svg" / part).rglob("*.svg")):
            picture = (root / "png" / file.relative_to(root / "svg")).with_suffix(".png")
            title, keywords = title_and_keywords(file)
            if title in seen or not picture.exists() or any(word in str(file.parent) for word in NOT_THINGS):
                continue
            try:
                image = encode(picture.read_bytes())
            except (OSError, ValueError):  # some files are cut off
                continue
            seen.add(title)
            yield {
                "image": {"bytes": image, "path": None},
                "name": title,
                "keywords": keywords,
                "emoji": "",
                "category": file.relative_to(root / "svg").parts[0],
                "subcategory": file.parent.name,
                "style": "clip art",
            }


def title_and_keywords(file: Path) -> tuple[str | None, list[str]]:
    """Return a short title in small letters, without numbers, and the keywords. A useless title is `None`."""
    try:
        work = ElementTree.parse(file).getroot().find(".//{*}Work")
    except ElementTree.ParseError:
        return None, []
    if work is None:
        return None, []
    title = re.sub(r"[\W\d_]+", " ", work.findtext(f"{DUBLIN_CORE}title") or "").strip().lower()
    keywords = [(item.text or "").strip().lower() for item in work.iterfind(f"{DUBLIN_CORE}subject//{{*}}li")]
    is_plain = title.isascii() and len(title) > 2 and len(title.split()) <= LONGEST_TITLE
    return title if is_plain else None, [word for word in keywords if word.isascii() and word]


def make_pictures(folder: Path):
    """Write a parquet file for each split."""
    committed = EXAMPLES / "data" / "emoji"
    files = {split: str(committed / f"{split}.parquet") for split in ("train", "test")}
    with tempfile.TemporaryDirectory() as cache:
        emoji = datasets.load_dataset("parquet", data_files=files, cache_dir=cache)
        fluent = emoji["test"]
        names = sorted(set(fluent["name"]))
        unseen = set(random.Random(0).sample(names, len(names) // 10))
        concepts = fluent.remove_columns("image")
        styles = [
            datasets.Dataset.from_list(list(drawings_of_style(style, concepts)), features=fluent.features)
            for style in MORE_STYLES
        ]
        others = [i for i, style in enumerate(emoji["train"]["style"]) if style not in MORE_STYLES]
        drawings = concatenate_datasets([emoji["train"].select(others), *styles])
        is_seen = [name not in unseen for name in drawings["name"]]
        splits = {
            "train": drawings.select([i for i, seen in enumerate(is_seen) if seen]),
            "test_seen": fluent.select([i for i, name in enumerate(fluent["name"]) if name not in unseen]),
            "test_unseen": fluent.select([i for i, name in enumerate(fluent["name"]) if name in unseen]),
        }
        art = clip_art_if_any(forbidden={None, *names})
        columns = {name: [row[name] for row in art] for name in fluent.column_names}
        splits["clip_art"] = datasets.Dataset.from_dict(columns, features=fluent.features)
        work = folder.with_name(folder.name + ".part")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        for split, rows in splits.items():
            write_pictures(rows, work / f"{split}.parquet")
            print(f"{split:12} {len(rows):6} pictures of {len(set(rows['name'])):5} things", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(work, folder)


def load_pictures(folder: Path | None = None) -> dict[str, datasets.Dataset]:
    """Load the splits, and make them first if they do not exist."""
    folder = folder or cache_folder() / "recipe" / "pictures"
    if not folder.exists():
        make_pictures(folder)
    return {split: read_pictures(folder / f"{split}.parquet") for split in SPLITS}


def write_pictures(rows: datasets.Dataset, file: Path):
    # datasets does not read a file without rows, and before version 5 does not write one
    if len(rows) == 0:
        pyarrow.parquet.write_table(rows.features.arrow_schema.empty_table(), file)
    else:
        rows.to_parquet(file)


def read_pictures(file: Path) -> datasets.Dataset:
    if pyarrow.parquet.read_metadata(file).num_rows == 0:
        return datasets.Dataset.from_dict({})
    return datasets.Dataset.from_parquet(str(file), cache_dir=str(file.parents[1] / "arrow"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--output", type=Path, default=cache_folder() / "recipe" / "pictures")
    make_pictures(parser.parse_args().output)


if __name__ == "__main__":
    main()
