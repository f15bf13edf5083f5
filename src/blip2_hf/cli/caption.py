"""`blip2-hf caption`: captions of pictures and videos, printed, or of a whole collection, written."""

import argparse
import glob
import os
import sys
from pathlib import Path
from typing import Any

from ._common import add_command, find_device, load_captioner, load_dataset, pick, processes, tell_image_size
from ._generation import check_generation, check_room, generation_with_preset, given_generation
from ._parser import positive, seed, to_write
from ._pictures import named_pictures, pixel_limit
from ._quantization import quantization_bits


# Options that have no effect on other data
_OF_ROWS = {"config": None, "split": None, "image_column": None, "image_root": None, "allow_urls": False}
_OF_FILES = {"output": None, "format": None, "extension": None, "existing": None, "overwrite": False}
_CANDIDATES, _TOP_P = 5, 0.9  # of --rerank
_WRITING = {name: _OF_FILES[name] for name in ("output", "format", "extension")}


def add_parser(commands: Any):
    text = "Caption pictures and videos: print captions of files, or write those of a collection. Run again to go on."
    example = "blip2-hf caption photos --model Salesforce/blip2-opt-2.7b --prefix 'sks style,'"
    add = add_command(commands, "caption", _run, text, check=_check, example=example)
    kinds = (
        "folder of pictures or of videos, WebDataset ('shards/*.tar'), file (parquet, json, csv, arrow), id on the "
        "Hub; or pictures and videos: files, 'photos/*.jpg', URLs of pictures, whose captions are printed unless "
        "--output is given"
    )
    add("data", kinds, nargs="+", metavar="DATA")
    add("--model", required=True)
    output = (
        ".jsonl, .csv or .parquet file, or folder of .txt files; without it, .txt files next to the pictures of a "
        "folder. `datasets` reads photos/metadata.jsonl with the folder photos"
    )
    add("--output", output, type=to_write, metavar="FILE|FOLDER")
    add("--format", "without it, the ending of --output tells it", choices=["txt", "jsonl", "csv", "parquet"])
    add("--extension", "ending of the text files, such as .caption (default: .txt)")
    existing = "keep existing captions, replace them, or add the new caption behind or before them"
    add("--existing", f"{existing} (default: skip)", choices=["skip", "overwrite", "append", "prepend"])
    add("--overwrite", "short for --existing overwrite", action="store_true")
    add("--preset", "the paper's settings; other options come first", choices=["caption", "nocaps"])
    add(
        "--prompt",
        "text that captions go on from, 'a photo of' for example (default: that of the model's fine-tuning)",
    )
    add("--prefix", "text to put before each caption, such as a trigger word")
    add("--suffix", "text to put behind each caption")
    add("--captions-per-image", "captions of each picture, sampled or of as many beams (default: 1)", type=positive)
    rerank = (
        "model of stage 1 or for retrieval, which chooses one of the sampled captions of a picture (5, or "
        "--captions-per-image)"
    )
    add("--rerank", rerank, dest="reranker", metavar="MODEL")
    add("--confidence", "also tell how sure the model is of each caption, from 0 to 1", action="store_true")
    add("--num-beams")
    add("--max-new-tokens", "the most tokens that are written; without it 30, or the preset's")
    add("--top-p")
    add("--temperature")
    add("--seed", "seed of what is sampled", type=seed)
    add("--generate")
    add("--image-size")
    add("--num-frames")
    add("--max-pixels", "larger pictures are listed as broken (default: about 89 million, as in PIL)", type=positive)
    add("--batch-size", "pictures at a time, fewer if they don't fit; without it 128, or 16 on a CPU")
    add("--dtype")
    add("--load-in-4bit")
    add("--load-in-8bit")
    add("--device")
    add("--num-workers")
    add("--image-column")
    add("--image-root")
    add("--config")
    add("--split")
    add("--allow-urls")


def _check(options: argparse.Namespace):
    quantization_bits(options)
    if options.overwrite and options.existing not in (None, "overwrite"):
        raise ValueError(f"--overwrite and --existing {options.existing} were given: give one of them.")
    if options.captions_per_image is None:
        options.captions_per_image = 1 if options.reranker is None else _CANDIDATES
    if options.reranker is not None:
        _sample(options)


