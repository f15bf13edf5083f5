"""Loading of vision towers and language models, and refusal of checkpoints that lack weights."""

import contextlib
import inspect
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .configuration_blip2 import (
    TRANSFORMERS_CONFIGS,
    Blip2Config,
    Blip2VisionConfig,
    is_tower_of_blip,
    public_class_name,
    vision_config_from_blip,
)
from .modeling_vision import Blip2AbsentVisionModel, Blip2AutoVisionModel, Blip2VisionModel


# The names of the tower inside a larger model, in transformers and here
_TOWER_PREFIX = r"(model\.)?(vision_model|vision_tower|vision_encoder|image_tower)\."


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token id of `<image>`: the id that the tokenizer has for it, otherwise the next free one."""
    token_id = tokenizer.get_vocab().get(getattr(tokenizer, "image_token", None) or "<image>")
    return len(tokenizer) if token_id is None else token_id


def load_whole(
    model_class: Any, name: str | os.PathLike, expected: str, not_needed: tuple[str, ...] = (), **kwargs
) -> Any:
    r"""
    Load a model from a checkpoint that has all its weights, because `from_pretrained` only warns of missing ones.

    Args:
        model_class (`type`):
            Class of the model, or an Auto class.
        name (`str` or `os.PathLike`):
            Folder or id on the Hub.
        expected (`str`):
            The kind of checkpoint that was expected, for the error.
        not_needed (`tuple[str, ...]`, *optional*):
            Beginnings of the names of weights that may be missing.
        kwargs:
            Arguments of `from_pretrained`.

    Returns:
        [`~transformers.PreTrainedModel`].

    Raises:
        ValueError: if weights are missing.
    """
    model, info = load_with_info(model_class, name, **kwargs)
    _refuse_missing(name, [key for key in info["missing_keys"] if not key.startswith(not_needed)], expected)
    return model


def load_with_info(model_class: Any, name: str | os.PathLike, **kwargs) -> tuple[Any, dict[str, list[str]]]:
    r"""
    Load a model, and the names of weights that are missing or have no place. Damaged ones are refused.

    Args:
        model_class (`type`):
            Class of the model, or an Auto class.
        name (`str` or `os.PathLike`):
            Folder or id on the Hub.
        kwargs:
            Arguments of `from_pretrained`.

    Returns:
        `tuple`: the model, and the sorted names as `missing_keys` and `unexpected_keys`.

    Raises:
        OSError: if a file is missing.
        ValueError: if a file is cut off or damaged, or weights have other shapes than the configuration says.
    """
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with _without_report():
            model, info = model_class.from_pretrained(name, **kwargs)
    except (EOFError, SafetensorError) as error:
        raise ValueError(
            f"A file of the weights of {name} is cut off or damaged ({error}). Copy or download it again."
        ) from error
    except OSError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise OSError(f"{name} can't be loaded ({reason}). Copy or download it again, all of its files.") from error
    if mismatched := sorted(str(key[0]) for key in info["mismatched_keys"]):
        raise ValueError(
            f"{len(mismatched)} weights of {name} have other shapes than its config.json says ({mismatched[0]}). Give "
            "a folder whose files are of one model."
        )
    return model, {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys")}


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers from its table of weights that are missing or unused: what is missing is an error here."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_no_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(is_no_report)
    try:
        yield
    finally:
        logger.removeFilter(is_no_report)


def _refuse_missing(name: str | os.PathLike, missing: list[str], expected: str):
    if missing:
        names = missing[0] + (", ..." if len(missing) > 1 else "")
        raise ValueError(
            f"{name} lacks {len(missing)} weights ({names}), which would be random. {expected} was expected."
        )


def language_model_class(config: PreTrainedConfig) -> type:
    """Return the Auto class of a language model."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def load_language_model(language_model: str | os.PathLike | PreTrainedModel, **kwargs) -> PreTrainedModel:
    r"""
    Load a causal or sequence-to-sequence language model, if it is not loaded yet.

    Args:
        language_model (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`]):
            Folder, id on the Hub, or the model itself.
        kwargs:
            Arguments of `from_pretrained`.

    Returns:
        [`~transformers.PreTrainedModel`].

    Raises:
        ValueError: if weights are missing, the model is a BLIP-2, or `kwargs` are given with a model that is loaded
            already.
    """
    if not isinstance(language_model, (str, os.PathLike)):
        _check_is_no_blip2(language_model.config, "The given model")
        if kwargs:
            raise ValueError(
                f"{sorted(kwargs)} were given with a language model that is loaded already: leave them out, or give "
                "its folder or id."
            )
        return language_model
    config = AutoConfig.from_pretrained(language_model)
    _check_is_no_blip2(config, str(language_model))
    expected = "A language model with its head"
    return load_whole(language_model_class(config), language_model, expected, config=config, **kwargs)


