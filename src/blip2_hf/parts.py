"""The checkpoints that a BLIP-2 is made of."""

import os

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


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token id of `<image>`: that which the tokenizer has, or the next one free."""
    token_id = tokenizer.get_vocab().get(getattr(tokenizer, "image_token", None) or "<image>")
    return len(tokenizer) if token_id is None else token_id


def language_model_class(config: PreTrainedConfig) -> type:
    """The Auto class of a language model."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def load_language_model(language_model: str | os.PathLike | PreTrainedModel, **kwargs) -> PreTrainedModel:
    """
    A causal or sequence-to-sequence language model, from a folder or an id on the Hub if it is not there yet.
    Keyword arguments are those of `from_pretrained`.
    """
    if not isinstance(language_model, (str, os.PathLike)):
        if kwargs:
            raise ValueError(f"{sorted(kwargs)} are for loading a language model, but one that is loaded was given.")
        return language_model
    config = AutoConfig.from_pretrained(language_model)
    return language_model_class(config).from_pretrained(language_model, config=config, **kwargs)


def load_tower(vision_model: str | os.PathLike | PreTrainedModel) -> PreTrainedModel:
    """A vision tower, from a folder or an id on the Hub if it is not there yet; of CLIP and SigLIP the vision part."""
    if isinstance(vision_model, PreTrainedModel):
        return getattr(vision_model, "vision_model", vision_model)
    config = AutoConfig.from_pretrained(vision_model)
    if hasattr(config, "vision_config"):
        return MODEL_MAPPING[type(config.vision_config)].from_pretrained(vision_model)
    return AutoModel.from_pretrained(vision_model)


def load_tower_config(vision_model: str | os.PathLike | PreTrainedModel) -> PreTrainedConfig:
    """The configuration of what [`load_tower`] loads, without its weights."""
    if isinstance(vision_model, PreTrainedModel):
        return load_tower(vision_model).config
    config = AutoConfig.from_pretrained(vision_model)
    return getattr(config, "vision_config", config)


@torch.no_grad()
def measure_width(tower: PreTrainedModel, vision_feature_layer: int | None) -> int:
    """Width of the features of a tower whose configuration does not tell (timm): a feature map's channels."""
    size = getattr(tower.config, "image_size", None) or 224
    pixel_values = torch.zeros(1, 3, size, size, dtype=tower.dtype, device=tower.device)
    outputs = tower(pixel_values=pixel_values, output_hidden_states=vision_feature_layer is not None, return_dict=True)
    features = (
        outputs.last_hidden_state if vision_feature_layer is None else outputs.hidden_states[vision_feature_layer]
    )
    return features.shape[1 if features.dim() == 4 else -1]
