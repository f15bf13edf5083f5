"""What the commands share: nothing heavy is imported before a command runs."""

import argparse
from pathlib import Path
from typing import Any


_BUILDERS = {  # of `datasets`, by the suffix of a file
    ".arrow": "arrow",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".tar": "webdataset",
}


def add_option(parser: argparse.ArgumentParser, name: str, text: str, **kwargs):
    """`add_argument` whose help tells the default."""
    shown = " (default: %(default)s)" if kwargs.get("default") is not None else ""
    parser.add_argument(name, help=text + shown, **kwargs)


def load_dataset(data: str, config: str | None = None, split: str = "train") -> Any:
    """The data set that a user names: a folder of pictures, a file, what `save_to_disk` wrote, or an id on the Hub."""
    import datasets

    path = Path(data)
    if path.is_file():
        if path.suffix not in _BUILDERS:
            raise SystemExit(f"blip2-hf: {data}: a file with one of the endings {', '.join(_BUILDERS)} was expected.")
        return datasets.load_dataset(_BUILDERS[path.suffix], data_files=data, split=split)
    if (path / "state.json").is_file():
        return datasets.load_from_disk(data)
    return datasets.load_dataset(data, config, split=split)
