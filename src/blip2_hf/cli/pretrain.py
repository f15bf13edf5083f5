"""`blip2-hf pretrain`: the two stages in which a BLIP-2 is made of a vision tower and a language model."""

import argparse
from typing import Any

from ._common import add_command, check_whole_model, pick
from ._parser import positive
from ._trainer_options import training_arguments
from ._training import (
    add_data_options,
    add_training_options,
    check_output,
    find_ids,
    find_image_size,
    find_text_column,
    finish,
    leave_out_bad_rows,
    open_rows,
    prefer_loss_of_few,
    prepare_rows,
    told_how_to_go_on,
)


_BERT = "google-bert/bert-base-uncased"
_IMAGE_SIZE = 224
_METRICS = {1: "mean_recall", 2: "CIDEr-D"}
_PARTS = {1: ("vision_model", "text_encoder", "model"), 2: ("stage1", "language_model", "vision_model")}
# Options of one stage alone, with what they are if they are not given
_OF_STAGE = {
    1: {
        "model": None,
        "text_encoder": None,
        "vision_feature_layer": None,
        "num_query_tokens": None,
        "query_initialization": None,
    },
    2: {"stage1": None, "language_model": None, "prompt": None, "prefix_lm": False},
}
# Not adapters: what is made here has no base model on the disk to load them with
_PRESETS = {
    1: ("stage1", "finetune", "everything"),
    2: ("stage2", "finetune", "qformer", "projection", "everything"),
}
_BOUND = (  # options that decide what is learned
    *("stage", "data", "validation", "held_out", "image_size", "image_column", "text_column", "id_column"),
    *("model", "vision_model", "text_encoder", "stage1", "language_model", "vision_feature_layer", "num_query_tokens"),
    *("query_initialization", "prompt", "prefix_lm", "max_length", "dtype", "streaming"),
)


def add_parser(commands: Any):
    text = (
        "Train stage 1 (a Q-Former learns from a frozen vision tower and texts) or stage 2 (a frozen language model "
        "reads the Q-Former). Any other option is one of transformers' TrainingArguments, such as --bf16."
    )
    example = (
        "blip2-hf pretrain pictures.parquet --stage 1 --vision-model facebook/dinov2-small --epochs 10 --output stage1"
    )
    add = add_command(
        commands, "pretrain", _run, "Make a BLIP-2 of your own parts.", text, check=_check, example=example
    )
    add_data_options(add, held_out=0.02)
    add("--text-column", "column of the captions: texts, or lists of texts (default: caption, otherwise text)")
    add("--streaming", "read the data as a stream, of which nothing is held out", action="store_true")
    add("--stage", "1 or 2", type=int, choices=[1, 2], required=True)
    tower = "tower of AutoModel, or a model with one: folder or id on the Hub; in stage 2 only if --stage1 has none"
    add("--vision-model", tower)
    add("--text-encoder", f"stage 1: BERT that the Q-Former starts from (default: {_BERT})")
    add("--model", "stage 1: trained model of stage 1 to go on from, in place of --vision-model")
    add("--vision-feature-layer", "stage 1: index into the tower's hidden states", type=int, metavar="N")
    add("--num-query-tokens", "stage 1: number of queries (default: 32)", type=positive, metavar="N")
    start = "stage 1: how the queries start: as BERT's words, or from N(0, 0.02) as in the paper (default: words)"
    add("--query-initialization", start, choices=["words", "normal"])
    add("--stage1", "stage 2: model of stage 1 to go on from")
    add("--language-model", "stage 2: any causal or sequence-to-sequence language model")
    presets = [*dict.fromkeys(_PRESETS[1] + _PRESETS[2])]
    add("--preset", "which parts are trained (default: those of the paper's stage)", group="training", choices=presets)
    add("--prompt", "stage 2: text in front of the captions (default: none)")
    add("--prefix-lm", "stage 2: give the beginning of each text, and learn the rest", action="store_true")
    add("--max-length", "the most tokens of a text that are learned", type=positive, default=32)
    size = "side in pixels of the square that pictures are scaled to"
    add("--image-size", f"{size} (default: {_IMAGE_SIZE}; with --model, that of the checkpoint)")
    add("--dtype", "stage 2: dtype of the language model", default="bfloat16")
    add_training_options(add)


def _run(options: argparse.Namespace):
    from transformers import set_seed

    from ..jobs.model_checks import check_checkpoint

    if options.stage == 2:
        check_checkpoint(options.stage1)
    arguments = _arguments(options)
    rows = open_rows(options)
    text_column = find_text_column(options, rows["train"])
    needed = {"--image-column": options.image_column, "--text-column": text_column}
    rows = prepare_rows(options, rows, needed, text_column, options.stage == 1)
    data = _make_pairs(options, rows, text_column)
    set_seed(options.seed)

    from ..data import check_feature_settings
    from ..training import make_trainer, save_result, train_from_last_checkpoint
    from ..training.sharding import made_whole

    with made_whole(arguments):
        model, processor, collator = (_make_stage1 if options.stage == 1 else _make_stage2)(options, data)

    check_feature_settings(model.config, options.data, options.validation)
    if options.skip_bad_rows:
        if options.streaming and options.stage == 2:
            data["train"].check = collator.check
        data = leave_out_bad_rows(options, data, collator)
    prefer_loss_of_few(arguments, data["validation"], _METRICS[options.stage])
    metrics = _metrics(options, arguments, processor, data["validation"])
    patience = options.early_stopping
    trainer = make_trainer(
        model,
        processor,
        arguments,
        **data,
        collator=collator,
        compute_metrics=metrics,
        early_stopping_patience=patience,
    )
    with told_how_to_go_on(options):
        train_from_last_checkpoint(trainer, pick(options, *_BOUND), models=_PARTS[options.stage])
    if data["validation"] is not None and arguments.eval_strategy == "no":
        trainer.evaluate()
    if options.stage == 1 and options.vision_model is not None and not model.config.has_vision_tower:
        model.attach_vision_tower(options.vision_model)  # stored features have taken its place; what is next has none
    save_result(trainer)
    next_commands = {
        1: f"blip2-hf pretrain DATA --stage 2 --stage1 {options.output} --language-model MODEL --output FOLDER",
        2: f"blip2-hf finetune DATA --model {options.output} --output FOLDER",
    }
    finish(trainer, options.output, next_commands[options.stage])


