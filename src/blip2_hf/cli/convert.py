"""`blip2-hf convert`: a checkpoint of the authors' code or of transformers into one of ours, and back."""

import argparse
import os
from typing import Any

from ._common import add_command


_BERT = "google-bert/bert-base-uncased"
_PARTS = ("vision_model", "language_model", "tokenizer")


def add_parser(commands: Any):
    text = (
        "Convert a checkpoint of LAVIS, the authors' code, or of transformers' BLIP-2 or InstructBLIP into one of "
        "this library, or, with --transformers, into one of transformers, which vLLM and others read too."
    )
    example = "blip2-hf convert Salesforce/blip2-opt-2.7b --output blip2-opt-2.7b --dtype bfloat16"
    add = add_command(
        commands, "convert", _run, "Convert a checkpoint from or to another code.", text, example=example
    )
    commands.choices["convert"].set_defaults(takes_files=True)
    add("source", "file of LAVIS, or folder or id on the Hub with a BLIP-2 or an InstructBLIP", metavar="SOURCE")
    add("--output", "the folder that is written", required=True)
    add("--vision-model", "tower that a file of LAVIS lacks: eva_vit_g.pth, clip_vit_L.pth, folder or id", metavar="X")
    add("--language-model", "language model that a file of LAVIS lacks: folder or id", metavar="Y")
    add("--tokenizer", f"for a file of LAVIS (default: the language model's; without one, {_BERT})", metavar="Z")
    add("--transformers", "write the format of transformers' own BLIP-2 (or InstructBLIP)", action="store_true")
    add("--dtype", "precision of all weights; without it, each stays as it is")
    add("--image-size", "side in pixels of the square that pictures are scaled to; positions are interpolated to it")
    add("--max-shard-size", "size of a file of weights", default="5GB", metavar="SIZE")
    add("--overwrite", "replace DIR if it holds a model", action="store_true")


def _run(options: argparse.Namespace):
    from ..convert.folders import check_output, whole_folder
    from ..jobs.names import check_model_name

    is_file = os.path.isfile(options.source)
    if not is_file:
        check_model_name(options.source)
    parts = {name: value for name in _PARTS if (value := getattr(options, name)) is not None}
    if parts and not is_file:
        raise ValueError(f"--{[*parts][0].replace('_', '-')} goes with a file of LAVIS.")
    check_output(options.output, options.overwrite, [options.source, *parts.values()])
    model, processor = (_from_lavis if is_file else _from_folder)(options)
    _adjust(model, processor, options)
    with whole_folder(options.output) as folder:
        _save(model, processor, folder, options)
    size = model.config.vision_config.image_size
    print(f"{type(model).__name__.replace('Blip2Hf', 'Blip2')} for pictures of {size} pixels in {options.output}")


def _from_lavis(options: argparse.Namespace) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    from ..convert.lavis import load_lavis_checkpoint
    from ..convert.processors import lavis_processor

    def load_tokenizer(name: str) -> Any:
        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"no tokenizer comes from {name}: give one as --tokenizer. ({error})") from error

    name = options.tokenizer or options.language_model
    tokenizer = None if name is None else load_tokenizer(name)
    model, report = load_lavis_checkpoint(
        options.source,
        language_model=options.language_model,
        vision_model=options.vision_model,
        tokenizer=None if options.language_model is None else tokenizer,
        output_loading_info=True,
    )
    print(report)
    reads_question = model.config.text_config is not None and model.config.qformer_config.use_qformer_text_input
    bert_tokenizer = load_tokenizer(_BERT) if reads_question else None
    return model, lavis_processor(model.config, tokenizer or load_tokenizer(_BERT), bert_tokenizer)


def _from_folder(options: argparse.Namespace) -> tuple[Any, Any]:
    from ..convert.folders import load_checkpoint
    from ..convert.processors import load_processor

    model, left = load_checkpoint(options.source)
    if left:
        print(f"Left, because the model has no place for them ({len(left)}):", *left, sep="\n  ")
    try:
        return model, load_processor(options.source, model.config)
    except (OSError, ValueError) as error:
        print(f"No processor is written, because {options.source} has none. ({error})")
        return model, None


def _adjust(model: Any, processor: Any, options: argparse.Namespace):
    """Change the precision and the image size."""
    import torch

    from ..convert.processors import image_processor_of_size
    from ..convert.towers import resize_tower
    from ..models.modeling_vision import Blip2VisionModel

    if options.dtype is not None:
        model.to(getattr(torch, options.dtype))
    if options.image_size is None:
        return
    if not isinstance(model.vision_model, Blip2VisionModel):
        raise ValueError("--image-size goes with the towers of the paper; another tower has sizes of its own.")
    resize_tower(model.vision_model, options.image_size)
    model.config.vision_config.image_size = options.image_size
    if processor is not None:
        processor.image_processor = image_processor_of_size(options.image_size)


def _save(model: Any, processor: Any, folder: Any, options: argparse.Namespace):
    from ..convert.instructblip import save_instructblip_checkpoint
    from ..convert.processors import save_for_transformers

    size = options.max_shard_size
    if not options.transformers:
        model.save_pretrained(folder, max_shard_size=size)
    elif model.config.text_config is not None and model.config.qformer_config.use_qformer_text_input:
        save_instructblip_checkpoint(model, folder, max_shard_size=size)
    else:
        if model._parts_not_in_transformers:
            print(f"left, because transformers has no place for it: {', '.join(model._parts_not_in_transformers)}")
        model.save_pretrained(folder, transformers_compatible=True, max_shard_size=size)
    if processor is not None:
        save_for_transformers(processor, folder) if options.transformers else processor.save_pretrained(folder)