def _sample(options: argparse.Namespace):
    """Let captions be sampled, unless the options say how, because the beams of a search hardly differ."""
    given = dict(options.generate or ())
    if (options.num_beams or given.get("num_beams") or 1) > 1 or given.get("do_sample") is False:
        raise ValueError(
            "--rerank chooses among sampled captions, and the beams of a search hardly differ. Leave them out."
        )
    if options.captions_per_image < 2:
        raise ValueError("--rerank chooses among several captions. Give --captions-per-image 2 or more.")
    options.num_beams = 1
    if options.top_p is None and options.temperature is None and "top_k" not in given:
        options.top_p = _TOP_P


def _run(options: argparse.Namespace):
    from ..jobs.model_checks import MATCHING, WRITING, check_checkpoint

    check_checkpoint(options.model, WRITING)
    if options.reranker is not None:
        check_checkpoint(options.reranker, MATCHING)
    files = _named_files(options.data)
    with pixel_limit(options.max_pixels):
        if files is not None and not _given(options, _WRITING):
            _refuse(options, {**_OF_ROWS, **_OF_FILES}, "Captions of picture files are printed without --output")
            _print_captions(options, files)
        else:
            _write_captions(options, files)


def _named_files(data: list[str]) -> list[str] | None:
    """Return the picture files that are named; `None` if one collection is."""
    found = {name: named_pictures(name) for name in data}
    others = [name for name, files in found.items() if files is None]
    if not others:
        return list(dict.fromkeys(file for files in found.values() for file in files or ()))
    if len(data) > 1 and not all(name.endswith(".tar") for name in data):
        raise ValueError(
            f"{others[0]} is no picture. Several pictures may be given, or one folder or dataset. Quote a wildcard "
            "that stands for other files, such as 'rows-*.parquet'."
        )
    return None


