"""Make the dataset of the examples: emoji in three openly licensed styles, with their Unicode names.

    python examples/data/make_emoji.py            # needs npm, to download; writes ./emoji/

Each concept (a thing: animal, food, object, place ...) is drawn in each style, so there is a natural held-out set:
train on two styles, test on the third. Sources and licences are in emoji/LICENSES.md. With the same versions of
Pillow, pyarrow and datasets, the same input gives the same bytes.
"""

import argparse
import io
import json
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage


NAMES = "cldr-annotations-full@48.2.0"
# style: (npm package, folder of its pictures); the sets of Apple and Facebook are not free to use
STYLES = {
    "noto": ("emoji-datasource-google@16.0.0", "img/google/64"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "img/twitter/64"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "assets"),
}
SPLITS = {"noto": "train", "twemoji": "train", "fluent": "test"}
CATEGORIES = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
NOT_THINGS = ("sound", "lock", "place-map")  # signs, and things that differ only by a small sign
SIZE = 160  # larger pictures are scaled down to this


def npm_pack(package, folder, *wanted):
    """Download an npm package, and return `{path: bytes}` of the files under the `wanted` paths."""
    if not shutil.which("npm"):
        sys.exit("The drawings are downloaded by npm, which was not found. Install Node.js, which includes npm.")
    print(f"downloading {package} ...", flush=True)
    command = ["npm", "pack", "--silent", "--pack-destination", str(folder), package]
    packed = subprocess.run(command, capture_output=True, text=True)
    if packed.returncode:
        sys.exit(f"{shlex.join(command)} failed.\n{packed.stdout}{packed.stderr}")
    name = packed.stdout.split()[-1]
    with tarfile.open(Path(folder) / name) as archive:
        members = ((m.name.removeprefix("package/"), m) for m in archive if m.isfile())
        return {path: archive.extractfile(m).read() for path, m in members if path.startswith(wanted)}


def find_picture(files, folder, emoji):
    """Find an emoji's picture. Packages differ in whether the variation selector FE0F is part of the name."""
    code = emoji["unified"].lower()
    names = [code, code.replace("-fe0f", ""), (emoji["non_qualified"] or code).lower()]
    paths = [f"{folder}/{name}.{ending}" for name in names for ending in ("png", "webp")]
    return next((files[path] for path in paths if path in files), None)


def encode(data):
    """Encode a picture as WEBP on white, at most SIZE wide: lossless if it was small, else almost lossless."""
    image = PILImage.open(io.BytesIO(data)).convert("RGBA")
    small = max(image.size) <= SIZE
    if not small:
        image = image.resize((SIZE, SIZE), PILImage.Resampling.LANCZOS)
    image = PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image).convert("RGB")
    out = io.BytesIO()
    image.save(out, "WEBP", lossless=small, quality=85, method=4)
    return out.getvalue()


def rows(packages, annotations):
    """Yield a row for each style of each concept that every style has, in Unicode's order."""
    table = json.loads(packages["noto"]["emoji.json"])
    for emoji in sorted(table, key=lambda e: e["sort_order"]):
        if emoji["category"] not in CATEGORIES or emoji["subcategory"] in NOT_THINGS or emoji.get("obsoleted_by"):
            continue
        text = "".join(chr(int(code, 16)) for code in emoji["unified"].split("-"))
        words = annotations.get(text.replace("\ufe0f", ""))
        pictures = {style: find_picture(packages[style], STYLES[style][1], emoji) for style in STYLES}
        if not words or not all(pictures.values()) or words["tts"][0].endswith(("o’clock", "-thirty")):
            continue
        for style, data in pictures.items():
            yield {
                "image": {"bytes": encode(data), "path": None},
                "name": words["tts"][0].replace("’", "'"),
                "keywords": words["default"],
                "emoji": text,
                "category": emoji["category"],
                "subcategory": emoji["subcategory"],
                "style": style,
            }


def write(table, path):
    text = Value("string")
    features = Features(dict.fromkeys(table[0], text) | {"image": Image(), "keywords": List(text)})
    Dataset.from_list(table, features=features).to_parquet(path)
    print(f"{path}: {len(table)} rows, {path.stat().st_size / 1e6:.1f} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "emoji")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        packages = {
            style: npm_pack(package, folder, where, "emoji.json") for style, (package, where) in STYLES.items()
        }
        words = next(iter(npm_pack(NAMES, folder, "annotations/en/annotations.json").values()))
    table = list(rows(packages, json.loads(words)["annotations"]["annotations"]))
    for split in ("train", "test"):
        write([row for row in table if SPLITS[row["style"]] == split], args.output / f"{split}.parquet")


if __name__ == "__main__":
    main()
