"""The code next to a model: the files of models/ that it needs without this package."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.pipelines.base import Pipeline
from transformers.processing_utils import ProcessorMixin

from ..jobs.atomic_files import write_text
from .model_card import write_model_card


# The Auto classes that load each model, and the class that each loads, as in _registration.py
_AUTO_CLASSES = {
    "Blip2HfForConditionalGeneration": {
        "AutoModelForImageTextToText": "modeling_blip2.Blip2HfForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_blip2.Blip2HfForConditionalGeneration",
        "AutoModelForVisualQuestionAnswering": "modeling_blip2.Blip2HfForConditionalGeneration",
    },
    "Blip2HfForPreTraining": {
        "AutoModelForPreTraining": "modeling_pretraining.Blip2HfForPreTraining",
        "AutoModelForZeroShotImageClassification": "modeling_retrieval.Blip2HfForImageTextRetrieval",
    },
    "Blip2HfForImageTextRetrieval": {
        "AutoModelForZeroShotImageClassification": "modeling_retrieval.Blip2HfForImageTextRetrieval",
    },
    "Blip2HfVisionModelWithProjection": {"AutoModel": "modeling_projection.Blip2HfVisionModelWithProjection"},
    "Blip2HfTextModelWithProjection": {"AutoModel": "modeling_projection.Blip2HfTextModelWithProjection"},
    "Blip2HfModel": {},
}
_AUTO_CLASSES_OF_ALL = {
    "AutoConfig": "configuration_blip2.Blip2HfConfig",
    "AutoModel": "modeling_base.Blip2HfModel",
}
PROCESSOR = "processing_blip2.Blip2HfProcessor"
# The pipelines for the models of each Auto class, and the Auto classes with which the pipelines load models
_PIPELINES = {
    "AutoModelForImageTextToText": {
        "image-to-text": ("pipeline_blip2.ImageToTextPipeline", ["AutoModelForImageTextToText"]),
        "visual-question-answering": (
            "pipeline_blip2.VisualQuestionAnsweringPipeline",
            ["AutoModelForVisualQuestionAnswering", "AutoModelForImageTextToText"],
        ),
    },
    "AutoModelForZeroShotImageClassification": {
        "zero-shot-image-classification": (
            "pipeline_zero_shot.ZeroShotImageClassificationPipeline",
            ["AutoModelForZeroShotImageClassification"],
        ),
    },
}


def write_code(folder: str | os.PathLike, shared: Any):
    r"""
    Put the source files next to the weights that `save_pretrained` has written, and `auto_map` and `custom_pipelines`
    into config.json and processor_config.json. `AutoModel...`, `AutoProcessor` and `pipeline` then load the folder
    with `trust_remote_code=True` without this package.

    Args:
        folder (`str` or `os.PathLike`):
            The folder.
        shared ([`Blip2PreTrainedModel`], [`Blip2Processor`] or one of the pipelines):
            What was saved there.

    Raises:
        ValueError: if the model's class is not one of this package.
    """
    folder = Path(folder)
    model, processor = parts_of(shared)
    if model is shared and not is_of_this_package(model):
        raise ValueError(
            f"{_class_name(model)} is none of the classes whose code this package can put next to the weights "
            f"({', '.join(_AUTO_CLASSES).replace('Blip2Hf', 'Blip2')}). For a class of your own, call its "
            "register_for_auto_class, and save without with_code, or push with "
            "transformers.PreTrainedModel.push_to_hub(model, repo_id)."
        )
    references: list[str] = []
    if type(processor).__name__ == "Blip2HfProcessor":
        _add_to_json(folder / "processor_config.json", {"auto_map": {"AutoProcessor": PROCESSOR}})
        references.append(PROCESSOR)
    if model is not None:
        auto_map, pipelines = _auto_map(model), _pipelines(shared, model)
        fields = {"auto_map": auto_map, "custom_pipelines": pipelines}
        _add_to_json(folder / "config.json", {name: value for name, value in fields.items() if value})
        references += [*auto_map.values(), *(pipeline["impl"] for pipeline in pipelines.values())]
    for source in source_files(references):
        write_text(folder / source.name, source.read_text(encoding="utf-8"))


def write_code_and_card(folder: str | os.PathLike, shared: Any):
    """Write the code (see [`write_code`]), and a card if there is none: what `with_code=True` does."""
    write_code(folder, shared)
    model, _ = parts_of(shared)
    if is_of_this_package(model):
        write_model_card(folder, model)


def parts_of(shared: Any) -> tuple[Any, Any]:
    """Return `(model, processor)`, both of a pipeline; otherwise one of them is `None`."""
    if isinstance(shared, Pipeline):
        return shared.model, shared.processor
    return (None, shared) if isinstance(shared, ProcessorMixin) else (shared, None)


def is_of_this_package(model: Any) -> bool:
    """Return whether the model's class is one of this package and not derived from one."""
    return _class_name(model) in _AUTO_CLASSES


def _class_name(model: Any) -> str:
    # FSDP's `fully_shard` adds the prefix
    return type(model).__name__.removeprefix("FSDP")


def _auto_map(model: Any) -> dict[str, str]:
    # Empty for models of other libraries, which the pipelines take too: their code is not ours to share
    return {**_AUTO_CLASSES_OF_ALL, **_AUTO_CLASSES[_class_name(model)]} if is_of_this_package(model) else {}


def _pipelines(shared: Any, model: Any) -> dict[str, dict[str, Any]]:
    """Return the entry `custom_pipelines` of config.json."""
    tasks = {task: entry for name in _auto_map(model) for task, entry in _PIPELINES.get(name, {}).items()}
    if not is_of_this_package(model):
        name = type(shared).__name__
        entries = [entry for table in _PIPELINES.values() for entry in table.items()]
        tasks = {task: entry for task, entry in entries if entry[0].endswith(f".{name}")}
    return {
        task: {"impl": reference, "pt": auto_classes, "type": "multimodal"}
        for task, (reference, auto_classes) in tasks.items()
    }


def source_files(references: list[str]) -> list[Path]:
    """Return the files of the modules in `module.Class` references, and of all that they import from this package."""
    files = set()
    for module in {reference.partition(".")[0] for reference in references}:
        path = importlib.import_module(f"blip2_hf.models.{module}").__file__
        files |= {Path(path), *map(Path, get_relative_import_files(path))}
    return sorted(files)


def _add_to_json(path: Path, fields: dict[str, Any]):
    content = json.loads(path.read_text(encoding="utf-8")) | fields
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def all_source_names() -> set[str]:
    """Return the names of all files that this version of the package can put next to a model."""
    classes = [reference for table in (_AUTO_CLASSES_OF_ALL, *_AUTO_CLASSES.values()) for reference in table.values()]
    pipelines = [reference for table in _PIPELINES.values() for reference, _ in table.values()]
    return {path.name for path in source_files([PROCESSOR, *classes, *pipelines])}


__all__ = ["all_source_names", "is_of_this_package", "parts_of", "source_files", "write_code", "write_code_and_card"]
