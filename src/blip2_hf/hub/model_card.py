"""Model cards: what is known of a model and of its training, as README.md with metadata that the Hub reads."""

import hashlib
import inspect
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open
from transformers.utils import logging

from ..jobs.atomic_files import write_text
from ..models.configuration_blip2 import is_hub_id


logger = logging.get_logger(__name__)

CARD_NAME = "README.md"
_TEMPLATE = Path(__file__).with_name("model_card_template.md")
_MARK = "\n<!-- Written by blip2-hf; a card that you change is yours, and is left alone. "
_MARK_END = " -->\n"
# In place of a digest if there are no weights in the folder
_UNKNOWN = "unknown"
_NO_FACTS = ("folder", "model", "repo_id")

PIPELINE_TAGS = {
    # Not image-to-text, because transformers 5 has no such pipeline of its own: that is a tag of the card
    "Blip2HfForConditionalGeneration": "image-text-to-text",
    "Blip2HfForPreTraining": "zero-shot-image-classification",
    "Blip2HfForImageTextRetrieval": "zero-shot-image-classification",
    "Blip2HfVisionModelWithProjection": "image-feature-extraction",
    "Blip2HfTextModelWithProjection": "feature-extraction",
    "Blip2HfModel": "image-feature-extraction",
}
# Task, id and name of the dataset of each `blip2-hf evaluate` task, as model-index expects them
_BENCHMARKS = {
    "coco-caption": ("image-to-text", "coco", "COCO captions"),
    "nocaps": ("image-to-text", "nocaps", "NoCaps"),
    "vqav2": ("visual-question-answering", "vqav2", "VQAv2"),
    "okvqa": ("visual-question-answering", "ok-vqa", "OK-VQA"),
    "gqa": ("visual-question-answering", "gqa", "GQA"),
    "aokvqa": ("visual-question-answering", "aokvqa", "A-OKVQA (multiple choice)"),
    "pope": ("visual-question-answering", "pope", "POPE"),
    "chair": ("image-to-text", "coco", "COCO captions"),
    "coco-retrieval": ("image-text-retrieval", "coco", "COCO captions"),
    "flickr30k-retrieval": ("image-text-retrieval", "flickr30k", "Flickr30K"),
}
_TASK_TYPES = {
    "caption": "image-to-text",
    "vqa": "visual-question-answering",
    "multiple-choice": "visual-question-answering",
    "retrieval": "image-text-retrieval",
}
# Settings that a card does not show: fingerprints, and facts that the repository has anyway
_SETTINGS_LEFT_OUT = ("weights", "samples", "choices", "synonyms", "image_processor", "model")
# Metadata that stay when a card is written again
_KEPT = ("license", "language", "datasets", "base_model")


def write_model_card(
    folder: str | os.PathLike,
    model: Any,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    datasets: str | Sequence[str] | None = None,
    base_model: str | Sequence[str] | None = None,
    results: str | os.PathLike | Mapping | Sequence[str | os.PathLike | Mapping] | None = None,
    training: Mapping[str, Any] | None = None,
    tags: str | Sequence[str] | None = None,
) -> Path:
    r"""
    Write the model card, README.md, into a folder. Facts that are not known are left out.

    A card that you have written or changed is left alone. A card that this function wrote is written again if
    a fact is given here, or if the model's class or the weights in the folder have changed. Its metadata stay unless
    the arguments say otherwise. The results of other weights are removed.

    Args:
        folder (`str` or `os.PathLike`):
            The folder.
        model ([`Blip2PreTrainedModel`] or a [`~peft.PeftModel`] of one):
            The model.
        repo_id (`str`, *optional*):
            Name of the repository. Defaults to the name of the folder.
        license (`str`, *optional*):
            Identifier of the licence, such as `"apache-2.0"`.
        language (`str` or `list[str]`, *optional*):
            Code of the language of the texts, such as `"en"`.
        datasets (`str` or `list[str]`, *optional*):
            Ids of the datasets that the model was trained on.
        base_model (`str` or `list[str]`, *optional*):
            Ids of the models that it was made of. Defaults to those that its configuration names: the model that was
            fine-tuned, or the vision tower and the language model.
        results (`str`, `os.PathLike`, `dict`, or a list of them, *optional*):
            The results.json of `blip2-hf evaluate`, or what it holds: `task`, `scores` and `settings`, and `dataset`
            (its id) and `split`. Results on a dataset without an id are in the text but not in `model-index`.
        training (`Mapping`, *optional*):
            Names and values of the training's settings.
        tags (`str` or `list[str]`, *optional*):
            More tags.

    Returns:
        `Path`: the card.

    Raises:
        ValueError: if `results` lack `task` or `scores`.
    """
    path = Path(folder) / CARD_NAME
    name = Path(folder).resolve().name if repo_id is None else repo_id
    arguments: dict[str, Any] = {"license": license, "language": language, "datasets": datasets}
    arguments |= {"base_model": base_model, "results": results, "training": training, "tags": tags}
    given = {name: value for name, value in arguments.items() if value is not None}
    old_card = path.read_bytes().decode() if path.exists() else None
    if old_card is not None and not is_ours(old_card):
        if given:
            logger.warning(f"{CARD_NAME} is yours and is left alone: {', '.join(given)} are not written into it.")
        return path
    kind, weights, old = _kind(model), _weights_digest(Path(folder)), ModelCardData()
    if old_card is not None:
        old_kind, old_weights = _read_mark(old_card)
        weights = old_weights if weights == _UNKNOWN else weights
        is_other_kind, are_others = kind != old_kind, old_weights not in (_UNKNOWN, weights)
        if not (given or is_other_kind or are_others):
            return path
        old = ModelCard(old_card).data
        if is_other_kind:
            old.base_model = None
        if (is_other_kind or are_others) and old.eval_results:
            if results is None:
                logger.warning(f"The weights have changed: {CARD_NAME} loses the results of the previous ones.")
            old.eval_results = None
    facts = {key: old.get(key) for key in _KEPT if old.get(key) is not None} | given
    reports = [_read_results(report) for report in _as_list(results)]
    text = _text(model, name, _metadata(model, name, facts, reports, old), reports, training)
    write_text(path, f"{text}{_MARK}{_digest(text)}, {kind}, weights {weights}{_MARK_END}")
    return path