def _print_captions(options: argparse.Namespace, files: list[str]):
    from ..captioning import caption_images
    from ..captioning.captions import tell_empty
    from ..jobs.errors import printable

    model, processor, prompt, kwargs = _load(options, find_device, files)
    kwargs["num_workers"] = min(kwargs["num_workers"], len(files) // 8)  # a process begins slowly
    is_broken, empty = False, 0
    for caption in caption_images(model, processor, files, prompt, **kwargs):
        if caption.error is not None:
            is_broken = True
            print(printable(f"blip2-hf: {caption.error}"), file=sys.stderr)
        for number, text in enumerate(caption.texts):
            cells = [files[caption.index]] if len(files) > 1 else []
            cells.append(" ".join(text.split()))
            if caption.confidences is not None:
                cells.append(f"{caption.confidences[number]:.1%}")
            print(printable("\t".join(cells)), flush=True)
        empty += caption.is_empty
    if empty:
        print(f"blip2-hf: {tell_empty(empty)}", file=sys.stderr)
    if is_broken:
        raise SystemExit(1)


def _write_captions(options: argparse.Namespace, files: list[str] | None):
    from ..captioning import caption_dataset
    from ..captioning.formats import open_output

    output = {
        "existing": "overwrite" if options.overwrite else options.existing or "skip",
        "num_captions": options.captions_per_image if options.reranker is None else 1,
        "extension": _ending(options.extension),
        "with_confidence": options.confidence,
    }
    with processes(options.device) as state:
        pictures = _open_pictures(options) if files is None else _as_folder(files)
        # What does not fit is told before the model is loaded
        open_output(options.output, options.format, pictures, **output)
        model, processor, prompt, kwargs = _load(
            options, lambda device: device or state.device, getattr(pictures, "names", [])
        )
        counts = caption_dataset(model, processor, pictures, options.output, options.format, prompt, **output | kwargs)
    if counts.broken == counts.pictures:
        raise SystemExit(1)


def _load(options: argparse.Namespace, device: Any, names: list[str]) -> tuple[Any, Any, str | None, dict[str, Any]]:
    """
    Return the model, its processor, the prompt, and the other arguments of `caption_images`. `names` are those of the
    files, if pictures have any.
    """
    from ..captioning.captions import MAX_NEW_TOKENS
    from ..data import with_image_size
    from ..jobs.inference import weights_place
    from ..models.configuration_blip2 import Blip2Config
    from ..models.generation_presets import generation_preset
    from ..models.processing_blip2 import learned_prompt
    from ..models.video_loading import is_video_name

    kwargs, prompt = given_generation(options), options.prompt
    config = Blip2Config.from_pretrained(weights_place(options.model))
    preset = None if options.preset is None else generation_preset(options.preset, config)
    if preset is not None:
        kwargs = generation_with_preset(preset, kwargs)
        prompt = preset.prompt if prompt is None else prompt
    kwargs = {"max_new_tokens": MAX_NEW_TOKENS, **kwargs}
    check_generation(kwargs, options.model, options.captions_per_image, options.seed)
    check_room(config, kwargs)
    place = device(options.device)
    if options.reranker is not None:
        kwargs["rerank"] = _open_reranker(options, place)
    model, processor = load_captioner(options.model, options.dtype, place, bits=quantization_bits(options))
    prompt = learned_prompt(processor) if prompt is None else prompt
    processor.frames_per_video = options.num_frames or processor.frames_per_video
    num_images = processor.frames_per_video if any(map(is_video_name, names)) else 1
    check_room(model.config, kwargs, len(processor(text=prompt or "").input_ids[0]), num_images)
    if preset is not None:
        tell_image_size(processor, options.image_size, preset.image_size)
    processor.image_processor = with_image_size(processor.image_processor, options.image_size)
    kwargs |= pick(options, "batch_size", "num_workers", "prefix", "suffix", "seed")
    options_of_captions = {"num_captions": options.captions_per_image, "with_confidence": options.confidence}
    return model, processor, prompt, {**kwargs, **options_of_captions}


def _open_reranker(options: argparse.Namespace, device: Any) -> Any:
    from ..capfilt import RetrievalFilter
    from ..retrieval.loading import load_retrieval_model

    return RetrievalFilter(*load_retrieval_model(options.reranker, device, options.dtype))


def _as_folder(files: list[str]) -> Any:
    """Return picture files as a part of the folder that all are in."""
    from ..captioning import FolderPictures
    from ..models.image_loading import is_url

    if urls := [file for file in files if is_url(file)]:
        raise ValueError(f"{urls[0]}: captions of URLs are printed. To write them, download the pictures first.")
    paths = [Path(os.path.abspath(file)) for file in files]
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    return FolderPictures(folder, [path.relative_to(folder).as_posix() for path in paths])


def _open_pictures(options: argparse.Namespace) -> Any:
    from ..captioning import FolderPictures, RowPictures
    from ..data.folders import is_picture_folder
    from ..data.shards import find_shards

    data = options.data[0]
    path = Path(data)
    if path.suffix.lower() == ".tar":
        if not (paths := sorted({path for name in options.data for path in glob.glob(name, recursive=True)})):
            raise ValueError(f"no file is called {data}.")
        return _open_tars(options, paths)
    if options.split is None and is_picture_folder(path):
        _refuse(options, _OF_ROWS, f"{data} is a folder of pictures")
        return FolderPictures(path)
    if path.is_dir() and (paths := find_shards(path)):
        return _open_tars(options, paths)
    options.data = data
    rows = load_dataset(options)
    return RowPictures(rows, options.image_column, options.allow_urls)


def _open_tars(options: argparse.Namespace, paths: list[str]) -> Any:
    from ..captioning import TarPictures

    no_effect = {name: value for name, value in _OF_ROWS.items() if name != "image_column"}
    _refuse(options, no_effect, "Tar files have no rows")
    return TarPictures(paths, options.image_column)


def _given(options: argparse.Namespace, defaults: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}" for name, value in defaults.items() if getattr(options, name) != value]


def _refuse(options: argparse.Namespace, defaults: dict[str, Any], reason: str):
    """Refuse options that have no effect."""
    if given := _given(options, defaults):
        raise ValueError(f"{reason}: leave out {' and '.join(given)}, which would have no effect.")


def _ending(given: str | None) -> str:
    return ".txt" if given is None else given if given.startswith(".") else f".{given}"
