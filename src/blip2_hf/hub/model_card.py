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

from ..models.configuration_blip2 import is_hub_id


logger = logging.get_logger(__name__)

CARD_NAME = "README.md"
_MARK = "\n<!-- Written by blip2-hf; a card that you change is yours, and is left alone. "
_MARK_END = " -->\n"
# In place of a digest, where there are no weights in the folder
_UNKNOWN = "unknown"
_NO_FACTS = ("folder", "model", "repo_id")

PIPELINE_TAGS = {
    "Blip2HfForConditionalGeneration": "image-to-text",
    "Blip2HfForPreTraining": "zero-shot-image-classification",
    "Blip2HfForImageTextRetrieval": "zero-shot-image-classification",
    "Blip2HfModel": "image-feature-extraction",
}
_DESCRIPTIONS = {
    "Blip2HfForConditionalGeneration": "It writes captions of pictures and answers questions about them: a Querying "
    "Transformer (Q-Former) asks a vision tower what a language model needs to know.",
    "Blip2HfForPreTraining": "It is a Querying Transformer (Q-Former) after stage 1, trained by image-text contrast, "
    "matching and captioning: it compares pictures with texts, and stage 2 joins a language model to it.",
    "Blip2HfForImageTextRetrieval": "It compares pictures with texts, by contrast and by matching.",
    "Blip2HfModel": "It is the image side: the vision tower, the queries and the Querying Transformer (Q-Former).",
}
# Of the tasks of `blip2-hf evaluate`: task, id and name of the data set, as model-index wants them
_BENCHMARKS = {
    "coco-caption": ("image-to-text", "coco", "COCO captions"),
    "nocaps": ("image-to-text", "nocaps", "NoCaps"),
    "vqav2": ("visual-question-answering", "vqav2", "VQAv2"),
    "okvqa": ("visual-question-answering", "ok-vqa", "OK-VQA"),
    "gqa": ("visual-question-answering", "gqa", "GQA"),
    "coco-retrieval": ("image-text-retrieval", "coco", "COCO captions"),
    "flickr30k-retrieval": ("image-text-retrieval", "flickr30k", "Flickr30K"),
}
_TASK_TYPES = {"caption": "image-to-text", "vqa": "visual-question-answering", "retrieval": "image-text-retrieval"}
# Fingerprints and what is in the repository anyway
_SETTINGS_LEFT_OUT = ("weights", "samples", "image_processor", "model")
# What stays in the metadata of a card that is written anew
_KEPT = ("license", "language", "datasets", "base_model")

