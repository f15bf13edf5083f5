"""`blip2-hf search`: pictures that fit a text, as a table and as a sheet to look at."""

import argparse
import json
import math
import tempfile
import webbrowser
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._common import add_option


if TYPE_CHECKING:
    from PIL import Image

    from ..search import SearchResult

# Of a sheet, in pixels
PICTURE, GAP, CAPTION, TITLE, COLUMNS = 280, 16, 52, 64, 4
_GROUND, _FRAME, _INK, _PALE = "#ffffff", "#eeeeee", "#222222", "#777777"


def add_parser(commands: Any):
    text = "Find the pictures of a folder that fit a text. `blip2-hf index` makes the index that is searched."
    parser = commands.add_parser("search", help=text, description=text)
    parser.set_defaults(run=_run)

    add = partial(add_option, parser)
    add("text", "what to look for", nargs="?", metavar="TEXT")
    add("--image", "look for pictures like this one, in place of a text", metavar="FILE")
    add("--index", "the folder of the index, or of the pictures", default=".", metavar="DIR")
    add("--model", "the model that the index was built with, if it has moved")
    add("--top", "pictures to find", type=int, default=12)
    add(
        "--rerank",
        "how many of the first the model reads together with the text; the paper has 128",
        type=int,
        default=0,
    )
    add("--exact", "compare with all pictures, even if there is an approximate index", action="store_true")
    add("--sheet", "where the sheet goes (default: search.png, or nowhere with --json)", metavar="FILE.png")
    add("--open", "show the sheet", action="store_true")
    add("--json", "print JSON, not a table", action="store_true")
    add("--device", "such as cuda:1 or cpu; without it, an accelerator if there is one")
    add(
        "--dtype",
        "what the model computes in, not the dtype of its checkpoint",
        choices=["bfloat16", "float16", "float32"],
    )


def _run(options: argparse.Namespace):
    if (options.text is None) == (options.image is None):
        raise SystemExit("blip2-hf: give a text to search for, or --image.")
    if options.sheet is not None and not options.sheet.lower().endswith(".png"):
        raise SystemExit(f"blip2-hf: --sheet {options.sheet}: a name that ends in .png was expected.")

    from ..jobs.errors import printable
    from ..search import SearchIndex

    try:
        index = SearchIndex.open(options.index, options.model, device=options.device, dtype=options.dtype)
        results = index.search(
            options.text, options.image, top=options.top, rerank=options.rerank, exact=options.exact
        )
    except KeyboardInterrupt:
        raise SystemExit("blip2-hf: stopped.") from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"blip2-hf: {printable(str(error))}") from error
    if options.json:
        print(json.dumps([{"path": str(path), "score": score} for path, score in results], indent=1))
    else:
        for path, score in results:
            print(printable(f"{score:8.4f}  {path}"))
    if not options.json or options.sheet or options.open:
        sheet = _write_sheet(options, results, index.folder)
        if not options.json:
            print(f"Sheet: {sheet}")
        if options.open and not webbrowser.open(sheet.resolve().as_uri()):
            raise SystemExit(f"blip2-hf: no browser was found here to show {sheet}. Open it elsewhere.")


def _write_sheet(options: argparse.Namespace, results: Sequence["SearchResult"], folder: Path) -> Path:
    from ..jobs.atomic_files import atomic_file

    if options.sheet is None and options.open:
        path = Path(tempfile.mkdtemp(prefix="blip2-search-"), "search.png")
    else:
        path = Path(options.sheet or "search.png")
    title = options.text if options.text is not None else f"like {options.image}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        draw_sheet(results, title, folder).save(file, format="PNG")
    return path


def draw_sheet(results: Sequence["SearchResult"], title: str, folder: Path) -> "Image.Image":
    """
    Draw the pictures that were found, the best first, row by row, each above its score and its name.

    Args:
        results (`list[SearchResult]`):
            What was found.
        title (`str`):
            The line at the top.
        folder (`Path`):
            The folder that names are told from.

    Returns:
        `PIL.Image.Image`: the sheet, with four pictures in a row.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = min(COLUMNS, max(1, len(results)))
    rows = math.ceil(len(results) / columns)
    size = GAP + columns * (PICTURE + GAP), TITLE + rows * (PICTURE + CAPTION + GAP)
    sheet = Image.new("RGB", size, _GROUND)
    pen = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(24), ImageFont.load_default(16)
    pen.text((GAP, GAP), _cut(title, large, size[0] - 2 * GAP), _INK, large)
    for number, (path, score) in enumerate(results):
        left, top = GAP + number % columns * (PICTURE + GAP), TITLE + number // columns * (PICTURE + CAPTION + GAP)
        _draw_picture(sheet, pen, path, left, top)
        name = path.relative_to(folder).as_posix()
        pen.text((left, top + PICTURE + 6), f"{number + 1}.  {score:.3f}", _INK, small)
        pen.text((left, top + PICTURE + 28), _cut(name, small, PICTURE), _PALE, small)
    return sheet


def _draw_picture(sheet: "Image.Image", pen: Any, path: Path, left: int, top: int):
    """Draw the whole picture in the middle of its square. If it can't be read any more, the square is empty."""
    from PIL import ImageOps

    from ..models.image_loading import ImageLoadError, load_image

    pen.rectangle((left, top, left + PICTURE - 1, top + PICTURE - 1), _FRAME)
    try:
        picture = ImageOps.contain(load_image(path), (PICTURE, PICTURE))
    except ImageLoadError:
        return
    sheet.paste(picture, (left + (PICTURE - picture.width) // 2, top + (PICTURE - picture.height) // 2))


def _cut(text: str, font: Any, width: int) -> str:
    """Return a text that fits a width. The beginning is cut, because the end of a path tells more."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    shown = text
    while shown and font.getlength(shown if shown == text else f"...{shown}") > width:
        shown = shown[1:]
    return shown if shown == text else f"...{shown}"
