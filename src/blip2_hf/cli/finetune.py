"""`blip2-hf finetune`: a trained BLIP-2 learns from pictures with texts of one's own."""

import argparse
import shlex
from dataclasses import dataclass
from typing import Any

from ._common import add_command, check_whole_model, pick
from ._generation import check_room
from ._quantization import check_width, quantization_bits
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


_ADAPTERS = ("lora_language_model", "lora_qformer", "lora_vision_model")
_PRESETS = (*_ADAPTERS, "finetune", "stage1", "stage2", "qformer", "projection", "everything")
_RATE_OF_ADAPTERS = 1e-4
_RETRIEVAL_IMAGE_SIZE = 364
# Options of some tasks alone, with what they are if they are not given
_OF_TASKS: dict[str, tuple[tuple[str, ...], Any]] = {
    "text_column": (("caption", "retrieval"), None),
    "question_column": (("vqa",), "question"),
    "answer_column": (("vqa",), "answer"),
    "prompt": (("caption", "vqa"), None),
    "max_new_tokens": (("caption", "vqa"), None),
    "num_frames": (("caption", "vqa"), None),
}
_BOUND = (  # options that decide what is learned
    *("task", "model", "data", "validation", "held_out", "image_size", "prompt", "image_column", "text_column"),
    *("question_column", "answer_column", "id_column", "dtype", "load_in_4bit", "load_in_8bit", "num_frames"),
)


@dataclass(frozen=True)
class _Task:
    """A task: its metric, its preset, and what is done with the model next."""

    metric: str
    preset: str
    prompt: str | None
    max_new_tokens: int
    flip: float
    next_command: str


_TASKS = {
    "caption": _Task("CIDEr-D", "lora_language_model", "a photo of", 30, 0.5, "blip2-hf caption FOLDER --model {}"),
    "vqa": _Task(
        "vqa_accuracy",
        "lora_language_model",
        "Question: {} Answer:",
        10,
        0.0,
        "blip2-hf ask PICTURE QUESTION --model {}",
    ),
    "retrieval": _Task("mean_recall", "finetune", None, 0, 0.5, "blip2-hf index FOLDER --model {}"),
}


def add_parser(commands: Any):
    text = (
        "Fine-tune a BLIP-2 on pictures with captions, with questions and answers, or for retrieval. Any other option "
        "is one of transformers' TrainingArguments, such as --bf16 and --gradient-checkpointing."
    )
    example = "blip2-hf finetune photos --model Salesforce/blip2-opt-2.7b --output my-captioner"
    add = add_command(
        commands, "finetune", _run, "Fine-tune a BLIP-2 on your own data.", text, check=_check, example=example
    )
    add_data_options(add, held_out=0.1)
    add("--text-column", "column of the captions: texts, or lists of texts (default: caption, otherwise text)")
    add("--question-column", "column of the questions (default: question)")
    add("--answer-column", "column of an answer, or of a list (default: answer)")
    add("--model", "BLIP-2 to start from, for retrieval one of stage 1: folder or id on the Hub", required=True)
    add("--task", "what is learned", choices=[*_TASKS], default="caption")
    preset = "which parts are trained (default: adapters in the language model; for retrieval, finetune)"
    add("--preset", preset, group="training", choices=_PRESETS)
    add("--load-in-4bit")
    add("--load-in-8bit")
    add(
        "--prompt",
        "text in front of a caption, or with {} for the question (default: that which the model has learned with, or "
        "'a photo of'; 'Question: {} Answer:')",
    )
    add("--max-new-tokens", "the most tokens that are written, in validation (default: 30; 10 for answers)")
    square = "side in pixels of the square that pictures are scaled to"
    add("--image-size", f"{square}; without it, that of the checkpoint, or 364 for retrieval")
    add("--num-frames")
    add("--dtype", "dtype of the language model", default="bfloat16")
    add_training_options(add)
    add("--merge", "write the whole model, with the adapters added to its weights", action="store_true")