def check_facts(facts: Mapping[str, Any]):
    r"""
    Check the facts for a card before anything is written.

    Args:
        facts (`Mapping`):
            Keyword arguments of [`write_model_card`].

    Raises:
        TypeError: if there is no such argument.
        ValueError: if `results` lack `task` or `scores`.
    """
    known = [name for name in inspect.signature(write_model_card).parameters if name not in _NO_FACTS]
    unknown = sorted(set(facts) - set(known))
    if unknown:
        raise TypeError(f"A model card has no place for {', '.join(unknown)}. It takes {', '.join(known)}.")
    for report in _as_list(facts.get("results")):
        _read_results(report)


def is_ours(card: str) -> bool:
    """Return whether this library wrote the card and nobody has changed it."""
    text, _, mark = card.replace("\r\n", "\n").rpartition(_MARK)
    digest, *rest = mark.split(", ")
    return digest == _digest(text) and len(rest) == 2 and mark.endswith(_MARK_END)


def _read_mark(card: str) -> tuple[str, str]:
    """Return the model's kind and the digest of its weights from a card that this library wrote."""
    mark = card.replace("\r\n", "\n").rpartition(_MARK)[2].removesuffix(_MARK_END)
    _, kind, weights = mark.split(", ")
    return kind, weights.removeprefix("weights ")


def _kind(model: Any) -> str:
    name = class_name(_bare_model(model))
    return f"adapter of {name}" if _is_adapter(model) else name


def _weights_digest(folder: Path) -> str:
    """Return a digest of the weights in the folder, the same in one file and in shards."""
    # Not of the model's own weights because they may be on several machines
    files = [path for path in folder.glob("*.safetensors") if path.name.startswith(("model", "adapter_model"))]
    if not files:
        return _UNKNOWN
    digests = {}
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                content = tensors.get_tensor(name).reshape(-1).view(torch.uint8).numpy()
                digests[name] = hashlib.sha256(content).hexdigest()
    return _digest(repr(sorted(digests.items())))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _as_list(value: Any) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _bare_model(model: Any) -> Any:
    return model.get_base_model() if _is_adapter(model) else model


def class_name(model: Any) -> str:
    """Return the name of the model's class in this package. FSDP's `fully_shard` derives another class from it."""
    return next(base.__name__ for base in type(model).__mro__ if base.__name__ in PIPELINE_TAGS)


def _is_adapter(model: Any) -> bool:
    return type(model).__module__.partition(".")[0] == "peft"