_LIMITS = """\
- Captions and answers are sometimes wrong. The authors name inaccurate knowledge of the language model, a wrong \
path of reasoning, and pictures of what is newer than the language model (section 5 of the paper).
- The frozen parts stay as they are, with the biases and risks of what they learned from: pictures and texts of the \
web, offensive and private ones among them.
- The authors saw no gain from examples in the prompt (in-context learning), for want of training data with several \
pictures in a row.
- Nobody has assessed this checkpoint for use where an error does harm, or for people and places that its data lack.
"""
_CITATION = """\
@inproceedings{li2023blip2,
  title     = {{BLIP-2}: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language
               Models},
  author    = {Li, Junnan and Li, Dongxu and Savarese, Silvio and Hoi, Steven},
  booktitle = {International Conference on Machine Learning},
  year      = {2023},
  url       = {https://arxiv.org/abs/2301.12597}
}
"""


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
    Writes the model card, README.md, into a folder, from what is known. What is not known is left out.

    A card that you have written or changed is left alone. One that this function wrote is written anew where something
    is said here, or where the model's class or the weights in the folder are others; of its metadata, what is not said
    anew stays, but for the results of other weights.

    Args:
        folder (`str` or `os.PathLike`):
            The folder.
        model ([`Blip2PreTrainedModel`] or a [`~peft.PeftModel`] of one):
            The model.
        repo_id (`str`, *optional*):
            Name of the repository; that of the folder if it is not given.
        license (`str`, *optional*):
            Identifier of the licence, such as `"apache-2.0"`.
        language (`str` or `list[str]`, *optional*):
            Code of the language of the texts, such as `"en"`.
        datasets (`str` or `list[str]`, *optional*):
            Ids of the data sets that the model was trained on.
        base_model (`str` or `list[str]`, *optional*):
            Ids of the models that it was made of. If it is not given, those that its configuration names: the model
            that was fine-tuned, or the vision tower and the language model.
        results (`str`, `os.PathLike`, `dict`, or a list of them, *optional*):
            The results.json of `blip2-hf evaluate`, or what it holds: `task`, `scores` and `settings`, and `dataset`
            (its id) and `split`. Results on a data set that has no id are in the text, but not in `model-index`.
        training (`Mapping`, *optional*):
            Names and values of the training's settings.
        tags (`str` or `list[str]`, *optional*):
            More tags.

    Returns:
        `Path`: the card.

    Raises:
        ValueError: if `results` are not what was expected.
    """
    path = Path(folder) / CARD_NAME
    name = Path(folder).resolve().name if repo_id is None else repo_id
    arguments: dict[str, Any] = {"license": license, "language": language, "datasets": datasets}
    arguments |= {"base_model": base_model, "results": results, "training": training, "tags": tags}
    given = {name: value for name, value in arguments.items() if value is not None}
    old = path.read_bytes().decode() if path.exists() else None
    if old is not None and not is_ours(old):
        if given:
            logger.warning(f"{CARD_NAME} is yours and is left alone: {', '.join(given)} are not written into it.")
        return path
    kind, weights = _kind(model), _weights_digest(Path(folder))
    old_kind, old_weights = (kind, weights) if old is None else _read_mark(old)
    are_others = _UNKNOWN not in (weights, old_weights) and weights != old_weights
    if old is not None and not given and kind == old_kind and not are_others:
        return path
    old_data = ModelCardData() if old is None else ModelCard(old).data
    if kind != old_kind:
        old_data.base_model = None
    if (are_others or kind != old_kind) and old_data.eval_results:
        if results is None:
            logger.warning(f"The weights are others, and the results of the previous ones leave {CARD_NAME}.")
        old_data.eval_results = None
    kept = {key: old_data.get(key) for key in _KEPT if old_data.get(key) is not None}
    facts = kept | given
    reports = [_read_results(report) for report in _as_list(results)]
    data = _metadata(model, name, facts, reports, old_data)
    text = f"---\n{data.to_yaml()}\n---\n\n{_text(model, name, data, reports, training)}"
    temporary = path.with_name(f"{CARD_NAME}.tmp")
    mark = f"{_MARK}{_digest(text)}, {kind}, weights {old_weights if weights == _UNKNOWN else weights}{_MARK_END}"
    temporary.write_bytes(f"{text}{mark}".encode())
    os.replace(temporary, path)
    return path


def check_facts(facts: Mapping[str, Any]):
    r"""
    Looks at what a card is to say, before anything is written.

    Args:
        facts (`Mapping`):
            Keyword arguments of [`write_model_card`].

    Raises:
        TypeError: if there is no such argument.
        ValueError: if `results` are not what was expected.
    """
    known = [name for name in inspect.signature(write_model_card).parameters if name not in _NO_FACTS]
    unknown = sorted(set(facts) - set(known))
    if unknown:
        raise TypeError(f"A card has no place for {', '.join(unknown)}. It takes {', '.join(known)}.")
    for report in _as_list(facts.get("results")):
        _read_results(report)


def is_ours(card: str) -> bool:
    """Whether this library wrote the card, and nobody has changed it."""
    text, _, mark = card.replace("\r\n", "\n").rpartition(_MARK)
    digest, *rest = mark.split(", ")
    return digest == _digest(text) and len(rest) == 2 and mark.endswith(_MARK_END)


def _read_mark(card: str) -> tuple[str, str]:
    """The model's kind and the digest of its weights, of a card of ours."""
    mark = card.replace("\r\n", "\n").rpartition(_MARK)[2].removesuffix(_MARK_END)
    _, kind, weights = mark.split(", ")
    return kind, weights.removeprefix("weights ")


