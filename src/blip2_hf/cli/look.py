"""`blip2-hf look`: where in a picture is what a text says?"""

import argparse
from pathlib import Path
from typing import Any

from ._common import add_command, check_png, find_device, save_png
from ._parser import at_least_zero, file_to_write


def add_parser(commands: Any):
    text = "Draw over a picture where a BLIP-2 looks for a text, or, without a text, what its queries attend to."
    example = 'blip2-hf look cat.jpg "a black cat" --model Salesforce/blip2-itm-vit-g --output cat.png'
    add = add_command(commands, "look", _run, text, check=_check, example=example)
    add("picture", "file or URL", metavar="PICTURE")
    add("text", 'word or sentence, such as "a red circle"', metavar="TEXT", nargs="?")
    add("--model", "BLIP-2, for a text one that matches images with texts: folder or id on the Hub", required=True)
    add("--output", "the drawing", required=True, type=file_to_write, metavar="FILE.png")
    methods = ("gradcam", "attention")
    add("--method", "with TEXT: Grad-CAM of matching, or attention alone", default="gradcam", choices=methods)
    add(
        "--layer",
        "layer of the Q-Former, one that has cross-attention; without it, the mean of all",
        type=at_least_zero,
    )
    add("--per-word", "also draw each word of TEXT, as a text of its own", action="store_true")
    add("--image-size")
    add("--dtype")
    add("--device")


def _check(options: argparse.Namespace):
    check_png(options.output)
    if options.per_word and options.text is None:
        raise ValueError("--per-word goes with TEXT.")


def _run(options: argparse.Namespace):
    from ..attention_maps import overlay
    from ..models.image_loading import check_reads_8_bit, load_image

    picture = load_image(options.picture)
    model, processor = _load_model(options)
    image_processor = _load_image_processor(options)
    check_reads_8_bit(image_processor)
    inputs = image_processor(images=[picture], return_tensors="pt").to(model.device, model.dtype)
    titles, heat_maps = _maps(options, model, processor, inputs["pixel_values"])
    save_png(_side_by_side([overlay(picture, heat_map) for heat_map in heat_maps], titles), Path(options.output))
    print("\n".join([*titles, f"drawn in {options.output}"]))


def _load_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """Load a model or, if there is a text, one with heads for matching and its processor."""
    from ..jobs.checkpoints import MATCHING, check_checkpoint
    from ..jobs.inference import load_model
    from ..models.modeling_base import Blip2Model
    from ..retrieval.loading import load_retrieval_model

    if options.text is None:
        check_checkpoint(options.model)
        model = load_model(Blip2Model, options.model, "A BLIP-2", dtype=options.dtype or "auto")
        return model.to(find_device(options.device)), None
    check_checkpoint(options.model, MATCHING, advice=", or leave out TEXT to draw what the queries attend to")
    return load_retrieval_model(options.model, options.device, options.dtype)


def _load_image_processor(options: argparse.Namespace) -> Any:
    """Load one that scales the whole picture to the size that the model reads, and cuts nothing off."""
    from ..data.image_size import own_image_size, with_image_size
    from ..jobs.checkpoints import load_image_processor

    image_processor = load_image_processor(options.model)
    own_sides = set(own_image_size(image_processor).values())
    if options.image_size is None and len(own_sides) > 1:
        raise ValueError(f"The pictures of {options.model} are no squares: give --image-size.")
    return with_image_size(image_processor, options.image_size or own_sides.pop())


def _maps(options: argparse.Namespace, model: Any, processor: Any, pixel_values: Any) -> tuple[list[str], Any]:
    """Return titles and heat maps of the text, and of its words."""
    import torch

    from ..attention_maps import query_attention_map, text_heat_map

    if options.text is None:
        return ["queries"], query_attention_map(model, pixel_values, layer=options.layer)
    texts = [options.text, *(options.text.split() if options.per_word else [])]
    tokenizer = processor.qformer_tokenizer or processor.tokenizer
    tokens = tokenizer(texts, padding=True, split_special_tokens=True, return_tensors="pt").to(model.device)
    given = tokens["input_ids"], tokens["attention_mask"]
    heat_maps = text_heat_map(model, *given, pixel_values, method=options.method, layer=options.layer)
    with torch.inference_mode():
        probabilities = model.get_matching_logits(*given, pixel_values=pixel_values).softmax(-1)[:, 1]
    return [f"{text}: match {p:.2f}" for text, p in zip(texts, probabilities.tolist(), strict=True)], heat_maps


def _side_by_side(pictures: list[Any], titles: list[str]) -> Any:
    from PIL import Image, ImageDraw

    gap, margin = 8, 24
    draw = ImageDraw.Draw(pictures[0])
    width, height = pictures[0].size
    step = max(width, *(int(draw.textlength(title)) for title in titles)) + gap
    sheet = Image.new("RGB", (step * len(pictures) - gap, height + margin), "white")
    for number, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        sheet.paste(picture, (number * step, margin))
        ImageDraw.Draw(sheet).text((number * step + 2, 6), title, fill="black")
    return sheet
