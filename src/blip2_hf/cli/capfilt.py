"""`blip2-hf capfilt`: captions that a model proposes, ranked together with those that pictures came with."""

import argparse
import glob
from functools import partial
from pathlib import Path
from typing import Any

from ._common import add_allow_urls, add_option, generate_argument, load_captioner, load_dataset, processes


def add_parser(commands: Any):
    text = "Propose captions of pictures, rank them together with those that are there, and keep the best (CapFilt)."
    parser = commands.add_parser("capfilt", help=text, description=f"{text} Run again to go on.")
    parser.set_defaults(run=_run)

    add = partial(add_option, parser)
    kinds = "file (parquet, tar, json, csv, arrow), folder of pictures or of cached features, or id on the Hub"
    add("data", kinds, metavar="DATA")
    add("--captioner", "writes captions: a BLIP-2, or what pipeline('image-to-text') loads", metavar="MODEL")
    add("--filter", "ranks them: a model of stage 1 or for retrieval", required=True, metavar="MODEL")
    add("--output", "where the result goes; run again to go on", required=True, metavar="FOLDER")
    add("--image-column", "column of the pictures", default="image")
    add("--text-column", "column of the captions that are there: texts, or lists of texts", default="caption")
    add(
        "--num-captions",
        "captions that are proposed of each picture; 0 ranks those that are there",
        type=int,
        default=10,
    )
    add("--keep", "captions of a picture that are kept", type=int, default=2)
    add("--score", "logit of matching, cosine of contrast, or their sum", choices=["sum", "itm", "itc"], default="sum")
    add("--min-score", "the lowest score that is kept", type=float)
    add("--prompt", "text that proposed captions go on from, such as 'a photo of'")
    add("--top-p", "sample from the likeliest tokens that have this probability together", type=float, default=0.9)
    add("--max-new-tokens", "the most tokens of a proposed caption", type=int, default=30)
    others = "other arguments of generate, such as temperature=0.7, or do_sample=false num_beams=10"
    add("--generate", others, nargs="+", type=generate_argument, metavar="NAME=VALUE", default=[])
    add("--batch-size", "pictures at a time", type=int, default=16)
    add("--rows-per-shard", "rows of a file", type=int, default=1000)
    add("--seed", "seed of what is sampled", type=int, default=0)
    add("--num-workers", "processes that decode pictures", type=int, default=2)
    add("--dtype", "without it those of the checkpoints", choices=["bfloat16", "float16", "float32"])
    add("--device", "such as cuda:1 or cpu; without it a GPU if there is one, its own for each process")
    add("--config", "configuration of the dataset, where it has several")
    add("--split", "split of the dataset, also `train[:1000]`", default="train")
    add_allow_urls(parser)
    add("--overwrite", "delete what is in the folder, and begin anew", action="store_true")


def _run(options: argparse.Namespace):
    if options.num_captions and options.captioner is None:
        raise SystemExit("blip2-hf: give --captioner, or --num-captions 0 to rank the captions that are there.")

    from ..capfilt import RetrievalFilter, capfilt_dataset
    from ..search import load_retrieval_model

    with processes(options.device, "Finished files are kept; the same command goes on with the rest.") as state:
        device = options.device or state.device
        rows = _open_rows(options)
        captioner = _open_captioner(options, device) if options.num_captions else None
        model, processor = load_retrieval_model(options.filter, device, options.dtype)
        capfilt_dataset(
            rows,
            captioner,
            RetrievalFilter(model, processor, options.score),
            options.output,
            image_column=options.image_column,
            text_column=options.text_column,
            keep=options.keep,
            min_score=options.min_score,
            batch_size=options.batch_size,
            rows_per_shard=options.rows_per_shard,
            seed=options.seed,
            num_workers=options.num_workers,
            overwrite=options.overwrite,
            allow_urls=options.allow_urls,
        )


def _open_rows(options: argparse.Namespace) -> Any:
    from ..data import load_rows

    is_cached = (Path(options.data) / "cache.json").is_file()
    if is_cached or glob.has_magic(options.data):
        return load_rows(options.data, options.split)
    return load_dataset(options.data, options.config, options.split)


def _open_captioner(options: argparse.Namespace, device: Any) -> Any:
    from transformers import AutoConfig, pipeline

    from ..capfilt import ModelCaptioner, PipelineCaptioner
    from ..jobs.inference import check_finite

    kwargs = {"max_new_tokens": options.max_new_tokens, **dict(options.generate)}
    if kwargs.get("do_sample", True):
        kwargs.setdefault("top_p", options.top_p)
    config = AutoConfig.from_pretrained(options.captioner)
    if config.model_type in ("blip2", "blip-2"):
        has_language_model = config.text_config is not None
        load = load_captioner if has_language_model else _load_stage1
        model, processor = load(options.captioner, options.dtype, device)
        return ModelCaptioner(model, processor, options.num_captions, options.prompt, **kwargs)
    make_pipeline: Any = pipeline  # the types of transformers 5 do not know the task
    pipe = make_pipeline("image-to-text", model=options.captioner, device=device, dtype=options.dtype or "auto")
    check_finite(pipe.model, options.captioner)
    prompt = {} if options.prompt is None else {"prompt": options.prompt}
    return PipelineCaptioner(pipe, options.num_captions, **prompt, **kwargs)


def _load_stage1(name: str, dtype: str | None, device: Any) -> tuple[Any, Any]:
    """Load the model of stage 1, which writes with its Q-Former, and its processor."""
    from ..jobs.inference import load_model
    from ..models.modeling_pretraining import Blip2ForPreTraining
    from ..models.processing_blip2 import Blip2Processor

    expected = "A model that writes text, of Blip2ForConditionalGeneration or Blip2ForPreTraining,"
    model = load_model(Blip2ForPreTraining, name, expected, dtype=dtype or "auto")
    return model.to(device), Blip2Processor.from_pretrained(name)