def _run(options: argparse.Namespace):
    task = _TASKS[options.task]
    arguments = _arguments(options, task)
    config, processor = _check_model(options)
    if options.task != "retrieval":
        options.prompt = _own_prompt(options, task, processor) if options.prompt is None else options.prompt
        _check_language_model(options, task, config, processor)
    data, image_size = _read(options, task, processor)
    load = _load_retriever if options.task == "retrieval" else _load_writer

    from ..data import check_feature_settings
    from ..training import make_trainer, save_result, train_from_last_checkpoint
    from ..training.sharding import made_whole

    with made_whole(arguments):
        model, processor, collator = load(options, task, config, image_size)

    check_feature_settings(model.config, options.data, options.validation)
    if options.skip_bad_rows:
        data = leave_out_bad_rows(options, data, collator)
    prefer_loss_of_few(arguments, data["validation"], task.metric)
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
        train_from_last_checkpoint(trainer, pick(options, *_BOUND), models=["model"])
    save_result(trainer, merge=options.merge)
    finish(trainer, options.output, task.next_command.format(shlex.quote(options.output)))


def _check_model(options: argparse.Namespace) -> tuple[Any, Any]:
    from ..jobs.model_checks import LEARNING_TO_MATCH, WRITING

    if options.task == "retrieval":
        return check_whole_model(options.model, LEARNING_TO_MATCH)
    stage2 = f"blip2-hf pretrain DATA --stage 2 --stage1 {options.model} --language-model MODEL --output FOLDER"
    return check_whole_model(options.model, WRITING, f", or make one: {stage2}")


def _own_prompt(options: argparse.Namespace, task: _Task, processor: Any) -> str | None:
    """Return the prompt that a model has learned with, or else the paper's."""
    from ..models.processing_blip2 import IMAGE_TOKEN, learned_prompt

    learned = learned_prompt(processor, asks=options.task == "vqa")
    # Pairs have the picture in front
    return task.prompt if learned is None or IMAGE_TOKEN in learned else learned


def _check_language_model(options: argparse.Namespace, task: _Task, config: Any, processor: Any):
    """Refuse more new tokens than the language model has room for, and 4 bits of one that is too narrow for them."""
    new = {"max_new_tokens": options.max_new_tokens or task.max_new_tokens}
    check_room(config, new, len(processor.tokenizer(options.prompt).input_ids))
    check_width(quantization_bits(options), language_model=config.text_config)


def _check(options: argparse.Namespace):
    task = _TASKS[options.task]
    for name, (tasks, default) in _OF_TASKS.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif options.task not in tasks:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} goes with --task {' and '.join(tasks)}, not with --task {options.task}.")
    if options.prompt is not None and ("{}" in options.prompt) != (options.task == "vqa"):
        raise ValueError(
            "--prompt: {} stands for the question, so --task vqa needs it, and --task caption has no question. "
            f"{options.prompt!r} was given."
        )
    options.preset = options.preset or task.preset
    is_retrieval, has_adapters = options.task == "retrieval", options.preset in _ADAPTERS
    is_quantized = options.load_in_4bit or options.load_in_8bit
    if is_quantized and (is_retrieval or not has_adapters):
        raise ValueError(
            "--load-in-4bit and --load-in-8bit go with adapters, because nothing else of such a model is saved: give "
            f"--preset {' or '.join(_ADAPTERS)}, and a task with a language model."
        )
    if options.merge and (not has_adapters or is_quantized):
        reason = "are not merged into 4 or 8 bits, which would round them" if is_quantized else "are not trained here"
        raise ValueError(f"--merge: adapters {reason}. Leave --merge out.")
    if options.merge and options.push_to_hub:
        raise ValueError("--push-to-hub pushes adapters, and --merge writes the whole model: give one of the two.")
    without = ("stage2", "qformer", "projection", "lora_language_model") if is_retrieval else ("stage1",)
    if options.preset in without:
        raise ValueError(f"--preset {options.preset} is not for the task {options.task}.")
    quantization_bits(options)
    check_output(options)


