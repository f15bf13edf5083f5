"""`blip2-hf evaluate`: the paper's benchmarks, and datasets of one's own."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..models.generation_presets import PRESET_NAMES, GenerationPreset, generation_preset
from ._common import (
    add_allow_urls,
    add_option,
    generate_argument,
    load_captioner,
    load_dataset,
    processes,
    tell_image_size,
)


@dataclass(frozen=True)
class _Task:
    """One task: its kind, the options that name its data, its settings of generation, the protocols of its answers."""

    kind: str
    needs: tuple[str, ...]
    preset: str | None = None
    protocols: tuple[str, ...] = ()
    protocol: str | None = None  # without one, the data choose
    lemmatize: bool = False


_VQA_PROTOCOLS = ("official", "lavis", "exact")
_GQA_PROTOCOLS = ("normalized", "strict")
_RETRIEVAL_IMAGE_SIZE = 364
_DTYPES = ("bfloat16", "float16", "float32")
_TASKS = {
    "coco-caption": _Task("caption", ("annotations", "images"), "caption"),
    "nocaps": _Task("caption", ("annotations", "images"), "nocaps"),
    "vqav2": _Task("vqa", ("questions", "images"), "vqa", _VQA_PROTOCOLS),
    "okvqa": _Task("vqa", ("questions", "images"), "vqa", _VQA_PROTOCOLS, lemmatize=True),
    "gqa": _Task("vqa", ("questions", "images"), "vqa", _GQA_PROTOCOLS, "normalized"),
    "coco-retrieval": _Task("retrieval", ("annotations", "images")),
    "flickr30k-retrieval": _Task("retrieval", ("annotations", "images")),
    "caption": _Task("caption", ("data",), "caption"),
    "vqa": _Task("vqa", ("data",), "vqa", _VQA_PROTOCOLS),
    "retrieval": _Task("retrieval", ("data",)),
}


def add_parser(commands: Any):
    text = "Evaluate a model on the paper's benchmarks, or on a dataset. Start it with accelerate for many processes."
    parser = commands.add_parser("evaluate", help=text, description=text)
    parser.set_defaults(run=_run)

    add = partial(add_option, parser)
    add("task", f"one of {', '.join(_TASKS)}; the last three take --data", choices=_TASKS, metavar="TASK")
    add("--model", "BLIP-2: folder or id on the Hub", required=True)
    add("--output", "where the results go; run again to go on", required=True, metavar="FOLDER")
    add("--annotations", "file of captions (dataset_coco.json) or of answers (v2_mscoco_val2014_annotations.json)")
    add("--questions", "file of questions, such as v2_OpenEnded_mscoco_val2014_questions.json")
    add("--images", "folder of the benchmark's pictures", metavar="FOLDER")
    add("--data", "folder of pictures, file (parquet, tar, json, csv, arrow), or id on the Hub")
    add("--config", "configuration of --data, where it has several")
    splits = "split of --data, also `test[:1000]`, or of Karpathy's file; without it test, or all where there are none"
    add("--split", splits)
    add("--image-column", "column of the pictures", default="image")
    add("--caption-column", "column of a caption, or of a list", default="caption")
    add("--question-column", "column of the questions", default="question")
    add("--answer-column", "column of an answer, or of a list", default="answer")
    add("--id-column", "column of the ids: of pictures with captions, or of questions")
    add("--image-id-column", "column of the ids of pictures with questions")
    add("--group-column", "column that accuracy is told apart by")
    add_allow_urls(parser)
    add("--preset", "settings of generation, in place of the task's", choices=PRESET_NAMES)
    add("--prompt", "prompt in place of the preset's; the question stands at {}")
    generate = "arguments of generate on top of the preset's, such as length_penalty=0 repetition_penalty=1.15"
    add("--generate", generate, nargs="+", type=generate_argument, metavar="NAME=VALUE")
    protocol = (
        f"how answers are scored: {', '.join(_VQA_PROTOCOLS)}; GQA: {', '.join(_GQA_PROTOCOLS)}; without it official "
        "if each question has ten answers, else exact, and for GQA normalized"
    )
    add("--protocol", protocol, choices=(*_VQA_PROTOCOLS, *_GQA_PROTOCOLS))
    lemmatize = "whether answers are lemmatised before they are scored, with spaCy; without it for okvqa alone"
    add("--lemmatize", lemmatize, action=argparse.BooleanOptionalAction)
    add("--k", "retrieval: candidates of contrast that are matched; 0 for contrast alone", type=int, default=128)
    add("--image-size", "side in pixels of the square that pictures are scaled to, not the checkpoint's", type=int)
    add("--batch-size", "texts at a time; without it 128, or 16 on a CPU, less where memory runs out", type=int)
    add("--dtype", "what the model computes in, not the dtype of its checkpoint", choices=_DTYPES)
    add("--device", "such as cuda:1 or cpu; without it a GPU if there is one, its own for each process")
    add("--limit", "how many of the first samples count", type=int)
    add("--num-workers", "processes that load pictures", type=int, default=0)


def _run(options: argparse.Namespace):
    task = _TASKS[options.task]
    _check(options, task)

    run = _evaluate_retrieval if task.kind == "retrieval" else _evaluate_texts
    with processes(options.device, "What is predicted is kept; the same command goes on with the rest.") as state:
        run(options, task, _read(options, task), options.device or state.device)
        if state.is_main_process:
            print((Path(options.output) / "table.md").read_text(encoding="utf-8"), end="")


def _check(options: argparse.Namespace, task: _Task):
    if missing := [f"--{name}" for name in task.needs if getattr(options, name) is None]:
        raise SystemExit(f"blip2-hf: {options.task} needs {' and '.join(missing)}.")
    takes_answers = options.task in ("vqav2", "okvqa")
    names = [name for name in ("annotations", "questions", "images", "data") if name not in task.needs]
    names = [name for name in names if not (name == "annotations" and takes_answers)]
    if task.kind == "retrieval":
        names += ["preset", "prompt", "generate"]
    if task.kind != "vqa":
        names += ["protocol", "lemmatize"]
    for name, least in (("k", 0), ("limit", 1), ("image_size", 1), ("batch_size", 1), ("num_workers", 0)):
        if (value := getattr(options, name)) is not None and value < least:
            raise SystemExit(f"blip2-hf: --{name.replace('_', '-')} {value}: at least {least} was expected.")
    if unused := [f"--{name}" for name in names if getattr(options, name) is not None]:
        raise SystemExit(f"blip2-hf: {options.task} has no use for {' and '.join(unused)}.")
    if options.protocol not in (None, *task.protocols):
        expected = ", ".join(task.protocols)
        raise SystemExit(f"blip2-hf: --protocol {options.protocol}: {options.task} is scored by one of {expected}.")


def _read(options: argparse.Namespace, task: _Task) -> Sequence[Any]:
    from ..evaluation import readers

    files: dict[str, Callable[[], Sequence[Any]]] = {
        "nocaps": lambda: readers.read_nocaps(options.annotations, options.images),
        "gqa": lambda: readers.read_gqa(options.questions, options.images),
    }
    for name in ("coco-caption", "coco-retrieval", "flickr30k-retrieval"):
        files[name] = lambda: readers.read_karpathy(options.annotations, options.images, options.split or "test")
    for name in ("vqav2", "okvqa"):
        files[name] = lambda: readers.read_vqa(options.questions, options.images, options.annotations)
    samples = files.get(options.task, partial(_read_rows, options, task))()
    return samples if options.limit is None else samples[: options.limit]


def _read_rows(options: argparse.Namespace, task: _Task) -> Sequence[Any]:
    from ..evaluation import readers

    # A single file has no test split: `datasets` calls its rows train, whatever they are
    path = Path(options.data)
    split = options.split or ("train" if path.is_file() or (path / "state.json").is_file() else "test")
    rows = load_dataset(options.data, options.config, split)
    if task.kind != "vqa":
        columns = (options.image_column, options.caption_column, options.id_column)
        return readers.read_caption_rows(rows, *columns, options.allow_urls)
    return readers.read_question_rows(
        rows,
        options.image_column,
        options.question_column,
        options.answer_column,
        options.id_column,
        options.image_id_column,
        options.group_column,
        options.allow_urls,
    )


def _evaluate_texts(options: argparse.Namespace, task: _Task, samples: Sequence[Any], device: Any):
    from ..evaluation.benchmarks import evaluate_captioning, evaluate_vqa

    preset = _preset(options, task)
    scoring = _scoring(options, task, samples) if task.kind == "vqa" else {}
    model, processor = load_captioner(options.model, options.dtype, device)
    tell_image_size(processor, options.image_size, preset.image_size)
    evaluate = evaluate_vqa if task.kind == "vqa" else evaluate_captioning
    evaluate(model, processor, samples, options.output, preset, options.task, **scoring, **_shared(options))


def _scoring(options: argparse.Namespace, task: _Task, samples: Sequence[Any]) -> dict[str, Any]:
    """Return how answers are scored; what can be wrong with it is told before the model is loaded."""
    from ..evaluation.answer_protocols import check_protocol

    lemmatize = task.lemmatize if options.lemmatize is None else options.lemmatize
    try:
        protocol = check_protocol(samples, options.protocol or task.protocol, lemmatize)
    except ImportError as error:
        raise SystemExit(f"blip2-hf: {error}") from error
    return {"protocol": protocol, "lemmatize": lemmatize}


def _preset(options: argparse.Namespace, task: _Task) -> GenerationPreset:
    """Return what is asked and how, for which the model's configuration is enough."""
    from ..evaluation.benchmarks import check_preset
    from ..models.configuration_blip2 import Blip2Config

    preset = generation_preset(options.preset or task.preset, Blip2Config.from_pretrained(options.model))
    if options.prompt is not None:
        preset = replace(preset, prompt=options.prompt)
    check_preset(preset, asks=task.kind == "vqa")
    given = dict(options.generate or [])
    generate_kwargs = preset.generate_kwargs | given
    if "max_new_tokens" in given and "min_new_tokens" in generate_kwargs and "min_new_tokens" not in given:
        generate_kwargs["min_new_tokens"] = min(generate_kwargs["min_new_tokens"], given["max_new_tokens"])
    return replace(preset, generate_kwargs=generate_kwargs)


def _evaluate_retrieval(options: argparse.Namespace, task: _Task, samples: Sequence[Any], device: Any):
    from ..evaluation.retrieval_benchmark import evaluate_retrieval
    from ..retrieval.loading import load_retrieval_model

    model, processor = load_retrieval_model(options.model, device, options.dtype)
    tell_image_size(processor, options.image_size, _RETRIEVAL_IMAGE_SIZE)
    evaluate_retrieval(model, processor, samples, options.output, options.k, options.task, **_shared(options))


def _shared(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that all evaluations share."""
    return {"image_size": options.image_size, "batch_size": options.batch_size, "num_workers": options.num_workers}
