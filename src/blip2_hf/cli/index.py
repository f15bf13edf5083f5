"""`blip2-hf index`: features of the pictures of a folder, for `blip2-hf search`."""

import argparse
import sys
from functools import partial
from typing import Any

from ._common import add_option, end_workers


_SHOWN = 5  # broken pictures that are told of


def add_parser(commands: Any):
    text = "Make an index of a folder of pictures, to be searched by text, or bring it up to date."
    parser = commands.add_parser("index", help=text, description=text)
    parser.set_defaults(run=_run)

    add = partial(add_option, parser)
    add(
        "folder",
        "the pictures, in this folder and those in it; run again to go on, or when they change",
        metavar="FOLDER",
    )
    add("--model", "BLIP-2 for retrieval: folder or id on the Hub; an index that is there knows its own")
    add("--index", "where the index lies (default: FOLDER/.blip2-index)", metavar="DIR")
    add("--store-embeds", "store the tower's output too, so that re-ranking need not run it", action="store_true")
    add(
        "--approximate",
        "make an approximate index with faiss, for many pictures (of itself from 100,000 on)",
        action="store_true",
    )
    add("--rebuild", "begin anew, with another model for instance", action="store_true")
    add("--device", "such as cuda:1 or cpu; without it, an accelerator if there is one")
    add(
        "--dtype",
        "what the model computes in, not the dtype of its checkpoint",
        choices=["bfloat16", "float16", "float32"],
    )
    add("--batch-size", "pictures that the model takes at a time", type=int, default=32)
    add("--rows-per-shard", "pictures of a file: what is computed again after a stop", type=int, default=500)
    add("--num-workers", "processes that load pictures", type=int, default=4)


def _run(options: argparse.Namespace):
    from ..jobs.errors import printable
    from ..search import SearchIndex

    try:
        index = SearchIndex.build(
            options.folder,
            options.model,
            directory=options.index,
            store_embeds=options.store_embeds,
            approximate=options.approximate or None,
            rebuild=options.rebuild,
            batch_size=options.batch_size,
            rows_per_shard=options.rows_per_shard,
            num_workers=options.num_workers,
            device=options.device,
            dtype=options.dtype,
        )
    except KeyboardInterrupt:
        end_workers()
        again = "run the same command again, without --rebuild," if options.rebuild else "run the same command again"
        raise SystemExit(f"blip2-hf: stopped. What is finished is kept: {again} to go on.") from None
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(f"blip2-hf: {printable(str(error))}") from error
    if broken := index.broken():
        heading = (
            f"Left out because they can't be read ({len(broken):,}, listed in {index.directory / 'broken.json'}):"
        )
        more = [f"... and {len(broken) - _SHOWN:,} more"] if len(broken) > _SHOWN else []
        print(printable("\n  ".join([heading, *list(broken.values())[:_SHOWN], *more])), file=sys.stderr)
    print(printable(f"{len(index):,} pictures are in the index {index.directory}"))
