"""The vision towers of LAVIS, from their own files and from transformers' CLIP."""

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights
from transformers.modeling_utils import PreTrainedModel

from ..models.backbones import load_tower
from ..models.configuration_blip2 import Blip2Config, Blip2VisionConfig
from ..models.modeling_vision import Blip2VisionModel
from .lavis_names import ConversionReport, convert_lavis_state_dict
from .lavis_sizes import vision_config_from_shapes
from .reading import StateDict, check_shapes, enumerate_names, match_name, read_state_dict


PREFIX = "visual_encoder."
# How many blocks LAVIS keeps of its towers, by (is a CLIP, width): all but the last
DEPTHS = {(False, 1408): 39, (True, 1024): 23}
# What a tower has behind its blocks, and why it is left
BEHIND_THE_BLOCKS = (
    (r"(norm|fc_norm|ln_post)\.(weight|bias)", "a LayerNorm behind the blocks: LAVIS takes its input"),
    (r"head\.(weight|bias)|proj", "the projection to CLIP's own space, which BLIP-2 does not use"),
)
# A parameter of transformers' CLIP, and its name here; queries, keys and values are joined in `tower_from_clip`
CLIP_RENAMINGS = (
    (r"embeddings\.(class_embedding|patch_embedding\.weight)", r"embeddings.\1"),
    (r"embeddings\.position_embedding\.weight", r"embeddings.position_embedding"),
    (r"pre_layrnorm\.(weight|bias)", r"pre_layernorm.\1"),
    (r"(encoder\.layers\.\d+\.self_attn)\.out_proj\.(weight|bias)", r"\1.projection.\2"),
    (r"(encoder\.layers\.\d+\.(?:layer_norm[12]|mlp\.fc[12])\.(?:weight|bias))", r"\1"),
)


def load_lavis_tower(
    path_or_state_dict: str | os.PathLike | Mapping[str, Any], config: Blip2VisionConfig | None = None
) -> Blip2VisionModel:
    r"""
    Load a vision tower from LAVIS's own file of it, `eva_vit_g.pth` or `clip_vit_L.pth`. BLIP-2 takes all blocks but
    the last, and nothing behind them.

    Args:
        path_or_state_dict (`str`, `os.PathLike` or `dict`):
            The file, of which only tensors and plain values are read, or the state dict that is in it.
        config ([`Blip2VisionConfig`], *optional*):
            The tower's configuration, needed if the tower is neither of the two. If its `image_size` is not that of
            the file, the position embeddings are interpolated, as LAVIS does.

    Returns:
        [`Blip2VisionModel`]: the tower, in eval mode. The LayerNorm behind it, which BLIP-2 trains, is new.

    Raises:
        ValueError: if the file holds something else.

    Example:

    ```python
    >>> from blip2_hf import Blip2ForPreTraining
    >>> from blip2_hf.convert import load_lavis_tower

    >>> tower = load_lavis_tower("eva_vit_g.pth")
    >>> model = Blip2ForPreTraining.from_encoders_pretrained(tower, "google-bert/bert-base-uncased")
    ```"""
    return _load(path_or_state_dict, config)[0]


def load_tower_for_lavis(
    vision_model: str | os.PathLike | PreTrainedModel, config: Blip2Config | None
) -> tuple[PreTrainedModel, ConversionReport | None]:
    """Load a tower whose output is what LAVIS takes, and return it with the report of its file if LAVIS wrote it."""
    vision_config = None if config is None else config.vision_config
    if not isinstance(vision_config, Blip2VisionConfig):
        vision_config = None
    if isinstance(vision_model, (str, os.PathLike)) and os.path.isfile(vision_model):
        return _load(vision_model, vision_config)
    tower = load_tower(vision_model)
    if tower.config.model_type == "clip_vision_model":
        own = tower.config
        depth = DEPTHS.get((True, own.hidden_size)) if vision_config is None else vision_config.num_hidden_layers
        # It still has the block that BLIP-2 leaves out
        if depth is not None and own.num_hidden_layers == depth + 1:
            tower = tower_from_clip(tower)
            if vision_config is not None:
                resize_tower(tower, vision_config.image_size)
    return tower, None


