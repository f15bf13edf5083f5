"""`blip2-hf caption`: captions of a whole collection of pictures."""

import argparse
import glob
from pathlib import Path
from typing import Any

from ._common import add_command, generate_kwargs, load_captioner, load_dataset, pick, processes, tell_image_size
from ._parser import to_write


def add_parser(commands: Any):
    text = "Caption a collection of pictures. Run again to go on after an interruption, or with pictures that are new."
    example = "blip2-hf caption photos --model Salesforce/blip2-opt-2.7b --dtype bfloat16 --output captions.jsonl"
    add = add_command(commands, "caption", _run, text, example=example)
    add("data")
    add("--model", required=True)
    output = ".jsonl or .parquet file, or folder of .txt files; without it .txt files next to the pictures"
    add("--output", output, type=to_write, metavar="FILE|FOLDER")
    add("--format", "without it, the ending of --output tells it", choices=["txt", "jsonl", "parquet"])
    add("--preset", "the paper's settings; other options come first", choices=["caption", "nocaps"])
    add("--prompt", "text that the captions go on from, such as 'a photo of'")
    add("--num-beams", "beams; without it the model's own setting, which is mostly 1", type=int)
    add("--max-new-tokens", "the most tokens of a caption; without it 30, or the preset's")
    add("--top-p")
    sampled = "sample at this temperature; with a preset its five beams are sampled: --num-beams 1 for plain sampling"
    add("--temperature", sampled, type=float)
    add("--generate")
    add("--image-size")
    add("--batch-size", "pictures at a time, fewer if they don't fit; without it 128, or 16 on a CPU")
    add("--dtype")
    add("--device")
    add("--num-workers", "processes that load pictures; 0 takes a thread", default=2)
    add("--image-column", "column (or ending in the tar files) of the pictures, if it can't be told")
    add("--image-root")
    add("--config")
    add("--split")
    add("--allow-urls")
    add("--overwrite", "delete the existing captions, and begin anew", action="store_true")


def _run(options: argparse.Namespace):
    from ..captioning import caption_dataset
    from ..data import with_image_size
    from ..jobs.checkpoints import WRITING, check_checkpoint

    check_checkpoint(options.model, WRITING)
    with processes(options.device) as state:
        pictures = _open_pictures(options)
        model, processor = load_captioner(options.model, options.dtype, options.device or state.device)
        prompt, kwargs = _generation(options, processor, model.config)
        processor.image_processor = with_image_size(processor.image_processor, options.image_size)
        kwargs |= pick(options, "batch_size", "num_workers", "overwrite")
        caption_dataset(model, processor, pictures, options.output, options.format, prompt, **kwargs)


def _open_pictures(options: argparse.Namespace) -> Any:
    from ..captioning import FolderPictures, RowPictures
    from ..data.folders import is_picture_folder
    from ..data.shards import find_shards

    path = Path(options.data)
    if path.suffix.lower() == ".tar":
        if not (paths := sorted(glob.glob(options.data, recursive=True))):
            raise ValueError(f"no file is called {options.data}.")
        return _open_shards(options, paths)
    if path.is_dir() and is_picture_folder(path):
        _refuse(options, "a folder of pictures, all of which are captioned", "image_column")
        return FolderPictures(path)
    if path.is_dir() and (paths := find_shards(path)):
        return _open_shards(options, paths)
    rows = load_dataset(options)
    return RowPictures(rows, options.image_column, options.allow_urls)


def _open_shards(options: argparse.Namespace, paths: list[str]) -> Any:
    from ..captioning import TarPictures

    _refuse(options, "WebDataset, all of which is captioned")
    return TarPictures(paths, options.image_column)


def _refuse(options: argparse.Namespace, kind: str, *names: str):
    """Refuse options that say which of several columns or splits is read, if there are none."""
    given = pick(options, "config", "split", "image_root", *names)
    if unused := [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]:
        raise ValueError(f"{options.data} is {kind}: {unused[0]} has no use. Leave it out.")


def _generation(options: argparse.Namespace, processor: Any, model_config: Any) -> tuple[str | None, dict[str, Any]]:
    """Return the prompt and arguments of `generate`: those that were given, and otherwise the preset's."""
    from ..models.generation_presets import generation_preset

    given = pick(options, "num_beams", "max_new_tokens", "top_p", "temperature")
    given = {name: value for name, value in given.items() if value is not None}
    if given.keys() & {"top_p", "temperature"}:
        given["do_sample"] = True
    given |= dict(options.generate or [])
    if options.preset is None:
        return options.prompt, given
    preset = generation_preset(options.preset, model_config)
    tell_image_size(processor, options.image_size, preset.image_size)
    return preset.prompt if options.prompt is None else options.prompt, generate_kwargs(preset, given)
