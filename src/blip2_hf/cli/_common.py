"""What the commands share: nothing heavy is imported before a command runs."""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any


_LONGEST_WAIT = timedelta(days=30)  # of a process that has done its share, for the others
_BUILDERS = {  # of `datasets`, by the suffix of a file
    ".arrow": "arrow",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".tar": "webdataset",
}


def add_option(parser: argparse.ArgumentParser, name: str, text: str, **kwargs):
    """Add an argument whose help tells the default."""
    shown = " (default: %(default)s)" if kwargs.get("default") is not None else ""
    parser.add_argument(name, help=text + shown, **kwargs)


def add_allow_urls(parser: argparse.ArgumentParser):
    """Add the option that says which URLs in rows are fetched."""
    text = (
        "fetch pictures that rows have as URLs, from public addresses; those of this machine and of private networks "
        "only from each HOST that is named"
    )
    parser.add_argument("--allow-urls", help=text, nargs="*", metavar="HOST", default=False)


@contextmanager
def processes(device: str | None, interrupted: str) -> Iterator[Any]:
    """
    Yield the state of the processes that a command runs in. An error that users can mend is told in a line, without a
    traceback. After an interruption, `interrupted` is told.
    """
    import torch
    from accelerate import PartialState

    from ..jobs.errors import printable

    # accelerate sees no other processes on a machine without a GPU, unless it is told so
    state = PartialState(cpu=device == "cpu" or not torch.accelerator.is_available(), timeout=_LONGEST_WAIT)
    if state.num_processes > 1 and device not in (None, "cpu"):
        raise SystemExit(
            f"blip2-hf: --device {device} with {state.num_processes} processes: leave it out, and each takes a device "
            "of its own, or give cpu."
        )
    try:
        yield state
    except (ValueError, OSError) as error:
        raise SystemExit(f"blip2-hf: {printable(str(error))}") from error
    except KeyboardInterrupt:
        end_workers()
        state.print(f"\nInterrupted. {interrupted}")
        raise SystemExit(130) from None
    state.destroy_process_group()


def end_workers():
    """End the processes that load pictures: a `DataLoader` would wait 5 seconds for each that is busy."""
    for worker in multiprocessing.active_children():
        worker.terminate()


def load_dataset(data: str, config: str | None = None, split: str = "train") -> Any:
    """Load what a user names: a folder of pictures, a file, what `save_to_disk` wrote, or an id on the Hub."""
    import datasets

    path = Path(data)
    try:
        return _load_dataset(data, path, config, split)
    except datasets.exceptions.DatasetGenerationError as error:
        raise SystemExit(f"blip2-hf: {data} can't be read: {error.__cause__ or error}") from error


def _load_dataset(data: str, path: Path, config: str | None, split: str) -> Any:
    import datasets

    if path.is_file():
        if path.suffix not in _BUILDERS:
            raise SystemExit(f"blip2-hf: {data}: a file with one of the endings {', '.join(_BUILDERS)} was expected.")
        return datasets.load_dataset(_BUILDERS[path.suffix], data_files=data, split=split)
    if (path / "state.json").is_file():
        if split != "train":
            raise SystemExit(f"blip2-hf: {data} has no splits, but {split!r} was asked for. Leave out --split.")
        return datasets.load_from_disk(data)
    return datasets.load_dataset(data, config, split=split)


def generate_argument(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE as an argument of `generate`. The value is JSON or, if it is not, a string."""
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r}: NAME=VALUE was expected, such as num_beams=5")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def tell_image_size(processor: Any, given: int | None, of_paper: int):
    """Tell users if pictures have another size than the paper's."""
    from accelerate import PartialState

    from ..data.image_size import own_image_size

    own = own_image_size(processor.image_processor)
    if given is None and set(own.values()) != {of_paper} and PartialState().is_main_process:
        print(
            f"blip2-hf: pictures have the size of the checkpoint's image processor, {own}. The paper's have "
            f"{of_paper} px: --image-size {of_paper}, for a model that was trained so.",
            file=sys.stderr,
        )


def load_captioner(name: str, dtype: str | None, device: Any) -> tuple[Any, Any]:
    """Load the model of stage 2 and its processor."""
    from ..jobs.inference import load_model
    from ..models.modeling_blip2 import Blip2ForConditionalGeneration
    from ..models.processing_blip2 import Blip2Processor

    expected = "A model that writes text, of Blip2ForConditionalGeneration,"
    model = load_model(Blip2ForConditionalGeneration, name, expected, dtype=dtype or "auto")
    return model.to(device), Blip2Processor.from_pretrained(name)
