"""`blip2-hf cache-features`: the output of a frozen tower, computed once and stored."""

import argparse
import sys
from functools import partial
from typing import Any

from ._common import add_allow_urls, add_option, end_workers, load_dataset


def add_parser(commands: Any):
    text = "Store what a frozen vision tower makes of the pictures of a dataset, so that training never runs it."
    parser = commands.add_parser("cache-features", help=text, description=text)
    parser.set_defaults(run=_run)
    dtypes = ["bfloat16", "float16", "float32"]

    add = partial(add_option, parser)
    add("data", "folder of pictures, file (parquet, tar, json, csv, arrow), or id on the Hub", metavar="DATA")
    add("--output", "where the features go; run again to go on", required=True, metavar="FOLDER")
    add("--config", "configuration of the dataset, where it has several")
    add("--split", "split of the dataset, also `train[:1000]`", default="train")
    add("--image-column", "column of the pictures", default="image")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="BLIP-2 whose tower is taken: folder or id on the Hub")
    source.add_argument("--vision-model", help="any tower of AutoModel: folder or id on the Hub")
    add("--vision-feature-layer", "with --vision-model: index into its hidden states, not its last output", type=int)
    add("--tower-dtype", "what the tower computes in, not the dtype of its checkpoint", choices=dtypes)
    add("--device", "such as cuda:1 or cpu; without it, cuda if there is one")
    add("--size", "side in pixels of the square that pictures are scaled to", type=int, default=224)
    add("--views", "versions of each picture: itself, then random crops", type=int, default=1)
    add("--dtype", "what is stored", default="bfloat16", choices=dtypes)
    add("--batch-size", "pictures that the tower takes at a time", type=int, default=32)
    add("--rows-per-shard", "rows of a file", type=int, default=1000)
    add("--seed", "seed of the crops", type=int, default=0)
    add("--num-workers", "processes that load pictures", type=int, default=0)
    add("--skip-broken", "leave out pictures that can't be read", action="store_true")
    add_allow_urls(parser)
    add("--part-index", "number of this process, of those that share the work", type=int, default=0)
    add("--num-parts", "number of processes that share the work", type=int, default=1)


def _run(options: argparse.Namespace):
    if options.model is not None and options.vision_feature_layer is not None:
        raise SystemExit("blip2-hf: --vision-feature-layer goes with --vision-model; a BLIP-2 has its own.")
    try:
        _cache(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"blip2-hf: {error}") from error
    except KeyboardInterrupt:
        end_workers()
        print("\nInterrupted. Finished files are kept; the same command goes on with the rest.", file=sys.stderr)
        raise SystemExit(130) from None


def _cache(options: argparse.Namespace):
    import torch

    # In transformers 5.17 the name in the package itself asks for torchvision
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from ..data import RandomResizedCropAndFlip, VisionTower, cache_features, with_image_size
    from ..jobs.inference import check_finite
    from ..models.backbones import load_whole
    from ..models.modeling_base import Blip2Model

    dataset = load_dataset(options.data, options.config, options.split)
    if options.model is not None:
        model = load_whole(Blip2Model, options.model, "A BLIP-2")
    else:
        model = VisionTower(options.vision_model, options.vision_feature_layer)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device, None if options.tower_dtype is None else getattr(torch, options.tower_dtype))
    check_finite(model.vision_model, options.model or options.vision_model)
    image_processor = AutoImageProcessor.from_pretrained(options.model or options.vision_model)
    cache_features(
        dataset,
        model,
        with_image_size(image_processor, options.size),
        options.output,
        image_column=options.image_column,
        views=options.views,
        transform=RandomResizedCropAndFlip(options.size) if options.views > 1 else None,
        dtype=options.dtype,
        batch_size=options.batch_size,
        rows_per_shard=options.rows_per_shard,
        seed=options.seed,
        num_workers=options.num_workers,
        skip_broken=options.skip_broken,
        part_index=options.part_index,
        num_parts=options.num_parts,
        allow_urls=options.allow_urls,
    )
