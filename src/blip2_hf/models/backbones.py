"""The checkpoints that a BLIP-2 is made of, and that a part which is loaded is whole."""

import inspect
import os
import re
from typing import Any

import torch
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

from .configuration_blip2 import Blip2Config, Blip2VisionConfig, is_tower_of_blip, vision_config_from_blip
from .modeling_vision import Blip2AbsentVisionModel, Blip2AutoVisionModel, Blip2VisionModel


# What models that have a tower call it, in transformers and here
_IN_A_MODEL = r"(model\.)?(vision_model|vision_tower|vision_encoder|image_tower)\."


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token id of `<image>`: that which the tokenizer has, or the next one free."""
    token_id = tokenizer.get_vocab().get(getattr(tokenizer, "image_token", None) or "<image>")
    return len(tokenizer) if token_id is None else token_id


def load_whole(
    model_class: Any, name: str | os.PathLike, expected: str, not_needed: tuple[str, ...] = (), **kwargs
) -> Any:
    r"""
    Load a checkpoint that has all the weights of a model: `from_pretrained` makes up what is missing, with a warning.

    Args:
        model_class (`type`):
            Class of the model, or an Auto class.
        name (`str` or `os.PathLike`):
            Folder or id on the Hub.
        expected (`str`):
            The kind of checkpoint that the error asks for.
        not_needed (`tuple[str, ...]`, *optional*):
            What the names of weights begin with that may be missing.
        kwargs:
            Those of `from_pretrained`.

    Returns:
        [`~transformers.PreTrainedModel`].

    Raises:
        ValueError: if weights are missing.
    """
    model, missing = _load_and_tell_missing(model_class, name, **kwargs)
    _refuse_missing(name, [key for key in missing if not key.startswith(not_needed)], expected)
    return model


def _load_and_tell_missing(model_class: Any, name: str | os.PathLike, **kwargs) -> tuple[Any, list[str]]:
    model, info = model_class.from_pretrained(name, output_loading_info=True, **kwargs)
    return model, sorted(str(key) for key in info["missing_keys"])


def _refuse_missing(name: str | os.PathLike, missing: list[str], expected: str):
    if missing:
        names = missing[0] + (", ..." if len(missing) > 1 else "")
        raise ValueError(
            f"{name} lacks {len(missing)} weights ({names}), which would be random. {expected} was expected."
        )


def language_model_class(config: PreTrainedConfig) -> type:
    """The Auto class of a language model."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def load_language_model(language_model: str | os.PathLike | PreTrainedModel, **kwargs) -> PreTrainedModel:
    r"""
    Load a causal or sequence-to-sequence language model, if it is not loaded yet.

    Args:
        language_model (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`]):
            Folder, id on the Hub, or the model itself.
        kwargs:
            Those of `from_pretrained`.

    Returns:
        [`~transformers.PreTrainedModel`].

    Raises:
        ValueError: if weights are missing, or arguments for loading are given with a model that is loaded.
    """
    if not isinstance(language_model, (str, os.PathLike)):
        if kwargs:
            raise ValueError(f"{sorted(kwargs)} are for loading a language model, but one that is loaded was given.")
        return language_model
    config = AutoConfig.from_pretrained(language_model)
    expected = "A language model with its head"
    return load_whole(language_model_class(config), language_model, expected, config=config, **kwargs)


def load_tower(vision_model: str | os.PathLike | PreTrainedModel) -> PreTrainedModel:
    r"""
    Load a vision tower, if it is not loaded yet. Of a model that has a tower in it (CLIP, SigLIP, LLaVA, BLIP, any
    BLIP-2), the tower alone is loaded.

    Args:
        vision_model (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`]):
            Folder, id on the Hub, or the model itself.

    Returns:
        [`~transformers.PreTrainedModel`]: a [`Blip2VisionModel`] if it comes from a BLIP, BLIP-2 or InstructBLIP of
        transformers.

    Raises:
        ValueError: if there is no tower that takes pictures, or weights are missing that its output comes from.
    """
    if isinstance(vision_model, PreTrainedModel):
        return _tower_inside(vision_model)
    whole_config = AutoConfig.from_pretrained(vision_model)
    config = _tower_config(whole_config, vision_model)
    renamings = None
    if hasattr(whole_config, "vision_config"):
        is_wrapped = isinstance(whole_config, Blip2Config) and not isinstance(config, Blip2VisionConfig)
        prefix = r"vision_model\.tower\." if is_wrapped else _IN_A_MODEL
        # transformers strips prefixes of its own, which other parts may have too
        renamings = {f"^(?!{prefix})": "of_another_part.", f"^{prefix}": ""}
    # Without a registration where the code comes from the Hub
    model_class = Blip2VisionModel if isinstance(config, Blip2VisionConfig) else AutoModel
    tower, missing = _load_and_tell_missing(model_class, vision_model, config=config, key_mapping=renamings)
    if missing:
        expected = f"A checkpoint of a {config.model_type}, or of a model that has one as its vision tower,"
        _refuse_missing(vision_model, _read_weights(tower, missing), expected)
    return tower


