"""Make the dataset of the examples: emoji in six openly licensed styles, with their Unicode names.

    python examples/data/make_emoji.py            # needs npm and resvg-py; downloads 300 MB, writes ./emoji/

Each concept (a thing: animal, food, object, place ...) is drawn in each style, so there is a natural held-out set:
train on five styles, test on the sixth. The two styles of 2016 lack the things that Unicode has added since. Sources
and licences are in emoji/LICENSES.md. With the same versions of Pillow, pyarrow, datasets and resvg-py, the same input
gives the same bytes.
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
from importlib.util import find_spec
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage


NAMES = "cldr-annotations-full@48.2.0"
# style: (npm package, folder of its pictures); the sets of Apple and Facebook are not free to use
STYLES = {
    "noto": ("emoji-datasource-google@16.0.0", "img/google/64"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "img/twitter/64"),
    "noto-2016": ("emoji-datasource-google@3.0.0", "img/google/64"),
    "openmoji": ("openmoji@17.0.0", "color/svg"),
    "emojione": ("emojione@2.2.7", "assets/png_128x128"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "assets"),
}
INCOMPLETE_STYLES = ("noto-2016", "emojione")  # of 2016, without newer things
TEST_STYLE = "fluent"
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


def pictures_by_code(files):
    """Return `{code: bytes}` of a package's pictures."""
    pictures = ((Path(path), data) for path, data in files.items())
    return {code_of(path.stem): data for path, data in pictures if path.suffix in (".png", ".webp", ".svg")}


def code_of(name):
    """Return a name that all packages agree on: they differ in capitals, variation selectors (FE0F) and joiners."""
    return "-".join(part for part in name.lower().split("-") if part not in ("fe0f", "200d"))


def as_bitmap(data):
    """Draw an SVG, SIZE wide, and return it as PNG. Return other pictures unchanged."""
    if b"<svg" not in data[:1000]:
        return data
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_string=data.decode(), width=SIZE))


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
    """Yield a row for each style of each concept that every complete style has, in Unicode's order."""
    table = json.loads(packages["noto"]["emoji.json"])
    by_style = {style: pictures_by_code(packages[style]) for style in STYLES}
    for emoji in sorted(table, key=lambda e: e["sort_order"]):
        if emoji["category"] not in CATEGORIES or emoji["subcategory"] in NOT_THINGS or emoji.get("obsoleted_by"):
            continue
        text = "".join(chr(int(code, 16)) for code in emoji["unified"].split("-"))
        words = annotations.get(text.replace("\ufe0f", ""))
        code = code_of(emoji["unified"])
        pictures = {style: codes[code] for style, codes in by_style.items() if code in codes}
        is_everywhere = pictures.keys() | set(INCOMPLETE_STYLES) == STYLES.keys()
        if not words or not is_everywhere or words["tts"][0].endswith(("o’clock", "-thirty")):
            continue
        for style, data in pictures.items():
            yield {
                "image": {"bytes": encode(as_bitmap(data)), "path": None},
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
    if not find_spec("resvg_py"):
        sys.exit("OpenMoji is SVG, and resvg-py, which draws it, was not found. Install it: pip install resvg-py")
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        packages = {
            style: npm_pack(package, folder, where, "emoji.json") for style, (package, where) in STYLES.items()
        }
        words = next(iter(npm_pack(NAMES, folder, "annotations/en/annotations.json").values()))
    table = list(rows(packages, json.loads(words)["annotations"]["annotations"]))
    write([row for row in table if row["style"] != TEST_STYLE], args.output / "train.parquet")
    write([row for row in table if row["style"] == TEST_STYLE], args.output / "test.parquet")


if __name__ == "__main__":
    main()
