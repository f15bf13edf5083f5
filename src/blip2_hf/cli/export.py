"""`blip2-hf export`: the image side of a model as one graph, for serving."""

import argparse
from typing import Any

from ._common import add_command
from ._parser import file_to_write


def add_parser(commands: Any):
    text = (
        "Write the vision tower, the Q-Former and the projection of a BLIP-2 as one graph: from any number of "
        "pictures to soft prompts for its language model, or, of a model for retrieval, to features."
    )
    example = "blip2-hf export Salesforce/blip2-itm-vit-g --output encoder.onnx"
    add = add_command(
        commands,
        "export",
        _run,
        "Write the image side of a model as ONNX or .pt2.",
        text,
        check=_check,
        example=example,
    )
    add("model", "BLIP-2 or InstructBLIP: folder or id on the Hub", metavar="MODEL")
    add("--output", "the graph, a file that ends in .onnx or .pt2", required=True, type=file_to_write, metavar="FILE")
    add("--dtype", "precision; without it, the model's")
    add("--image-size")


def _check(options: argparse.Namespace):
    from ..export import check_format

    check_format(options.output)


def _run(options: argparse.Namespace):
    import torch

    from ..convert.folders import load_checkpoint
    from ..export import export_image_encoder
    from ..jobs.model_checks import check_not_quantized

    check_not_quantized(options.model, "Give the model that it was made of, whose weights are whole.")
    model, _ = load_checkpoint(options.model)
    if options.dtype is not None:
        model.to(getattr(torch, options.dtype))
    export_image_encoder(model, options.output, image_size=options.image_size)
    print(f"pixel_values -> image_features in {options.output}")
