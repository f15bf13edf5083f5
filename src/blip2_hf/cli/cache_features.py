"""`blip2-hf cache-features`: the output of a frozen tower, computed once and stored."""

import argparse
from typing import Any

from ._common import DTYPES, add_command, check_output_apart, load_dataset, option_group, pick, processes
from ._parser import at_least_zero, positive


def add_parser(commands: Any):
    text = "Store the output of a frozen vision tower for the pictures of a dataset, so that training never runs it."
    example = "blip2-hf cache-features pictures.parquet --vision-model facebook/dinov2-small --output features"
    add = add_command(commands, "cache-features", _run, text, check=_check, example=example)
    add("data")
    add("--output", "folder of the features; run again to go on", required=True)
    add("--config")
    add("--split")
    add("--image-column")
    add("--image-root")
    group = option_group(commands.choices["cache-features"], "--model")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="BLIP-2 whose tower is taken: folder or id on the Hub")
    source.add_argument("--vision-model", help="any tower of AutoModel: folder or id on the Hub")
    add("--vision-feature-layer", "with --vision-model: index into its hidden states, not its last output", type=int)
    add("--tower-dtype", "dtype of the tower; without it, that of the checkpoint", choices=DTYPES)
    add("--device")
    add("--size", "side in pixels of the square that pictures are scaled to", type=positive, default=224)
    add("--num-frames", "frames of a video that the model reads, spread evenly (default: 4)")
    add("--views", "versions of each picture: itself, then random crops", type=positive, default=1)
    add("--dtype", "dtype of the features", default="bfloat16")
    add("--batch-size", default=32)
    add("--rows-per-shard")
    add("--seed", "seed of the crops", type=at_least_zero, default=0)
    add("--num-workers")
    add("--skip-broken", "leave out pictures that can't be read", action="store_true")
    add("--allow-urls")
    add("--part-index", "number of this command, if several share the work", type=at_least_zero, default=0)
    add("--num-parts", "number of commands that share the work", type=positive, default=1)


def _check(options: argparse.Namespace):
    if options.model is not None and options.vision_feature_layer is not None:
        raise ValueError("--vision-feature-layer goes with --vision-model, because a BLIP-2 has its own.")
    check_output_apart(options)


def _run(options: argparse.Namespace):
    with processes(options.device) as state:
        _cache(options, state)
        state.wait_for_everyone()
        if state.is_main_process:
            others = "" if options.num_parts == 1 else ", once the other parts are written"
            print(f"The features are in {options.output}. Next{others}: blip2-hf pretrain {options.output} ...")


def _cache(options: argparse.Namespace, state: Any):
    import torch

    from ..data import RandomResizedCropAndFlip, VisionTower, cache_features, with_image_size, with_picture_ids
    from ..jobs.inference import check_finite, load_model
    from ..jobs.model_checks import check_checkpoint, load_image_processor
    from ..models.backbones import load_tower_config
    from ..models.modeling_base import Blip2Model
    from ..models.video_loading import NUM_FRAMES

    name = options.model or options.vision_model
    if options.model is not None:
        check_checkpoint(name)
    else:
        load_tower_config(name)
    image_processor = with_image_size(load_image_processor(name), options.size)
    # The pictures, by which rows are told apart in training, are not in the result
    dataset = with_picture_ids(load_dataset(options), options.image_column)
    if options.model is not None:
        model = load_model(Blip2Model, name, "A BLIP-2")
    else:
        model = VisionTower(name, options.vision_feature_layer)
        check_finite(model, name)
    model.to(options.device or state.device, options.tower_dtype and getattr(torch, options.tower_dtype))
    names = ("image_column", "views", "dtype", "batch_size", "rows_per_shard", "seed", "num_workers", "skip_broken")
    cache_features(
        dataset,
        model,
        image_processor,
        options.output,
        transform=RandomResizedCropAndFlip(options.size) if options.views > 1 else None,
        **pick(options, *names, "allow_urls"),
        num_frames=options.num_frames or NUM_FRAMES,
        # Each process takes a share of the part of this command
        part_index=options.part_index * state.num_processes + state.process_index,
        num_parts=options.num_parts * state.num_processes,
    )
