"""`blip2-hf demo`: a web page to try models on."""

import argparse
import contextlib
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

from ._common import add_command, check_port, find_device, load_captioner


_DEMO = Path("outputs", "demo")  # what `make demo` leaves
_EXAMPLES = 8


def add_parser(commands: Any):
    text = (
        "Open a web page on which pictures are captioned, asked about and searched, and which shows where a model "
        f"looks. Without models, those of `make demo` are taken, if {_DEMO} has them."
    )
    example = (
        "blip2-hf demo --captioner Salesforce/blip2-opt-2.7b --retriever Salesforce/blip2-itm-vit-g --folder photos"
    )
    add = add_command(commands, "demo", _run, "Try models on a web page.", text, check=_check, example=example)
    add("--captioner", "writes captions: a BLIP-2", metavar="MODEL")
    add("--retriever", "searches, and shows where it looks: a BLIP-2 of stage 1 or for retrieval", metavar="MODEL")
    add("--folder", "pictures to search and to click; its index is kept in the folder", metavar="DIR")
    add("--host")
    add("--port", default=7860)
    add("--open", "show it in a browser", action="store_true")
    add("--dtype")
    add("--device")


def _check(options: argparse.Namespace):
    if options.captioner is None and options.retriever is None:
        defaults = {"captioner": _DEMO / "model", "retriever": _DEMO / "retriever", "folder": _DEMO / "scenes"}
        for name, path in defaults.items():
            if path.exists() and getattr(options, name) is None:
                setattr(options, name, str(path))
    if options.captioner is None and options.retriever is None:
        raise ValueError("no model was given. Give --captioner or --retriever, or make those of the demo: make demo")
    check_port(options.host, options.port)


def _run(options: argparse.Namespace):
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError("blip2-hf demo needs gradio: pip install 'blip2-hf[app]'") from error
    with tempfile.TemporaryDirectory(prefix="blip2-hf-") as uploads:
        # Uploads are gone when the page is closed, by Ctrl-C or by a service manager
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        os.environ["GRADIO_TEMP_DIR"] = uploads
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        page = _make_page(options, Path(uploads))
        from ..web_page import launch

        print(f"The page: http://{options.host}:{options.port} (Ctrl-C ends it)", flush=True)
        launch(page, server_name=options.host, server_port=options.port, inbrowser=options.open, quiet=True)


def _make_page(options: argparse.Namespace, uploads: Path) -> Any:
    from ..retrieval.loading import load_retrieval_model
    from ..search import SearchIndex
    from ..web_page import make_page

    captioner = retriever = index = None
    if options.captioner is not None:
        captioner = load_captioner(options.captioner, options.dtype, find_device(options.device))
        captioner[0].eval()
    if options.retriever is not None:
        retriever = load_retrieval_model(options.retriever, options.device, options.dtype)
    if options.folder is not None and retriever is not None:
        index = SearchIndex.build(Path(options.folder).resolve(), *retriever)
    return make_page(captioner, retriever, index, _examples(options.folder, uploads))


def _examples(folder: str | None, uploads: Path) -> list[Path]:
    """Copy the first pictures of a folder that can be read, because the page has no access to the folder itself."""
    from ..jobs.picture_files import find_picture_files
    from ..models.image_loading import ImageLoadError, load_image

    if folder is None:
        return []
    copies: list[Path] = []
    (uploads / "examples").mkdir()
    for name in find_picture_files(folder):
        with contextlib.suppress(ImageLoadError):
            load_image(Path(folder, name))
            copy = uploads / "examples" / f"{len(copies)}-{Path(name).name}"
            copies.append(Path(shutil.copy(Path(folder, name), copy)))
        if len(copies) == _EXAMPLES:
            break
    return copies