def load_tower_config(vision_model: str | os.PathLike | PreTrainedModel) -> PreTrainedConfig:
    """Load the configuration of what [`load_tower`] loads, without its weights."""
    if isinstance(vision_model, PreTrainedModel):
        return load_tower(vision_model).config
    return _tower_config(AutoConfig.from_pretrained(vision_model), vision_model)


def _tower_config(config: PreTrainedConfig, name: str | os.PathLike) -> PreTrainedConfig:
    """The configuration of a tower that `AutoModel` makes, or of ours."""
    tower_config = getattr(config, "vision_config", config)
    if is_tower_of_blip(tower_config):
        return vision_config_from_blip(tower_config)
    if isinstance(tower_config, Blip2VisionConfig):
        return tower_config
    tower_class: Any = MODEL_MAPPING.get(type(tower_config), None)
    if tower_class is None or "pixel_values" not in inspect.signature(tower_class.forward).parameters:
        raise ValueError(
            f"{name} is of type {config.model_type!r}, out of which no vision tower is taken. Give a tower of "
            "AutoModel (ViT, DINOv2, ...), or a model that has one (CLIP, SigLIP, LLaVA, BLIP-2, ...)."
        )
    return tower_config


def _tower_inside(model: PreTrainedModel) -> PreTrainedModel:
    """The tower of a model that is loaded, or the model itself if it is one."""
    config = getattr(model.config, "vision_config", model.config)
    if is_tower_of_blip(config):
        raise ValueError(
            f"The tower of transformers' {type(model).__name__} applies the LayerNorm that BLIP-2 has behind its "
            "tower. Give the name of the checkpoint, or blip2_hf.Blip2Model.from_pretrained(...) of a BLIP-2."
        )
    parts = {name: part for name, part in model.named_modules() if isinstance(part, PreTrainedModel)}
    parts = {name: part for name, part in parts.items() if type(part.config) is type(config)}
    if not parts:
        raise ValueError(
            f"No vision tower is taken out of a {type(model).__name__}. Give a tower of AutoModel (ViT, DINOv2, ...), "
            "or a model that has one (CLIP, SigLIP, LLaVA, BLIP-2, ...)."
        )
    # That of pictures, if there is one of videos too
    named = [part for name, part in parts.items() if re.match(_IN_A_MODEL, f"{name}.")] or list(parts.values())
    # As AutoModel makes it: without the head of a classifier, for example
    tower_class = MODEL_MAPPING.get(type(config), None)
    tower: Any = next((part for part in named if type(part) is tower_class), named[0])
    if isinstance(tower, Blip2AbsentVisionModel):
        raise ValueError(f"This {type(model).__name__} has no vision tower (has_vision_tower=False).")
    return tower.tower if isinstance(tower, Blip2AutoVisionModel) else tower


def blank_picture(config: PreTrainedConfig, like: torch.Tensor) -> torch.Tensor:
    """
    Return the smallest batch that a tower takes.

    Args:
        config (`PreTrainedConfig`):
            Configuration of the tower.
        like (`torch.Tensor`):
            A weight of the tower, for the type and the device.

    Returns:
        `torch.Tensor` of shape `(1, channels, height, width)`, of zeros.
    """
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return like.new_zeros(1, getattr(config, "num_channels", 3), height, width)


def _read_weights(tower: PreTrainedModel, names: list[str]) -> list[str]:
    """Those of the names that the features of a tower come from: not of its pooler, for example."""
    weights = {name: weight for name, weight in tower.named_parameters() if name in names}
    if not weights:
        return names
    picture = blank_picture(tower.config, next(tower.parameters()))
    with torch.enable_grad():
        features = tower(pixel_values=picture, return_dict=True).last_hidden_state
        gradients = torch.autograd.grad(features.float().sum(), list(weights.values()), allow_unused=True)
    unread = {name for name, gradient in zip(weights, gradients, strict=True) if gradient is None}
    return [name for name in names if name not in unread]


@torch.no_grad()
def measure_width(tower: PreTrainedModel, vision_feature_layer: int | None) -> int:
    """Measure the width of a tower's features, if its configuration does not tell (timm): a feature map's channels."""
    picture = blank_picture(tower.config, next(tower.parameters()))
    outputs = tower(pixel_values=picture, output_hidden_states=vision_feature_layer is not None, return_dict=True)
    features = (
        outputs.last_hidden_state if vision_feature_layer is None else outputs.hidden_states[vision_feature_layer]
    )
    return features.shape[1 if features.dim() == 4 else -1]