def _check(options: argparse.Namespace):
    other = 3 - options.stage
    if wrong := [name for name, unset in _OF_STAGE[other].items() if getattr(options, name) != unset]:
        raise ValueError(
            f"--{wrong[0].replace('_', '-')} goes with --stage {other}, not with --stage {options.stage}."
        )
    if options.stage == 2 and None in (options.stage1, options.language_model):
        raise ValueError("--stage 2 needs --stage1, a model of stage 1, and --language-model.")
    if options.stage == 1 and (options.vision_model is None) == (options.model is None):
        raise ValueError("--stage 1 needs --vision-model, to begin, or --model, to go on from a trained model.")
    if options.preset not in (None, *(presets := _PRESETS[options.stage])):
        expected = ", ".join(presets)
        raise ValueError(f"--preset {options.preset}: with --stage {options.stage}, one of {expected} was expected.")
    if "{}" in (options.prompt or ""):
        raise ValueError("--prompt: {} stands for a question, and captions have none. Leave it out.")
    if options.streaming and options.epochs is not None:
        raise ValueError("--epochs: the length of a stream is not known. Give --max-steps.")
    if options.model is not None:
        parts = ("text_encoder", "vision_feature_layer", "num_query_tokens", "query_initialization")
        if given := [name for name in parts if getattr(options, name) is not None]:
            raise ValueError(f"--{given[0].replace('_', '-')}: --model has its own. Leave one of the two out.")
    check_output(options)


def _arguments(options: argparse.Namespace) -> Any:
    from ..training import Stage1Arguments, Stage2Arguments

    defaults = {"metric_for_best_model": _METRICS[options.stage], "predict_with_generate": options.stage == 2}
    if options.preset is not None:
        defaults["preset"] = options.preset
    return training_arguments(options, Stage1Arguments if options.stage == 1 else Stage2Arguments, **defaults)


def _make_pairs(options: argparse.Namespace, rows: dict[str, Any], text_column: str) -> dict[str, Any]:
    from ..data import ImageTextPairs, check_feature_size
    from ..jobs.model_checks import LEARNING_TO_MATCH
    from ..training import training_pairs

    if options.model is not None:
        _, processor = check_whole_model(options.model, LEARNING_TO_MATCH)
        options.image_size = find_image_size(options, processor)
    options.image_size = options.image_size or _IMAGE_SIZE
    check_feature_size(options.image_size, options.data, options.validation)
    columns = pick(options, "image_column", "allow_urls") | {"text_column": text_column}
    learning: dict[str, Any] = {}
    train, validation = rows["train"], rows["validation"]
    ids = find_ids(options, train, validation) if options.stage == 1 else [{}, {}]
    if options.stage == 2:
        columns["prompt"] = options.prompt or ""
        learning["prefix_lm"] = options.prefix_lm
    if options.streaming:
        learning["skip_broken"] = options.skip_bad_rows
    return {
        "train": training_pairs(train, options.image_size, options.seed, **columns, **ids[0], **learning),
        "validation": None if validation is None else ImageTextPairs(validation, train=False, **columns, **ids[1]),
    }


def _make_stage1(options: argparse.Namespace, data: dict[str, Any]) -> tuple[Any, Any, Any]:
    from ..data import ImageTextCollator
    from ..training import load_stage1, make_stage1

    if options.model is not None:
        model, processor = load_stage1(options.model, options.image_size)
    else:
        given = pick(options, "vision_feature_layer", "num_query_tokens", "query_initialization")
        kwargs = {name: value for name, value in given.items() if value is not None}
        kwargs["load_vision_tower"] = not data["train"].has_features
        text_encoder = options.text_encoder or _BERT
        model, processor = make_stage1(options.vision_model, text_encoder, options.image_size, **kwargs)
    return model, processor, ImageTextCollator(processor, max_length=options.max_length)


def _make_stage2(options: argparse.Namespace, data: dict[str, Any]) -> tuple[Any, Any, Any]:
    from ..data import LanguageModelCollator
    from ..training import make_stage2

    parts = pick(options, "stage1", "language_model", "image_size", "vision_model")
    model, processor = make_stage2(**parts, language_model_dtype=options.dtype, max_new_tokens=options.max_length)
    return model, processor, LanguageModelCollator(processor, max_length=options.max_length)


def _metrics(options: argparse.Namespace, arguments: Any, processor: Any, validation: Any) -> Any:
    from ..evaluation import GeneratedTextMetrics, contrastive_retrieval_metrics
    from ..evaluation.metrics import caption_metrics

    if options.stage == 1:
        return contrastive_retrieval_metrics
    return (
        None
        if validation is None or not arguments.predict_with_generate
        else GeneratedTextMetrics(processor, validation, caption_metrics)
    )
