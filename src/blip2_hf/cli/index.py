"""`blip2-hf index`: features of the pictures of a folder, for `blip2-hf search`."""

import argparse
import os
import sys
from typing import Any

from ._common import add_command, pick, stop
from ._parser import folder_to_write


_SHOWN = 5  # broken pictures that are told of


def add_parser(commands: Any):
    text = "Make an index of a folder of pictures, to be searched by text, or bring it up to date."
    example = "blip2-hf index photos --model Salesforce/blip2-itm-vit-g"
    add = add_command(commands, "index", _run, text, example=example)
    folder = "the pictures, in this folder and those in it; run again to go on, or when they change"
    add("folder", folder, metavar="FOLDER")
    add("--model", "BLIP-2 for retrieval: folder or id on the Hub; an index that is there knows its own")
    add("--index", "folder of the index (default: FOLDER/.blip2-index)", type=folder_to_write, metavar="DIR")
    add("--store-embeds", "store the tower's output too, so that re-ranking need not run it", action="store_true")
    approximate = "make an approximate index with faiss, for many pictures (of itself from 100,000 on)"
    add("--approximate", approximate, action="store_true")
    add("--rebuild", "begin anew, with another model for instance", action="store_true")
    add("--device")
    add("--dtype")
    add("--batch-size", default=32)
    add("--rows-per-shard", default=500)
    add("--num-workers")


def _run(options: argparse.Namespace):
    from ..jobs.errors import printable
    from ..search import SearchIndex

    if (count := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(f"index was started in {count} processes, and runs in one: start it without accelerate.")
    kwargs = pick(options, "store_embeds", "rebuild", "batch_size", "rows_per_shard", "num_workers", "device", "dtype")
    kwargs |= {"directory": options.index, "approximate": options.approximate or None}
    try:
        index = SearchIndex.build(options.folder, options.model, **kwargs)
    except KeyboardInterrupt:
        again = "again, without --rebuild," if options.rebuild else "again"
        stop(f"stopped. What is finished is kept: run the same command {again} to go on.")
    if broken := [*index.broken().values()]:
        place = index.directory / "broken.json"
        more = [f"... and {len(broken) - _SHOWN:,} more"] if len(broken) > _SHOWN else []
        heading = f"Left out because they can't be read ({len(broken):,}, listed in {place}):"
        print(printable("\n  ".join([heading, *broken[:_SHOWN], *more])), file=sys.stderr)
    search = f'blip2-hf search "a dog" --index {options.index or options.folder}'
    print(printable(f"{len(index):,} pictures are in the index {index.directory}. Next: {search}"))
