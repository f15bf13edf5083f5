"""`blip2-hf search`: pictures that fit a text, as a table and as a sheet to look at."""

import argparse
import json
import math
import tempfile
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._common import add_command, check_png, pick, save_png
from ._parser import at_least_zero, file_to_write, positive


if TYPE_CHECKING:
    from PIL import Image

    from ..search import SearchResult

# Of a sheet, in pixels
PICTURE, GAP, CAPTION, TITLE, COLUMNS = 280, 16, 52, 64, 4
_GROUND, _FRAME, _INK, _PALE = "#ffffff", "#eeeeee", "#222222", "#777777"


def add_parser(commands: Any):
    text = "Find the pictures of a folder that fit a text. `blip2-hf index` makes the index that is searched."
    example = 'blip2-hf search "a red bus" --index photos'
    add = add_command(commands, "search", _run, text, check=_check, example=example)
    add("text", "what to look for", nargs="?", metavar="TEXT")
    add("--image", "look for pictures like this one, in place of a text", metavar="FILE")
    add("--index", "the folder of the index, or of the pictures", default=".", metavar="DIR")
    add("--model", "the model that the index was built with, if it has moved")
    add("--top", "pictures to find", type=positive, default=12)
    rerank = "how many of the first the model reads together with the text; the paper has 128"
    add("--rerank", rerank, type=at_least_zero, default=0)
    add("--exact", "compare with all pictures, even if there is an approximate index", action="store_true")
    add(
        "--sheet",
        "PNG of the sheet (default: search.png, or none with --json)",
        type=file_to_write,
        metavar="FILE",
    )
    add("--open", "show it in a browser", action="store_true")
    add("--json", "print JSON, not a table", action="store_true")
    add("--device")
    add("--dtype")


def _check(options: argparse.Namespace):
    if options.text is None and options.image is None:
        raise ValueError("nothing to search for was given: a text, or a picture with --image, was expected.")
    if options.text is not None and options.image is not None:
        raise ValueError(f"the text {options.text!r} and --image {options.image} were given. Give one of the two.")
    check_png(options.sheet or "search.png")
    from ..jobs.names import check_file, check_folder

    check_folder(options.index)
    if options.image is not None and "://" not in options.image:
        check_file(options.image)


def _run(options: argparse.Namespace):
    from ..jobs.errors import printable
    from ..search import SearchIndex

    index = SearchIndex.open(options.index, options.model, device=options.device, dtype=options.dtype)
    results = index.search(**pick(options, "text", "image", "top", "rerank", "exact"))
    if options.json:
        print(json.dumps([{"path": str(path), "score": score} for path, score in results], indent=1))
    else:
        for path, score in results:
            print(printable(f"{score:8.4f}  {path}"))
    if options.json and not options.sheet and not options.open:
        return
    sheet = Path(options.sheet or "search.png")
    if options.open and not options.sheet:
        sheet = Path(tempfile.mkdtemp(prefix="blip2-search-"), sheet)
    title = options.text if options.text is not None else f"like {options.image}"
    save_png(draw_sheet(results, title, index.folder), sheet)
    if not options.json:
        print(f"Sheet: {sheet}")
    if options.open and not webbrowser.open(sheet.resolve().as_uri()):
        raise ValueError(f"no browser was found here to show {sheet}. Open it elsewhere.")


def draw_sheet(results: Sequence["SearchResult"], title: str, folder: Path) -> "Image.Image":
    """Draw the pictures that were found, the best first, each above its score and its name within `folder`."""
    from PIL import Image, ImageDraw, ImageFont

    columns = min(COLUMNS, max(1, len(results)))
    rows = math.ceil(len(results) / columns)
    size = GAP + columns * (PICTURE + GAP), TITLE + rows * (PICTURE + CAPTION + GAP)
    sheet = Image.new("RGB", size, _GROUND)
    pen = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(24), ImageFont.load_default(16)
    pen.text((GAP, GAP), _cut(title, large, size[0] - 2 * GAP, at_end=True), _INK, large)
    for number, (path, score) in enumerate(results):
        left, top = GAP + number % columns * (PICTURE + GAP), TITLE + number // columns * (PICTURE + CAPTION + GAP)
        sheet.paste(_square(path), (left, top))
        name = path.relative_to(folder).as_posix()
        pen.text((left, top + PICTURE + 6), f"{number + 1}.  {score:.3f}", _INK, small)
        pen.text((left, top + PICTURE + 28), _cut(name, small, PICTURE), _PALE, small)
    return sheet


def _square(path: Path) -> "Image.Image":
    """Return the whole picture in the middle of a square, or an empty square if it can't be read any more."""
    from PIL import Image, ImageOps

    from ..models.image_loading import ImageLoadError, load_image

    try:
        return ImageOps.pad(load_image(path), (PICTURE, PICTURE), color=_FRAME)
    except ImageLoadError:
        return Image.new("RGB", (PICTURE, PICTURE), _FRAME)


def _cut(text: str, font: Any, width: int, at_end: bool = False) -> str:
    """Return a text that fits a width. The beginning is cut, because the end of a path tells more, or the end."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    kept, shown = text, text
    while kept and font.getlength(shown) > width:
        kept = kept[:-1] if at_end else kept[1:]
        shown = f"{kept.rstrip()}..." if at_end else f"...{kept}"
    return shown
