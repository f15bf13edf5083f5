"""Checks of a model by its configuration, before its weights are loaded."""

import os
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

# In transformers 5.17 the name in the package itself asks for torchvision
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ..models.configuration_blip2 import TRANSFORMERS_CONFIGS, Blip2Config, TransformersBlip2Config
from ..models.processing_blip2 import Blip2Processor
from .errors import first_sentence
from .inference import processor_place, weights_place


# What a model is needed for: to write with a language model, or also with the Q-Former alone; to match; to learn that
WRITING, WRITING_ALONE, MATCHING, LEARNING_TO_MATCH = "writing", "writing alone", "matching", "learning to match"
_STAGE1, _STAGE2, _RETRIEVAL = "Blip2ForPreTraining", "Blip2ForConditionalGeneration", "Blip2ForImageTextRetrieval"
_NAMES = {_STAGE1: "model of stage 1", _STAGE2: "model of stage 2", _RETRIEVAL: "model for retrieval"}
_NEEDS = {
    WRITING: (
        {_STAGE2},
        "has no language model",
        f"Give a model after stage 2 ({_STAGE2}), such as Salesforce/blip2-opt-2.7b",
    ),
    WRITING_ALONE: ({_STAGE1, _STAGE2}, "writes no text", f"Give a model of stage 1 or 2 ({_STAGE1}, {_STAGE2})"),
    MATCHING: (
        {_STAGE1, _RETRIEVAL},
        "has not learned to match images with texts",
        f"Give a model of stage 1 or for retrieval ({_STAGE1}, {_RETRIEVAL}), such as Salesforce/blip2-itm-vit-g",
    ),
    LEARNING_TO_MATCH: (
        {_STAGE1},
        "lacks weights for what is learned together: contrast, matching and captioning",
        f"Give a model of stage 1 ({_STAGE1}), such as what `blip2-hf convert` makes of LAVIS's blip2_pretrained.pth",
    ),
}


def check_checkpoint(name: str | os.PathLike, need: str | None = None, advice: str = ""):
    r"""
    Refuse a checkpoint that is no BLIP-2, or one of a class that lacks what is needed.

    Args:
        name (`str` or `os.PathLike`):
            Folder of a model or of adapters, or id on the Hub.
        need (`str`, *optional*):
            `"writing"` with a language model, `"writing alone"` with that or the Q-Former alone, `"matching"` of
            images with texts, `"learning to match"`.
        advice (`str`, *optional*, defaults to `""`):
            Another thing that a user can do. It ends the message.

    Raises:
        OSError: if there is no configuration, or it can't be read.
        ValueError: if it is the configuration of something else.
    """
    model_type, architecture = read_class(name)
    if model_type not in (Blip2Config.model_type, *TRANSFORMERS_CONFIGS):
        shown = f"of type {model_type!r}" if model_type else "of no type that its config.json names"
        raise ValueError(f"{name} is a model {shown}: a BLIP-2 was expected.")
    # A checkpoint that names no class is told by its weights
    if need is None or architecture is None:
        return
    fitting, lack, expected = _NEEDS[need]
    if architecture not in fitting:
        kind = _NAMES.get(architecture, "model")
        raise ValueError(f"{name} is a {kind} ({architecture}), which {lack}. {expected}{advice}.")


def check_not_quantized(name: str | os.PathLike, advice: str):
    """Refuse a checkpoint whose weights were saved in 4 or 8 bits. `advice` says what to give instead."""
    content, _ = PreTrainedConfig.get_config_dict(weights_place(name))
    if content.get("quantization_config"):
        raise ValueError(f"{name} was saved in 4 or 8 bits. {advice}")


def read_class(name: str | os.PathLike) -> tuple[str | None, str | None]:
    """Return type and class of a checkpoint, or of the model that adapters belong to, as config.json has them."""
    content, _ = PreTrainedConfig.get_config_dict(weights_place(name))
    architectures: Any = content.get("architectures") or [None]
    model_type, architecture = content.get("model_type"), architectures[0]
    if model_type in TRANSFORMERS_CONFIGS and model_type != TransformersBlip2Config.model_type:
        return model_type, _STAGE2  # an InstructBLIP
    return model_type, architecture and architecture.replace("Blip2Hf", "Blip2")


def load_processor(name: str | os.PathLike) -> Blip2Processor:
    """Load the processor of a model or, of adapters without one, that of their model."""
    return _load_part(Blip2Processor, name, "processor")


def load_image_processor(name: str | os.PathLike) -> Any:
    """Load the image processor of a model or, of adapters without one, that of their model."""
    return _load_part(AutoImageProcessor, name, "image processor")


def _load_part(part_class: Any, name: str | os.PathLike, kind: str) -> Any:
    try:
        return part_class.from_pretrained(processor_place(name))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} has no {kind} that can be loaded ({first_sentence(error)}). Copy what the model that it was made "
            "of has beside its weights: processor_config.json or preprocessor_config.json, and the tokenizer's files."
        ) from error


__all__ = [
    "LEARNING_TO_MATCH",
    "MATCHING",
    "WRITING",
    "WRITING_ALONE",
    "check_checkpoint",
    "check_not_quantized",
    "load_image_processor",
    "load_processor",
    "read_class",
]
