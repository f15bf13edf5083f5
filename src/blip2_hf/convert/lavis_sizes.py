"""The sizes of a BLIP-2 from LAVIS, read from the shapes of its tensors."""

import copy
import math
import re
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from ..models.configuration_blip2 import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig
from .reading import StateDict


# Heads of LAVIS's towers, which shapes do not show, by (is a CLIP, width)
TOWER_HEADS = {(False, 1408): 16, (True, 1024): 16}
QFORMER_HEAD_DIM = 64


def _shape(weights: StateDict, name: str) -> tuple[int, ...]:
    if name not in weights:
        raise ValueError(f"{name} is not in the file, so the model's sizes are unknown. Give a whole checkpoint.")
    return tuple(weights[name].shape)


def _layers(weights: StateDict, prefix: str, part: str = "") -> list[int]:
    """Return the indices of the layers with a parameter whose name in the layer starts with `part`."""
    matches = (re.match(rf"{re.escape(prefix)}\.(\d+)\.{re.escape(part)}", name) for name in weights)
    return sorted({int(match[1]) for match in matches if match})


def config_from_shapes(
    weights: StateDict, tower: PreTrainedModel | None, language_model: PreTrainedModel | None
) -> Blip2Config:
    """Make the configuration of a model from its weights and the parts that were given."""
    sizes = {"num_query_tokens": _shape(weights, "query_tokens.weight")[1]}
    if "vision_projection.weight" in weights:
        sizes["image_text_hidden_size"] = _shape(weights, "vision_projection.weight")[0]
    return Blip2Config(
        vision_config=vision_config_from_shapes(weights) if tower is None else copy.deepcopy(tower.config),
        qformer_config=_qformer_config_from_shapes(weights),
        text_config=None if language_model is None else copy.deepcopy(language_model.config),
        **sizes,
    )


def vision_config_from_shapes(weights: StateDict, config: Blip2VisionConfig | None = None) -> Blip2VisionConfig:
    """Make the configuration of a tower, or return `config` with the image size of its position embeddings."""
    width, _, patch_size, _ = _shape(weights, "vision_model.embeddings.patch_embedding.weight")
    num_patches = _shape(weights, "vision_model.embeddings.position_embedding")[1] - 1
    image_size = math.isqrt(num_patches) * patch_size
    if config is not None:
        return Blip2VisionConfig(**(config.to_dict() | {"image_size": image_size}))
    is_clip = "vision_model.pre_layernorm.weight" in weights
    if (is_clip, width) not in TOWER_HEADS:
        raise ValueError(
            f"The tower is {width} wide, so it is neither EVA-CLIP ViT-g (1408) nor CLIP ViT-L (1024), and the number "
            "of its heads is unknown. Give a config."
        )
    make = Blip2VisionConfig.clip_vit_l if is_clip else Blip2VisionConfig
    return make(
        hidden_size=width,
        intermediate_size=_shape(weights, "vision_model.encoder.layers.0.mlp.fc1.weight")[0],
        num_hidden_layers=len(_layers(weights, "vision_model.encoder.layers")),
        num_attention_heads=TOWER_HEADS[is_clip, width],
        image_size=image_size,
        patch_size=patch_size,
    )


def _qformer_config_from_shapes(weights: StateDict) -> Blip2QFormerConfig:
    layers = "qformer.encoder.layer"
    width = _shape(weights, "query_tokens.weight")[-1]
    if width % QFORMER_HEAD_DIM:
        raise ValueError(
            f"The Q-Former is {width} wide, which is no multiple of the {QFORMER_HEAD_DIM} of BERT's heads, so the "
            "number of its heads is unknown. Give a config."
        )
    num_layers = len(_layers(weights, layers))
    cross_layers = _layers(weights, layers, "crossattention.")
    sizes = {"use_qformer_text_input": bool(_layers(weights, layers, "intermediate."))}
    if "embeddings.word_embeddings.weight" in weights:
        # [DEC] is the last token of LAVIS's vocabulary
        sizes["vocab_size"] = _shape(weights, "embeddings.word_embeddings.weight")[0]
        sizes["bos_token_id"] = sizes["vocab_size"] - 1
        sizes["max_position_embeddings"] = _shape(weights, "embeddings.position_embeddings.weight")[0]
    return Blip2QFormerConfig(
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=width // QFORMER_HEAD_DIM,
        intermediate_size=_shape(weights, f"{layers}.0.intermediate_query.dense.weight")[0],
        cross_attention_frequency=cross_layers[1] if len(cross_layers) > 1 else max(num_layers, 1),
        encoder_hidden_size=_shape(weights, f"{layers}.0.crossattention.attention.key.weight")[1],
        **sizes,
    )


def config_with_parts(
    config: Blip2Config, tower: PreTrainedModel | None, language_model: PreTrainedModel | None
) -> Blip2Config:
    """Copy the configuration, and put the configurations of the given parts into it."""
    parts: dict[str, Any] = {}
    if tower is not None:
        parts |= {"vision_config": copy.deepcopy(tower.config), "has_vision_tower": True}
    if language_model is not None:
        parts["text_config"] = copy.deepcopy(language_model.config)
    return Blip2Config(**(config.to_dict() | parts)) if parts else copy.deepcopy(config)