def _kind(model: Any) -> str:
    name = class_name(_bare_model(model))
    return f"adapter of {name}" if _is_adapter(model) else name


def _weights_digest(folder: Path) -> str:
    """Of the weights in the folder, in however many files; from there, for the model's may be on several machines."""
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
    """Name of the class of this package that the model's is, or, as with FSDP's `fully_shard`, is derived from."""
    return next(base.__name__ for base in type(model).__mro__ if base.__name__ in PIPELINE_TAGS)


def _is_adapter(model: Any) -> bool:
    return type(model).__module__.partition(".")[0] == "peft"


def _metadata(
    model: Any, name: str, facts: dict[str, Any], reports: list[dict[str, Any]], old: ModelCardData
) -> ModelCardData:
    # A model that was loaded from the repository it goes to is not made of itself
    base_models = [base for base in _as_list(facts.get("base_model")) if base != name]
    base_models = base_models or [base for base in _base_models(_bare_model(model)) if base != name]
    evaluations = [result for report in reports for result in _evaluations(report)]
    if not reports:
        evaluations = old.eval_results or []
    return ModelCardData(
        language=facts.get("language"),
        license=facts.get("license"),
        library_name="peft" if _is_adapter(model) else "transformers",
        pipeline_tag=PIPELINE_TAGS[class_name(_bare_model(model))],
        tags=list(dict.fromkeys(["blip-2", "blip2-hf", *_as_list(old.tags), *_as_list(facts.get("tags"))])),
        base_model=base_models or None,
        base_model_relation=("adapter" if _is_adapter(model) else "finetune") if base_models else None,
        datasets=_as_list(facts.get("datasets")) or None,
        metrics=sorted({result.metric_type for result in evaluations}) or None,
        model_name=name.rpartition("/")[2] if evaluations else None,
        eval_results=evaluations or None,
    )


def _base_models(model: Any) -> list[str]:
    """Ids of the model that this one was loaded from, or else of its parts. Folders have none."""
    config = model.config
    if is_hub_id(config.name_or_path):
        return [config.name_or_path]
    parts = [config.vision_config, config.text_config]
    names = [part.name_or_path for part in parts if part is not None]
    return list(dict.fromkeys(name for name in names if is_hub_id(name)))


def _read_results(results: str | os.PathLike | Mapping) -> dict[str, Any]:
    """A report of an evaluation, with what the metadata need to know of its task and data, as far as that is known."""
    report = results if isinstance(results, Mapping) else json.loads(Path(results).read_text(encoding="utf-8"))
    if not isinstance(report, Mapping) or not {"task", "scores"} <= set(report):
        found = sorted(map(str, report)) if isinstance(report, Mapping) else type(report).__name__
        raise ValueError(f"results are those of `blip2-hf evaluate`, with `task` and `scores`, but got {found}.")
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
    bare_model = _bare_model(model)
    sections = [
        f"# {name.rpartition('/')[2]}\n\nA BLIP-2 model ([paper](https://arxiv.org/abs/2301.12597)), trained or saved "
        f"with blip2-hf. {_DESCRIPTIONS[class_name(bare_model)]}\n",
        _parts(bare_model, data),
        f"## How to use it\n\n{_usage(model, name, data)}",
    ]
    if data.datasets:
        sections.append("## Training data\n\n" + "".join(f"- {dataset}\n" for dataset in data.datasets))
    if training:
        sections.append(f"## Training\n\n{_table(('setting', 'value'), training.items())}")
    rows = [row for report in reports for row in _result_rows(report)] or [
        (result.task_type, result.dataset_name, result.metric_type, _number(result.metric_value), result.metric_args)
        for result in data.eval_results or []
    ]
    if rows:
        sections.append(f"## Results\n\n{_table(('task', 'data', 'metric', 'value', 'settings'), rows)}")
    sections += [f"## Limits\n\n{_LIMITS}", f"## Licence\n\n{_licence(data)}"]
    sections.append(f"## Citation\n\n```bibtex\n{_CITATION}```\n")
    return "\n".join(sections)