def _check_is_no_blip2(config: PreTrainedConfig, given: str):
    # AutoModelForCausalLM loads BLIP-2s of this library, because TRL loads them by it
    if config.model_type in (Blip2Config.model_type, *TRANSFORMERS_CONFIGS):
        raise ValueError(
            f"{given} is a BLIP-2: a language model was expected. To take that of a BLIP-2, load it, and give its "
            "attribute language_model."
        )


def load_tower(vision_model: str | os.PathLike | PreTrainedModel) -> PreTrainedModel:
    r"""
    Load a vision tower, if it is not loaded yet. If a model contains a tower (CLIP, SigLIP, LLaVA, BLIP, any BLIP-2),
    only the tower is loaded.

    Args:
        vision_model (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`]):
            Folder, id on the Hub, or the model itself.

    Returns:
        [`~transformers.PreTrainedModel`]: a [`Blip2VisionModel`] if it comes from a BLIP, BLIP-2 or InstructBLIP of
        transformers.

    Raises:
        ValueError: if there is no tower that takes images, or weights are missing that its output depends on.
    """
    if isinstance(vision_model, PreTrainedModel):
        return _tower_inside(vision_model)
    whole_config = AutoConfig.from_pretrained(vision_model)
    config = _tower_config(whole_config, vision_model)
    renamings = None
    if hasattr(whole_config, "vision_config"):
        is_wrapped = isinstance(whole_config, Blip2Config) and not isinstance(config, Blip2VisionConfig)
        prefix = r"vision_model\.tower\." if is_wrapped else _TOWER_PREFIX
        # transformers strips prefixes of its own, which other parts may have too
        renamings = {f"^(?!{prefix})": "of_another_part.", f"^{prefix}": ""}
    # Not AutoModel, because code from the Hub registers no classes
    model_class = Blip2VisionModel if isinstance(config, Blip2VisionConfig) else AutoModel
    tower, info = load_with_info(model_class, vision_model, config=config, key_mapping=renamings)
    if missing := info["missing_keys"]:
        expected = f"A checkpoint of a {config.model_type}, or of a model that has one as its vision tower,"
        _refuse_missing(vision_model, _used_weights(tower, missing), expected)
    return tower


def load_tower_config(vision_model: str | os.PathLike | PreTrainedModel) -> PreTrainedConfig:
    """Load the configuration of what [`load_tower`] loads, without its weights."""
    if isinstance(vision_model, PreTrainedModel):
        return load_tower(vision_model).config
    return _tower_config(AutoConfig.from_pretrained(vision_model), vision_model)