def _metadata(
    model: Any, name: str, facts: dict[str, Any], reports: list[dict[str, Any]], old: ModelCardData
) -> ModelCardData:
    # A model that was loaded from the repository to which it goes is not made of itself
    base_models = [base for base in _as_list(facts.get("base_model")) if base != name]
    base_models = base_models or [base for base in _base_models(_bare_model(model)) if base != name]
    evaluations = [result for report in reports for result in _evaluations(report)]
    if not reports:
        evaluations = old.eval_results or []
    pipeline_tag = PIPELINE_TAGS[class_name(_bare_model(model))]
    more_tags = {
        "image-text-to-text": ["image-to-text"],
        "zero-shot-image-classification": ["sentence-transformers", "image-text-retrieval"],
    }.get(pipeline_tag, [])
    return ModelCardData(
        language=facts.get("language"),
        license=facts.get("license"),
        library_name="peft" if _is_adapter(model) else "transformers",
        pipeline_tag=pipeline_tag,
        tags=["blip-2", "blip2-hf", *more_tags, *_as_list(old.tags), *_as_list(facts.get("tags"))],
        base_model=base_models or None,
        base_model_relation=("adapter" if _is_adapter(model) else "finetune") if base_models else None,
        datasets=_as_list(facts.get("datasets")) or None,
        metrics=sorted({result.metric_type for result in evaluations}) or None,
        model_name=name.rpartition("/")[2] if evaluations else None,
        eval_results=evaluations or None,
    )


def _base_models(model: Any) -> list[str]:
    """Return the id of the model that this one was loaded from, otherwise those of its parts. Folders have none."""
    config = model.config
    if is_hub_id(config.name_or_path):
        return [config.name_or_path]
    parts = [config.vision_config, config.text_config]
    names = [part.name_or_path for part in parts if part is not None]
    return list(dict.fromkeys(name for name in names if is_hub_id(name)))


def _read_results(results: str | os.PathLike | Mapping) -> dict[str, Any]:
    """Read a report of an evaluation, and add what the metadata need to know of its task and its dataset."""
    report = results if isinstance(results, Mapping) else json.loads(Path(results).read_text(encoding="utf-8"))
    if not isinstance(report, Mapping) or not {"task", "scores"} <= set(report):
        found = sorted(map(str, report)) if isinstance(report, Mapping) else type(report).__name__
        raise ValueError(f"results of `blip2-hf evaluate` were expected, with `task` and `scores`, but got {found}.")
    task, settings = report["task"], report.get("settings") or {}
    task_type, benchmark, dataset_name = _BENCHMARKS.get(task, (_TASK_TYPES.get(task, task), None, None))
    dataset = report.get("dataset") or benchmark
    return {
        "task": task,
        "task_type": task_type,
        "dataset": dataset,
        "dataset_name": dataset_name or dataset,
        "split": report.get("split"),
        "scores": report["scores"],
        "settings": {key: value for key, value in settings.items() if key not in _SETTINGS_LEFT_OUT},
    }


def _evaluations(report: dict[str, Any]) -> list[EvalResult]:
    if report["dataset"] is None:
        return []
    return [
        EvalResult(
            task_type=report["task_type"],
            dataset_type=report["dataset"],
            dataset_name=report["dataset_name"],
            dataset_split=report["split"],
            metric_type=metric,
            metric_value=value,
            metric_args=report["settings"] or None,
        )
        for metric, value in report["scores"].items()
        if math.isfinite(value)
    ]


def _text(
    model: Any, name: str, data: ModelCardData, reports: list[dict[str, Any]], training: Mapping[str, Any] | None
) -> str:
    model = _bare_model(model)
    sizes = {part: sum(weight.numel() for weight in child.parameters()) for part, child in model.named_children()}
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=name,
        kind=class_name(model),
        config=model.config,
        parameters={part: f"{size:,} parameters" for part, size in sizes.items()},
        training=[map(_cell, setting) for setting in (training or {}).items()],
        results=[map(_cell, row) for row in _result_rows(reports, data)],
    )
    return f"{card}\n"


def _result_rows(reports: list[dict[str, Any]], data: ModelCardData) -> list[tuple]:
    """Return the rows of the table of results: those of the reports, otherwise those that the card had before."""
    if not reports:
        old = data.eval_results or []
        return [(r.task_type, r.dataset_name, r.metric_type, _number(r.metric_value), r.metric_args) for r in old]
    rows = []
    for report in reports:
        dataset = " ".join(part for part in (report["dataset_name"], report["split"]) if part)
        scores = report["scores"].items()
        rows += [(report["task"], dataset, metric, _number(value), report["settings"]) for metric, value in scores]
    return rows


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _cell(value: Any) -> str:
    """Write a value into a cell of a table in Markdown."""
    if isinstance(value, Mapping):
        value = ", ".join(
            f"{key} ({_cell(entry)})" if isinstance(entry, Mapping) else f"{key}: {entry}"
            for key, entry in value.items()
        )
    return str("" if value is None else value).replace("|", "\\|").replace("\n", " ")


__all__ = ["CARD_NAME", "PIPELINE_TAGS", "check_facts", "class_name", "is_ours", "write_model_card"]
