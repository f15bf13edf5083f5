"""`blip2-hf evaluate`: the paper's benchmarks, and datasets of one's own."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..models.generation_presets import NORMALIZATIONS, PRESET_NAMES, GenerationPreset, generation_preset
from ._common import (
    add_command,
    check_columns,
    check_output_apart,
    load_captioner,
    load_dataset,
    pick,
    processes,
    tell_image_size,
)
from ._generation import NORMALIZATION_HELP, check_generation, check_room, generation_with_preset, given_generation
from ._parser import at_least_zero, positive
from ._quantization import quantization_bits


@dataclass(frozen=True)
class _Task:
    """One task: its kind, the options that name its data, its settings of generation, the protocols of its answers."""

    kind: str
    needs: tuple[str, ...]
    preset: str | None = None
    protocols: tuple[str, ...] = ()
    protocol: str | None = None  # without one, the answers choose
    lemmatize: bool = False


_VQA_PROTOCOLS = ("official", "lavis", "exact")
_GQA_PROTOCOLS = ("normalized", "strict")
_YES_NO_PROTOCOLS = ("pope",)
_RETRIEVAL_IMAGE_SIZE = 364
_COMMON = ("image_size", "batch_size", "num_workers")  # arguments of all evaluations
_TASKS = {
    "coco-caption": _Task("caption", ("annotations", "images"), "caption"),
    "nocaps": _Task("caption", ("annotations", "images"), "nocaps"),
    "vqav2": _Task("vqa", ("questions", "images"), "vqa", _VQA_PROTOCOLS),
    "okvqa": _Task("vqa", ("questions", "images"), "vqa", _VQA_PROTOCOLS, lemmatize=True),
    "gqa": _Task("vqa", ("questions", "images"), "vqa", _GQA_PROTOCOLS, "normalized"),
    "pope": _Task("vqa", ("questions", "images"), "vqa", _YES_NO_PROTOCOLS, "pope"),
    "aokvqa": _Task("choice", ("questions", "images"), "vqa"),
    "chair": _Task("chair", ("annotations", "instances", "synonyms", "images"), "caption"),
    "coco-retrieval": _Task("retrieval", ("annotations", "images")),
    "flickr30k-retrieval": _Task("retrieval", ("annotations", "images")),
    "caption": _Task("caption", ("data",), "caption"),
    "vqa": _Task("vqa", ("data",), "vqa", (*_VQA_PROTOCOLS, *_YES_NO_PROTOCOLS)),
    "multiple-choice": _Task("choice", ("data",), "vqa"),
    "retrieval": _Task("retrieval", ("data",)),
}


def add_parser(commands: Any):
    text = "Evaluate a model on the paper's benchmarks, or on a dataset. Start it with accelerate for many processes."
    example = "blip2-hf evaluate caption --data pairs.parquet --model Salesforce/blip2-opt-2.7b --output scores"
    add = add_command(commands, "evaluate", _run, text, check=_check, example=example)
    add("task", f"one of {', '.join(_TASKS)}; the last four take --data", choices=_TASKS, metavar="TASK")
    add("--model", required=True)
    add("--output", "folder of the results; run again to go on", required=True)
    add("--annotations", "file of captions (dataset_coco.json) or of answers (v2_mscoco_val2014_annotations.json)")
    questions = "file of questions, such as v2_OpenEnded_mscoco_val2014_questions.json; for pope also several"
    add("--questions", questions, nargs="+", metavar="FILE")
    instances = "chair: files of the objects in pictures, such as instances_val2014.json"
    add("--instances", instances, nargs="+", metavar="FILE")
    add("--synonyms", "chair: file of the words of objects, one object a line: dog, puppy", metavar="FILE")
    add("--images", "folder of the benchmark's pictures", metavar="FOLDER")
    add("--data")
    add("--config")
    split = "split of the data, also `test[:1000]`, or of Karpathy's file; without it test, or all if there are none"
    add("--split", split, default=None)
    add("--image-column")
    add("--image-root")
    add("--caption-column", "column of a caption, or of a list", default="caption")
    add("--question-column", "column of the questions", default="question")
    add("--answer-column", "column of an answer, or of a list", default="answer")
    add("--choices-column", "column of lists of answers to choose from; the answer is one of them or its number")
    add("--id-column", "column of the ids: of pictures with captions, or of questions")
    add("--image-id-column", "column of the ids of pictures with questions")
    add("--group-column", "column by which accuracy is told apart")
    add("--allow-urls")
    add("--preset", "settings of generation, in place of the task's", choices=PRESET_NAMES)
    add("--prompt", "text with the question at {} (default: that of the model's fine-tuning, or the preset's)")
    add("--generate")
    protocol = (
        f"how answers are scored: {', '.join(_VQA_PROTOCOLS)}; GQA: {', '.join(_GQA_PROTOCOLS)}; answers of yes "
        f"and no: {', '.join(_YES_NO_PROTOCOLS)}; without it official if each question has ten answers, else exact, "
        "and for GQA normalized"
    )
    add("--protocol", protocol, choices=(*_VQA_PROTOCOLS, *_GQA_PROTOCOLS, *_YES_NO_PROTOCOLS))
    lemmatize = "whether answers are lemmatised before they are scored, with spaCy; without it for okvqa alone"
    add("--lemmatize", lemmatize, action=argparse.BooleanOptionalAction)
    add("--normalization", NORMALIZATION_HELP, choices=NORMALIZATIONS)
    candidates = "retrieval: candidates of contrast that are matched; 0 for contrast alone"
    add("--k", candidates, type=at_least_zero, default=128)
    add("--image-size")
    add("--batch-size", "pictures at a time, fewer if they don't fit; without it 128, or 16 on a CPU")
    add("--dtype")
    add("--load-in-4bit")
    add("--load-in-8bit")
    add("--device")
    add("--limit", "how many of the first samples count", type=positive)
    add("--num-workers")


def _run(options: argparse.Namespace):
    task = _TASKS[options.task]
    from ..jobs.model_checks import MATCHING, WRITING, check_checkpoint

    check_checkpoint(options.model, MATCHING if task.kind == "retrieval" else WRITING)
    with processes(options.device) as state:
        run = _evaluate_retrieval if task.kind == "retrieval" else _evaluate_texts
        run(options, task, _read(options, task), options.device or state.device)
        if state.is_main_process:
            print((Path(options.output) / "table.md").read_text(encoding="utf-8"), end="")
            print(f"The table, results.json and predictions.json are in {options.output}.", file=sys.stderr)


def _check(options: argparse.Namespace):
    check_output_apart(options)
    task = _TASKS[options.task]
    bits = quantization_bits(options)
    if missing := [f"--{name}" for name in task.needs if getattr(options, name) is None]:
        raise ValueError(f"{options.task} needs {' and '.join(missing)}.")
    if len(options.questions or ()) > 1 and options.task != "pope":
        raise ValueError(f"{options.task} takes one file of --questions, and {len(options.questions)} were given.")
    names = {"annotations", "questions", "instances", "synonyms", "images", "data"} - {*task.needs}
    if options.task in ("vqav2", "okvqa"):
        names -= {"annotations"}
    if task.needs != ("data",):
        names |= {
            "choices_column",
            "config",
            "image_column",
            "image_root",
            "id_column",
            "image_id_column",
            "group_column",
        }
    if task.needs == ("questions", "images") or options.task == "nocaps":
        names |= {"split"}
    if task.kind == "retrieval":
        names |= {"preset", "prompt", "generate"}
    if task.kind != "vqa":
        names |= {"protocol", "lemmatize"}
    if task.kind == "choice":
        names |= {"generate"}
    else:
        names |= {"choices_column", "normalization"}
    if task.kind not in ("vqa", "choice"):
        names |= {"image_id_column", "group_column"}
    if unused := [f"--{name.replace('_', '-')}" for name in sorted(names) if getattr(options, name) is not None]:
        raise ValueError(f"{options.task} has no use for {' and '.join(unused)}.")
    if bits is not None and task.kind == "retrieval":
        raise ValueError(f"{options.task} has no use for --load-in-{bits}bit.")
    if options.protocol not in (None, *task.protocols):
        expected = ", ".join(task.protocols)
        raise ValueError(f"--protocol {options.protocol}: {options.task} is scored by one of {expected}.")


def _read(options: argparse.Namespace, task: _Task) -> Sequence[Any]:
    from ..evaluation import readers

    samples: Sequence[Any]
    if options.data is not None:
        samples = _read_rows(options, task)
    elif options.task == "nocaps":
        samples = readers.read_nocaps(options.annotations, options.images)
    elif options.task == "gqa":
        samples = readers.read_gqa(options.questions[0], options.images)
    elif options.task == "aokvqa":
        samples = readers.read_aokvqa(options.questions[0], options.images)
    elif options.task == "pope":
        samples = readers.read_pope(options.questions, options.images)
    elif options.task == "chair":
        files = (options.annotations, options.instances, options.images)
        samples = readers.read_coco_objects(*files, options.split)
    elif task.kind == "vqa":
        samples = readers.read_vqa(options.questions[0], options.images, options.annotations)
    else:
        samples = readers.read_karpathy(options.annotations, options.images, options.split or "test")
    return samples if options.limit is None else samples[: options.limit]


def _read_rows(options: argparse.Namespace, task: _Task) -> Sequence[Any]:
    from ..evaluation import readers

    rows = load_dataset(options, default_split="test")
    is_vqa = task.kind in ("vqa", "choice")
    if task.kind == "choice":
        options.choices_column = options.choices_column or "choices"
    columns = ["image", *(("question", "answer", "image_id", "group", "choices") if is_vqa else ("caption",)), "id"]
    needed = {f"--{name.replace('_', '-')}-column": getattr(options, f"{name}_column") for name in columns}
    check_columns(options.data, rows, {option: column for option, column in needed.items() if column is not None})
    if "file_name" in rows.column_names:  # of a folder of pictures, several rows of which may be about one
        id_column = "image_id_column" if is_vqa else "id_column"
        setattr(options, id_column, getattr(options, id_column) or "file_name")
        rows = _with_texts(rows, options.question_column if is_vqa else options.caption_column)
    if not is_vqa:
        names = ("image_column", "caption_column", "id_column")
        return readers.read_caption_rows(rows, **pick(options, *names, "allow_urls"))
    names = ("image_column", "question_column", "answer_column", "id_column", "image_id_column", "group_column")
    names += ("choices_column",)
    return readers.read_question_rows(rows, **pick(options, *names, "allow_urls"))


def _with_texts(rows: Any, column: str) -> Any:
    """Return the rows that have something in a column, and say how many others there are."""
    from accelerate import PartialState

    from ..data.rows import get_column, select_columns
    from ..data.text import has_text

    texts = (get_column(row, column) for row in select_columns(rows, [column]))
    kept = [number for number, text in enumerate(texts) if has_text(text)]
    missing = len(rows) - len(kept)
    if missing and PartialState().is_main_process:
        print(f"blip2-hf: {missing:,} of {len(rows):,} rows have no {column}, and are left out.", file=sys.stderr)
    return rows.select(kept)


def _evaluate_texts(options: argparse.Namespace, task: _Task, samples: Sequence[Any], device: Any):
    from ..evaluation.answer_protocols import check_protocol
    from ..evaluation.benchmarks import (
        check_objects,
        evaluate_captioning,
        evaluate_chair,
        evaluate_multiple_choice,
        evaluate_vqa,
    )
    from ..evaluation.readers import read_synonyms
    from ..models.processing_blip2 import learned_prompt

    # What can be wrong with settings is told before the model is loaded
    preset = _preset(options, task)
    evaluate: Any = evaluate_captioning
    scoring: dict[str, Any] = {}
    if task.kind == "vqa":
        lemmatize = task.lemmatize if options.lemmatize is None else options.lemmatize
        protocol = check_protocol(samples, options.protocol or task.protocol, lemmatize)
        evaluate, scoring = evaluate_vqa, {"protocol": protocol, "lemmatize": lemmatize}
    elif task.kind == "choice":
        evaluate = evaluate_multiple_choice
        scoring = {"normalization": options.normalization or NORMALIZATIONS[0]}
    elif task.kind == "chair":
        evaluate, scoring = evaluate_chair, {"synonyms": read_synonyms(options.synonyms)}
        check_objects(samples, scoring["synonyms"])
    model, processor = load_captioner(options.model, options.dtype, device, bits=quantization_bits(options))
    learned = learned_prompt(processor, asks=preset.asks)
    if learned is not None and options.prompt is None and options.preset is None:
        preset = replace(preset, prompt=learned)
    tell_image_size(processor, options.image_size, preset.image_size)
    settings = {"preset": preset, "task": options.task, **scoring, **pick(options, *_COMMON)}
    evaluate(model, processor, samples, options.output, **settings)


def _preset(options: argparse.Namespace, task: _Task) -> GenerationPreset:
    """Return the prompt and the settings, for which the model's configuration is enough."""
    from ..evaluation.benchmarks import check_preset
    from ..jobs.inference import weights_place
    from ..models.configuration_blip2 import Blip2Config

    given = given_generation(options)
    config = Blip2Config.from_pretrained(weights_place(options.model))
    preset = generation_preset(options.preset or task.preset, config)
    if options.prompt is not None:
        preset = replace(preset, prompt=options.prompt)
    check_preset(preset, asks=task.kind in ("vqa", "choice"))
    kwargs = generation_with_preset(preset, given)
    check_generation(kwargs, options.model)
    check_room(config, kwargs)
    return replace(preset, generate_kwargs=kwargs)


def _evaluate_retrieval(options: argparse.Namespace, task: _Task, samples: Sequence[Any], device: Any):
    from ..evaluation.retrieval_benchmark import evaluate_retrieval
    from ..retrieval.loading import load_retrieval_model

    model, processor = load_retrieval_model(options.model, device, options.dtype)
    tell_image_size(processor, options.image_size, _RETRIEVAL_IMAGE_SIZE)
    kwargs = pick(options, *_COMMON)
    evaluate_retrieval(model, processor, samples, options.output, options.k, options.task, **kwargs)
