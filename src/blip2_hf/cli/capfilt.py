"""`blip2-hf capfilt`: captions that a model proposes, ranked together with those that pictures came with."""

import argparse
import sys
from typing import Any

from ._common import add_command, check_output_apart, load_captioner, load_dataset, pick, processes
from ._generation import check_generation, check_room, given_generation
from ._parser import at_least_zero, positive


def add_parser(commands: Any):
    text = "Propose captions of pictures, rank them together with those that are there, and keep the best (CapFilt)."
    example = (
        "blip2-hf capfilt pictures.parquet --captioner Salesforce/blip2-opt-2.7b --filter "
        "Salesforce/blip2-itm-vit-g --output filtered"
    )
    add = add_command(commands, "capfilt", _run, text, f"{text} Run again to go on.", check=_check, example=example)
    add("data")
    add("--captioner", "writes captions: a BLIP-2, or what pipeline('image-to-text') loads", metavar="MODEL")
    add("--filter", "ranks them: a model of stage 1 or for retrieval", required=True, metavar="MODEL")
    add("--output", "folder of the result; run again to go on", required=True)
    add("--image-column")
    add("--image-root")
    add(
        "--text-column",
        "column of the existing captions, texts or lists of texts; without it caption, if there is one",
    )
    add(
        "--num-captions",
        "captions to propose for each picture; 0 ranks those that are there",
        type=at_least_zero,
        default=10,
    )
    add("--keep", "captions of a picture that are kept", type=positive, default=2)
    add("--score", "logit of matching, cosine of contrast, or their sum", choices=["sum", "itm", "itc"], default="sum")
    add("--min-score", "the lowest score that is kept", type=float)
    add(
        "--prompt",
        "text that captions go on from, 'a photo of' for example (default: that of the model's fine-tuning)",
    )
    add("--top-p", default=0.9)
    add("--max-new-tokens", default=30)
    add("--generate")
    add("--batch-size", default=16)
    add("--rows-per-shard")
    add("--seed", "seed of the sampling", type=at_least_zero, default=0)
    add("--num-workers")
    add("--dtype")
    add("--device")
    add("--config")
    add("--split")
    add("--allow-urls")
    add("--overwrite", "delete what is in the folder, and begin anew", action="store_true")


def _check(options: argparse.Namespace):
    if options.num_captions and options.captioner is None:
        raise ValueError("give --captioner, or --num-captions 0 to rank the existing captions.")
    check_output_apart(options)


def _run(options: argparse.Namespace):
    from ..capfilt import RetrievalFilter, capfilt_dataset
    from ..jobs.model_checks import MATCHING, check_checkpoint
    from ..search import load_retrieval_model

    check_checkpoint(options.filter, MATCHING)
    with processes(options.device) as state:
        device = options.device or state.device
        kwargs = _generation(options) if options.num_captions else {}
        rows = _with_captions(options, load_dataset(options))
        captioner = _open_captioner(options, device, kwargs) if options.num_captions else None
        caption_filter = RetrievalFilter(*load_retrieval_model(options.filter, device, options.dtype), options.score)
        names = ("image_column", "text_column", "keep", "min_score", "batch_size", "rows_per_shard", "seed")
        kwargs = pick(options, *names, "num_workers", "overwrite", "allow_urls")
        capfilt_dataset(rows, captioner, caption_filter, options.output, **kwargs)
        if state.is_main_process:
            print(f"Next: blip2-hf pretrain {options.output} --text-column kept_captions ...", file=sys.stderr)


def _generation(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `generate`: sampling, unless others are given."""
    kwargs = given_generation(options)
    if dict(options.generate or []).get("do_sample") is False:
        kwargs.pop("top_p", None)  # its default
    check_generation({"num_beams": 1, **kwargs}, options.captioner, options.num_captions)
    return kwargs


def _with_captions(options: argparse.Namespace, rows: Any) -> Any:
    """Return rows with a column of captions, which is empty if there are none and captions are proposed."""
    if options.text_column is None:
        options.text_column = "caption"
        if options.num_captions and "caption" not in rows.column_names:
            return rows.add_column("caption", [None] * len(rows))
    return rows


def _open_captioner(options: argparse.Namespace, device: Any, kwargs: dict[str, Any]) -> Any:
    from transformers import AutoConfig, pipeline

    from ..capfilt import ModelCaptioner, PipelineCaptioner
    from ..jobs.inference import check_finite, weights_place

    config = AutoConfig.from_pretrained(weights_place(options.captioner))
    if config.model_type in ("blip2", "blip-2"):
        check_room(config, kwargs)
        parts = load_captioner(options.captioner, options.dtype, device, is_stage1=config.text_config is None)
        return ModelCaptioner(*parts, options.num_captions, options.prompt, **kwargs)
    make_pipeline: Any = pipeline  # the types of transformers 5 do not know the task
    pipe = make_pipeline("image-to-text", model=options.captioner, device=device, dtype=options.dtype or "auto")
    check_finite(pipe.model, options.captioner)
    prompt = {} if options.prompt is None else {"prompt": options.prompt}
    return PipelineCaptioner(pipe, options.num_captions, **prompt, **kwargs)
