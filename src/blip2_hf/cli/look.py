"""`blip2-hf look`: where in a picture is what a text says?"""

import argparse
import math
from pathlib import Path
from typing import Any

from ._common import add_command, check_png, find_device, save_png
from ._parser import at_least_zero, file_to_write


_GAP = 8  # pixels between pictures
_MOST_PIXELS = 8_000_000  # of a sheet, unless its full size is asked for


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
    add("--full-size", "keep the picture's size, also if the sheet has more than 8 megapixels", action="store_true")
    add("--image-size")
    add("--dtype")
    add("--device")


def _check(options: argparse.Namespace):
    check_png(options.output)
    if options.per_word and options.text is None:
        raise ValueError("--per-word goes with TEXT.")
    if options.text is not None and not options.text.strip():
        raise ValueError(
            "TEXT is empty: give a word or a sentence, or leave it out to see what the queries attend to."
        )


def _run(options: argparse.Namespace):
    from ..jobs.model_checks import MATCHING, check_checkpoint
    from ..models.image_loading import check_reads_8_bit, load_image

    picture = load_image(options.picture)
    advice = ", or leave out TEXT to draw what the queries attend to"
    check_checkpoint(options.model, None if options.text is None else MATCHING, advice)
    image_processor = _load_image_processor(options)
    model, processor = _load_model(options)
    check_reads_8_bit(image_processor)
    inputs = image_processor(images=[picture], return_tensors="pt").to(model.device, model.dtype)
    titles, heat_maps = _maps(options, model, processor, inputs["pixel_values"])
    sheet = draw_sheet(picture, heat_maps, titles, math.inf if options.full_size else _MOST_PIXELS)
    save_png(sheet, Path(options.output))
    print("\n".join([*titles, f"drawn in {options.output}"]))


def _load_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """Load a model or, if there is a text, one with heads for matching and its processor."""
    from ..jobs.inference import load_model
    from ..models.modeling_base import Blip2Model
    from ..retrieval.loading import load_retrieval_model

    if options.text is None:
        model = load_model(Blip2Model, options.model, "A BLIP-2", dtype=options.dtype or "auto")
        return model.to(find_device(options.device)), None
    return load_retrieval_model(options.model, options.device, options.dtype)


def _load_image_processor(options: argparse.Namespace) -> Any:
    """Load one that scales the whole picture to the size that the model reads, and cuts nothing off."""
    from ..data.image_size import own_image_size, with_image_size
    from ..jobs.model_checks import load_image_processor

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


def draw_sheet(picture: Any, heat_maps: Any, titles: list[str], most_pixels: float = _MOST_PIXELS) -> Any:
    """Draw each map over the picture, side by side, below its title. The picture shrinks if the sheet is too large."""
    from PIL import Image, ImageDraw

    from ..attention_maps import overlay

    size = picture.size
    step, margin, font = _layout(size, titles)
    while (pixels := step * len(titles) * (size[1] + margin)) > most_pixels:
        scale = 0.99 * math.sqrt(most_pixels / pixels)
        size = max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
        step, margin, font = _layout(size, titles)
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", (step * len(titles) - _GAP, size[1] + margin), "white")
    for number, (heat_map, title) in enumerate(zip(heat_maps, titles, strict=True)):
        sheet.paste(overlay(picture, heat_map), (number * step, margin))
        ImageDraw.Draw(sheet).text((number * step + 2, margin // 5), title, fill="black", font=font)
    return sheet


def _layout(size: tuple[int, int], titles: list[str]) -> tuple[int, int, Any]:
    """Return the width of a picture with its gap, the height above it, and the font of its title."""
    from PIL import ImageFont

    letters = max(12, round(math.sqrt(size[0] * size[1]) / 25))
    font = ImageFont.load_default(letters)
    return max(size[0], *(math.ceil(font.getlength(title)) for title in titles)) + _GAP, 2 * letters, font