def _tower_config(config: PreTrainedConfig, name: str | os.PathLike) -> PreTrainedConfig:
    """Return the configuration of the tower, which is one of `AutoModel` or ours."""
    tower_config = getattr(config, "vision_config", config)
    if is_tower_of_blip(tower_config):
        return vision_config_from_blip(tower_config)
    if isinstance(tower_config, Blip2VisionConfig):
        return tower_config
    tower_class: Any = MODEL_MAPPING.get(type(tower_config), None)
    if tower_class is None or "pixel_values" not in inspect.signature(tower_class.forward).parameters:
        raise ValueError(
            f"{name} is of type {config.model_type!r}, in which there is no known vision tower. Give a tower of "
            "AutoModel (ViT, DINOv2, ...), or a model that has one (CLIP, SigLIP, LLaVA, BLIP-2, ...)."
        )
    return tower_config


def _tower_inside(model: PreTrainedModel) -> PreTrainedModel:
    """Return the tower of a loaded model, or the model itself if it is a tower."""
    config = getattr(model.config, "vision_config", model.config)
    if is_tower_of_blip(config):
        raise ValueError(
            f"The tower of transformers' {type(model).__name__} applies the LayerNorm that BLIP-2 has after its "
            "tower. Give the name of the checkpoint, or blip2_hf.Blip2Model.from_pretrained(...) of a BLIP-2."
        )
    parts = {name: part for name, part in model.named_modules() if isinstance(part, PreTrainedModel)}
    parts = {name: part for name, part in parts.items() if type(part.config) is type(config)}
    if not parts:
        raise ValueError(
            f"A {type(model).__name__} has no known vision tower. Give a tower of AutoModel (ViT, DINOv2, ...), or a "
            "model that has one (CLIP, SigLIP, LLaVA, BLIP-2, ...)."
        )
    # The tower for images, if there is one for videos too
    named = [part for name, part in parts.items() if re.match(_TOWER_PREFIX, f"{name}.")] or list(parts.values())
    # As AutoModel makes it: without the head of a classifier, for example
    tower_class = MODEL_MAPPING.get(type(config), None)
    tower: Any = next((part for part in named if type(part) is tower_class), named[0])
    if isinstance(tower, Blip2AbsentVisionModel):
        raise ValueError(
            f"This {public_class_name(model)} has no vision tower (has_vision_tower=False). Give the tower itself."
        )
    return tower.tower if isinstance(tower, Blip2AutoVisionModel) else tower


def blank_image(config: PreTrainedConfig, like: torch.Tensor) -> torch.Tensor:
    """
    Return the smallest batch that a tower takes.

    Args:
        config (`PreTrainedConfig`):
            Configuration of the tower.
        like (`torch.Tensor`):
            A weight of the tower, whose dtype and device are taken.

    Returns:
        `torch.Tensor` of shape `(1, channels, height, width)`, of zeros.
    """
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return like.new_zeros(1, getattr(config, "num_channels", 3), height, width)


def _used_weights(tower: PreTrainedModel, names: list[str]) -> list[str]:
    """Return the names of the weights that a tower's features depend on, which its pooler's are not."""
    weights = {name: weight for name, weight in tower.named_parameters() if name in names}
    if not weights:
        return names
    image = blank_image(tower.config, next(tower.parameters()))
    with torch.enable_grad():
        features = tower(pixel_values=image, return_dict=True).last_hidden_state
        gradients = torch.autograd.grad(features.float().sum(), list(weights.values()), allow_unused=True)
    unused = {name for name, gradient in zip(weights, gradients, strict=True) if gradient is None}
    return [name for name in names if name not in unused]


@torch.no_grad()
def measure_width(tower: PreTrainedModel, vision_feature_layer: int | None) -> int:
    """Measure the width of a tower's features if its configuration lacks it (timm): a feature map's channels."""
    image = blank_image(tower.config, next(tower.parameters()))
    outputs = tower(pixel_values=image, output_hidden_states=vision_feature_layer is not None, return_dict=True)
    features = (
        outputs.last_hidden_state if vision_feature_layer is None else outputs.hidden_states[vision_feature_layer]
    )
    # timm's Swin has channels last. The map of a square picture has as many rows as columns, by which it is told
    is_last = features.dim() == 3 or features.shape[1] == features.shape[2]
    return features.shape[-1 if is_last else 1]
