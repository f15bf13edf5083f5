"""`blip2-hf caption`: captions of a whole collection of pictures."""

import argparse
import glob
from functools import partial
from pathlib import Path
from typing import Any

from ._common import (
    add_allow_urls,
    add_option,
    generate_argument,
    load_captioner,
    load_dataset,
    processes,
    tell_image_size,
)


def add_parser(commands: Any):
    text = "Caption a collection of pictures. Run again to go on after an interruption, or with pictures that are new."
    parser = commands.add_parser("caption", help=text, description=text)
    parser.set_defaults(run=_run)

    add = partial(add_option, parser)
    kinds = "folder of pictures, WebDataset ('shards/*.tar'), file (parquet, json, csv, arrow), or id on the Hub"
    add("data", kinds, metavar="DATA")
    add("--model", "BLIP-2: folder or id on the Hub", required=True)
    add(
        "--output",
        "file that ends in .jsonl or .parquet, or folder of .txt files; without it they lie next to the pictures",
    )
    add("--format", "told by the ending of --output if it is not given", choices=["txt", "jsonl", "parquet"])
    add("--preset", "the paper's settings; what other options say comes first", choices=["caption", "nocaps"])
    add("--prompt", "text that the captions go on from, such as 'a photo of'")
    add("--num-beams", "beams; without it the model's own setting, which is mostly 1", type=int)
    add("--max-new-tokens", "the most tokens of a caption; without it 30, or the preset's", type=int)
    sampled = "; with a preset its five beams are sampled: --num-beams 1 for plain sampling"
    add("--top-p", f"sample from the likeliest tokens that have this probability together{sampled}", type=float)
    add("--temperature", f"sample at this temperature{sampled}", type=float)
    others = "other arguments of generate, such as length_penalty=0 repetition_penalty=1.15"
    add("--generate", others, nargs="+", type=generate_argument, metavar="NAME=VALUE")
    add("--image-size", "side in pixels of the square that pictures are scaled to, not the checkpoint's", type=int)
    add("--batch-size", "pictures at a time, fewer if they don't fit; without it 128, or 16 on a CPU", type=int)
    add("--dtype", "without it that of the checkpoint", choices=["bfloat16", "float16", "float32"])
    add("--device", "such as cuda:1 or cpu; without it a GPU if there is one, its own for each process")
    add("--num-workers", "processes that decode pictures; 0 takes a thread", type=int, default=2)
    add("--image-column", "column (or ending in the tar files) of the pictures, if it can't be told")
    add("--config", "configuration of the dataset, if it has several")
    add("--split", "split of the dataset, also `train[:1000]`", default="train")
    add_allow_urls(parser)
    add("--overwrite", "delete the captions that are there, and begin anew", action="store_true")


def _run(options: argparse.Namespace):
    from ..captioning import caption_dataset
    from ..data import with_image_size

    with processes(options.device, "What is captioned is kept; the same command goes on with the rest.") as state:
        pictures = _open_pictures(options)
        model, processor = load_captioner(options.model, options.dtype, options.device or state.device)
        prompt, generate_kwargs = _generation(options, processor, model.config)
        processor.image_processor = with_image_size(processor.image_processor, options.image_size)
        caption_dataset(
            model,
            processor,
            pictures,
            options.output,
            options.format,
            prompt,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            overwrite=options.overwrite,
            **generate_kwargs,
        )


def _open_pictures(options: argparse.Namespace) -> Any:
    from ..captioning import FolderPictures, RowPictures, TarPictures
    from ..data import load_rows

    path, has_wildcard = Path(options.data), glob.has_magic(options.data)
    if path.suffix == ".tar":
        if not (paths := sorted(glob.glob(options.data, recursive=True)) if has_wildcard else [options.data]):
            raise SystemExit(f"blip2-hf: no file is called {options.data}.")
        return TarPictures(paths, options.image_column)
    if path.is_dir() and not (path / "state.json").is_file():
        if len(folder := FolderPictures(path)):
            return folder
        if paths := sorted(map(str, path.rglob("*.tar"))):
            return TarPictures(paths, options.image_column)
    if has_wildcard:
        return RowPictures(load_rows(options.data, options.split), options.image_column, options.allow_urls)
    rows = load_dataset(options.data, options.config, options.split)
    return RowPictures(rows, options.image_column, options.allow_urls)


def _generation(options: argparse.Namespace, processor: Any, model_config: Any) -> tuple[str | None, dict[str, Any]]:
    """Return the prompt and arguments of `generate`: those that were given, and otherwise the preset's."""
    from ..models.generation_presets import generation_preset

    names = ("num_beams", "max_new_tokens", "top_p", "temperature")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.top_p is not None or options.temperature is not None:
        given["do_sample"] = True
    given |= dict(options.generate or [])
    if options.preset is None:
        return options.prompt, given
    preset = generation_preset(options.preset, model_config)
    tell_image_size(processor, options.image_size, preset.image_size)
    kwargs = preset.generate_kwargs | given
    if "min_new_tokens" not in given:
        kwargs["min_new_tokens"] = min(kwargs["min_new_tokens"], kwargs["max_new_tokens"])
    return preset.prompt if options.prompt is None else options.prompt, kwargs