def _parts(model: Any, data: ModelCardData) -> str:
    config = model.config
    tower = f"{config.vision_config.model_type}, {_size(model.vision_model)}"
    rows = [
        ("vision tower", tower if config.has_vision_tower else f"{config.vision_config.model_type}, not included"),
        ("Q-Former", f"{config.num_query_tokens} queries, {_size(model.qformer)}"),
    ]
    if config.text_config is not None and "language_model" in dict(model.named_children()):
        rows.append(("language model", f"{config.text_config.model_type}, {_size(model.language_model)}"))
    links = ", ".join(f"[{name}](https://huggingface.co/{name})" for name in _as_list(data.base_model))
    made_of = f"It was made from {links}.\n\n" if links else ""
    return f"## What it is made of\n\n{made_of}{_table(('part', 'what'), rows)}"


def _size(part: Any) -> str:
    return f"{sum(parameter.numel() for parameter in part.parameters()):,} parameters"


def _usage(model: Any, name: str, data: ModelCardData) -> str:
    if _is_adapter(model):
        return (
            "It is a PEFT adapter. Load the model that it was trained on, then:\n\n```python\n"
            f'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(model, "{name}")\n```\n'
        )
    how_to_load = 'model = AutoModel.from_pretrained("{}", trust_remote_code=True)'
    snippets = {
        "image-to-text": 'captioner = pipeline("image-to-text", model="{}", trust_remote_code=True)\n'
        'print(captioner("picture.png"))\n\n'
        'oracle = pipeline("visual-question-answering", model="{}", trust_remote_code=True)\n'
        'print(oracle(image="picture.png", question="What is it?"))',
        "zero-shot-image-classification": 'classifier = pipeline("zero-shot-image-classification", model="{}", '
        'trust_remote_code=True)\nprint(classifier("picture.png", candidate_labels=["a cat", "a dog"]))',
    }
    name_to_import = "pipeline" if data.pipeline_tag in snippets else "AutoModel"
    snippet = snippets.get(data.pipeline_tag, how_to_load).replace("{}", name)
    code = f"from transformers import {name_to_import}\n\n{snippet}"
    return (
        f"```python\n{code}\n```\n\n`trust_remote_code=True` runs the Python files of this repository. "
        "Where blip2-hf is installed, `import blip2_hf` takes its place.\n"
    )


def _result_rows(report: dict[str, Any]) -> list[tuple]:
    data = " ".join(part for part in (report["dataset_name"], report["split"]) if part)
    scores = report["scores"].items()
    return [(report["task"], data, metric, _number(value), report["settings"]) for metric, value in scores]


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _table(header: Sequence[str], rows: Any) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        value = ", ".join(
            f"{key} ({_cell(entry)})" if isinstance(entry, Mapping) else f"{key}: {entry}"
            for key, entry in value.items()
        )
    return str("" if value is None else value).replace("|", "\\|").replace("\n", " ")


def _licence(data: ModelCardData) -> str:
    terms = f"This checkpoint: {data.license}." if data.license else "The authors of this checkpoint have named none."
    if data.base_model and data.library_name != "peft":
        terms += " It holds weights of the models named above, whose licences go on to apply."
    return f"{terms} The Python files are those of blip2-hf, Apache-2.0.\n"


__all__ = ["CARD_NAME", "PIPELINE_TAGS", "check_facts", "class_name", "is_ours", "write_model_card"]