def _arguments(options: argparse.Namespace, task: _Task) -> Any:
    from ..training import FineTuningArguments, RetrievalArguments

    defaults: dict[str, Any] = {"preset": options.preset, "metric_for_best_model": task.metric}
    if options.preset in _ADAPTERS:
        defaults |= {"learning_rate": _RATE_OF_ADAPTERS, "warmup_steps": 0.1}
    if options.preset not in ("finetune", "everything"):
        defaults["vision_layer_decay"] = 1.0
    if options.validation is None and options.held_out == 0:
        defaults |= {"eval_strategy": "no", "load_best_model_at_end": False}
    kind = RetrievalArguments if options.task == "retrieval" else FineTuningArguments
    return training_arguments(options, kind, **defaults)


def _read(options: argparse.Namespace, task: _Task, processor: Any) -> tuple[dict[str, Any], int]:
    """Return the pairs to learn from and to validate on, and the size of their pictures."""
    from ..data import ImageTextPairs, check_feature_size
    from ..training import training_pairs

    rows = open_rows(options)
    columns = pick(options, "image_column", "allow_urls")
    needed = {"--image-column": options.image_column}
    if options.task == "vqa":
        needed |= {"--question-column": options.question_column, "--answer-column": options.answer_column}
        columns |= {"prompt_column": options.question_column, "text_column": options.answer_column}
    else:
        columns["text_column"] = needed["--text-column"] = find_text_column(options, rows["train"])
    rows = prepare_rows(options, rows, needed, columns["text_column"], options.task == "retrieval")
    if options.task == "retrieval":
        options.image_size = options.image_size or _RETRIEVAL_IMAGE_SIZE
    else:
        columns |= {"prompt": options.prompt, "num_frames": options.num_frames or processor.frames_per_video}
    image_size = find_image_size(options, processor)
    check_feature_size(image_size, options.data, options.validation)
    train, validation = rows["train"], rows["validation"]
    ids = find_ids(options, train, validation) if options.task == "retrieval" else [{}, {}]
    data = {
        "train": training_pairs(train, image_size, options.seed, task.flip, **columns, **ids[0]),
        "validation": None if validation is None else ImageTextPairs(validation, train=False, **columns, **ids[1]),
    }
    if data["train"].has_features and options.num_frames not in (None, data["train"].frames_per_video):
        raise ValueError(
            f"--num-frames {options.num_frames}: {options.data} has stored features, of "
            f"{data['train'].frames_per_video or 1} frames each. Leave --num-frames out, or store features of as many."
        )
    if data["train"].has_features and options.preset in ("finetune", "everything", "lora_vision_model"):
        preset = "stage1" if options.task == "retrieval" else "lora_language_model"
        raise ValueError(
            f"{options.data} has stored features, which need a frozen tower, and --preset {options.preset} trains it. "
            f"Give --preset {preset}, or pictures."
        )
    return data, image_size


def _load_writer(options: argparse.Namespace, task: _Task, config: Any, image_size: int) -> tuple[Any, Any, Any]:
    from ..data import LanguageModelCollator
    from ..training import load_writer

    bits = quantization_bits(options)
    max_new_tokens = options.max_new_tokens or task.max_new_tokens
    model, processor = load_writer(options.model, image_size, options.dtype, max_new_tokens, bits)
    collator = LanguageModelCollator(
        processor,
        max_positions=getattr(config.text_config, "max_position_embeddings", None),
        max_qformer_positions=config.qformer_config.max_position_embeddings,
    )
    return model, processor, collator


def _load_retriever(options: argparse.Namespace, task: _Task, config: Any, image_size: int) -> tuple[Any, Any, Any]:
    from ..data import ImageTextCollator
    from ..training import load_stage1

    model, processor = load_stage1(options.model, image_size)
    return model, processor, ImageTextCollator(processor)


def _metrics(options: argparse.Namespace, arguments: Any, processor: Any, validation: Any) -> Any:
    from ..evaluation import GeneratedTextMetrics, contrastive_retrieval_metrics, score_answers
    from ..evaluation.metrics import caption_metrics

    if options.task == "retrieval":
        return contrastive_retrieval_metrics
    score = score_answers if options.task == "vqa" else caption_metrics
    return (
        None
        if validation is None or not arguments.predict_with_generate
        else GeneratedTextMetrics(processor, validation, score)
    )