def _load(path_or_state_dict, config: Blip2VisionConfig | None) -> tuple[Blip2VisionModel, ConversionReport]:
    state_dict, left = read_state_dict(path_or_state_dict)
    depth = _depth(state_dict) if config is None else config.num_hidden_layers
    for name in state_dict:
        block = re.match(r"(?:transformer\.res)?blocks\.(\d+)\.", name)
        if block and int(block[1]) >= depth:
            left[name] = f"LAVIS takes the output of block {depth - 1}"
        for pattern, why in BEHIND_THE_BLOCKS:
            if re.fullmatch(pattern, name):
                left[name] = why
    kept = {PREFIX + name: tensor for name, tensor in state_dict.items() if name not in left}
    weights, report = convert_lavis_state_dict(kept)
    own = vision_config_from_shapes(weights, config)
    report.taken = {name.removeprefix(PREFIX): new_name for name, new_name in report.taken.items()}
    report.left = left
    tower = _make(own, {name.removeprefix("vision_model."): tensor for name, tensor in weights.items()})
    if config is not None and config.image_size != own.image_size:
        resize_tower(tower, config.image_size)
        report.reshaped["vision_model.embeddings.position_embedding"] = (
            f"interpolated from {own.image_size} to {config.image_size} pixels"
        )
    return tower, report


def _depth(state_dict: StateDict) -> int:
    embedding = state_dict.get("cls_token", state_dict.get("class_embedding"))
    width = None if embedding is None else embedding.shape[-1]
    depth = DEPTHS.get(("class_embedding" in state_dict, width))
    if depth is None:
        raise ValueError(
            "A file of EVA-CLIP ViT-g (1408 wide) or CLIP ViT-L (1024 wide) was expected as vision_model, but this "
            f"has {f'a width of {width}' if width else enumerate_names(sorted(state_dict), 5)}. Give a config."
        )
    return depth


def _make(config: Blip2VisionConfig, weights: StateDict) -> Blip2VisionModel:
    """Make a tower of these weights, which must be all that it has."""
    with no_init_weights():
        tower = Blip2VisionModel(config)
    tower.post_layernorm.reset_parameters()
    expected = {name: p for name, p in tower.state_dict().items() if not name.startswith("post_layernorm.")}
    if differing := sorted(expected.keys() ^ weights.keys()):
        raise ValueError(
            f"{len(differing)} parameters of the tower are not in the file, or the other way round: "
            f"{enumerate_names(differing)}. Give a whole file, or a config of its sizes."
        )
    check_shapes(weights, expected)
    tower.load_state_dict(weights, strict=False)
    return tower.eval()


@torch.no_grad()
def tower_from_clip(clip: PreTrainedModel) -> Blip2VisionModel:
    """Make the tower that LAVIS makes of a CLIP: the same numbers, without the last block."""
    given = {name.removeprefix("vision_model."): tensor for name, tensor in clip.state_dict().items()}
    depth = clip.config.num_hidden_layers - 1
    renamed = ((match_name(name, CLIP_RENAMINGS), tensor) for name, tensor in given.items())
    weights: StateDict = {
        name: tensor for name, tensor in renamed if name and not name.startswith(f"encoder.layers.{depth}.")
    }
    for index in range(depth):
        attention = f"encoder.layers.{index}.self_attn"
        for kind in ("weight", "bias"):
            weights[f"{attention}.qkv.{kind}"] = torch.cat([given[f"{attention}.{x}_proj.{kind}"] for x in "qkv"])
    for name in ("class_embedding", "position_embedding"):
        weights[f"embeddings.{name}"] = weights[f"embeddings.{name}"].reshape(1, -1, clip.config.hidden_size)
    weight = weights["embeddings.patch_embedding.weight"]
    weights["embeddings.patch_embedding.bias"] = weight.new_zeros(len(weight))
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size", "hidden_act")
    sizes = {name: getattr(clip.config, name) for name in (*names, "layer_norm_eps")}
    return _make(Blip2VisionConfig.clip_vit_l(num_hidden_layers=depth, **sizes), weights).to(clip.dtype)


@torch.no_grad()
def resize_tower(tower: Blip2VisionModel, image_size: int):
    r"""
    Adapt a tower to images of another size. Its position embeddings are interpolated once instead of at each image.

    Args:
        tower ([`Blip2VisionModel`]):
            The tower. It is changed.
        image_size (`int`):
            Side of the images in pixels.
    """
    embeddings = tower.embeddings
    positions = embeddings.interpolate_pos_encoding(embeddings.position_embedding, image_size, image_size)
    trained = embeddings.position_embedding.requires_grad
    embeddings.position_embedding = nn.Parameter(positions.clone(), requires_grad=trained)
    embeddings.image_size = tower.config.image_size = image_size
    embeddings.num_patches = positions.shape[1] - 1
    embeddings.num_positions = positions.shape[1]
