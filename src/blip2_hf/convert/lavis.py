"""
Checkpoints of BLIP-2 in LAVIS, the authors' code: `RENAMINGS` says which name there is which here, functions do what a
new name does not, and a [`ConversionReport`] accounts for each tensor.
"""

import copy
import math
import os
import pickle
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5DenseGatedActDense
from transformers.utils import logging

from ..configuration_blip2 import (
    Blip2Config,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    TransformersBlip2VisionConfig,
)
from ..modeling_blip2 import Blip2ForConditionalGeneration, Blip2PreTrainedModel
from ..modeling_pretraining import Blip2ForPreTraining
from ..modeling_retrieval import Blip2ForImageTextRetrieval
from ..parts import image_token_id, load_language_model, load_tower


logger = logging.get_logger(__name__)

StateDict = dict[str, torch.Tensor]

# A parameter's whole name in LAVIS, and its name here; the first pattern that matches is taken
RENAMINGS: tuple[tuple[str, str], ...] = (
    # EVA-CLIP ViT-g
    (r"visual_encoder\.cls_token", r"vision_model.embeddings.class_embedding"),
    (r"visual_encoder\.pos_embed", r"vision_model.embeddings.position_embedding"),
    (r"visual_encoder\.patch_embed\.proj\.(weight|bias)", r"vision_model.embeddings.patch_embedding.\1"),
    (r"visual_encoder\.blocks\.(\d+)\.norm([12])\.(weight|bias)", r"vision_model.encoder.layers.\1.layer_norm\2.\3"),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.qkv\.weight", r"vision_model.encoder.layers.\1.self_attn.qkv.weight"),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.([qv]_bias)", r"vision_model.encoder.layers.\1.self_attn.\2"),
    (
        r"visual_encoder\.blocks\.(\d+)\.attn\.proj\.(weight|bias)",
        r"vision_model.encoder.layers.\1.self_attn.projection.\2",
    ),
    (r"visual_encoder\.blocks\.(\d+)\.mlp\.(fc[12])\.(weight|bias)", r"vision_model.encoder.layers.\1.mlp.\2.\3"),
    # CLIP ViT-L
    (r"visual_encoder\.class_embedding", r"vision_model.embeddings.class_embedding"),
    (r"visual_encoder\.positional_embedding", r"vision_model.embeddings.position_embedding"),
    (r"visual_encoder\.conv1\.weight", r"vision_model.embeddings.patch_embedding.weight"),
    (r"visual_encoder\.ln_pre\.(weight|bias)", r"vision_model.pre_layernorm.\1"),
    (
        r"visual_encoder\.transformer\.resblocks\.(\d+)\.ln_([12])\.(weight|bias)",
        r"vision_model.encoder.layers.\1.layer_norm\2.\3",
    ),
    (
        r"visual_encoder\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)",
        r"vision_model.encoder.layers.\1.self_attn.qkv.\2",
    ),
    (
        r"visual_encoder\.transformer\.resblocks\.(\d+)\.attn\.out_proj\.(weight|bias)",
        r"vision_model.encoder.layers.\1.self_attn.projection.\2",
    ),
    (
        r"visual_encoder\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(weight|bias)",
        r"vision_model.encoder.layers.\1.mlp.fc1.\2",
    ),
    (
        r"visual_encoder\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(weight|bias)",
        r"vision_model.encoder.layers.\1.mlp.fc2.\2",
    ),
    (r"ln_vision\.(weight|bias)", r"vision_model.post_layernorm.\1"),
    # Q-Former
    (r"query_tokens", r"query_tokens.weight"),
    (r"Qformer\.bert\.embeddings\.LayerNorm\.(weight|bias)", r"qformer.layernorm.\1"),
    (r"Qformer\.bert\.embeddings\.((?:word|position)_embeddings)\.weight", r"embeddings.\1.weight"),
    (
        r"Qformer\.bert\.encoder\.layer\.(\d+)\.((?:cross)?attention)\.self\.(query|key|value)\.(weight|bias)",
        r"qformer.encoder.layer.\1.\2.attention.\3.\4",
    ),
    (
        r"Qformer\.bert\.encoder\.layer\.(\d+)\.((?:(?:cross)?attention\.)?(?:intermediate|output)(?:_query)?"
        r"\.(?:dense|LayerNorm)\.(?:weight|bias))",
        r"qformer.encoder.layer.\1.\2",
    ),
    # Heads of stage 1
    (r"Qformer\.cls\.predictions\.(.+)", r"lm_head.\1"),
    (r"vision_proj\.(weight|bias)", r"vision_projection.\1"),
    (r"text_proj\.(weight|bias)", r"text_projection.\1"),
    (r"itm_head\.(weight|bias)", r"itm_head.\1"),
    (r"temp", r"temperature.weight"),
    # Stage 2
    (r"(?:opt|t5)_proj\.(weight|bias)", r"language_projection.\1"),
    (r"(?:opt|t5)_model\.(.+)", r"language_model.\1"),
)
# What is no weight, and why
BUFFERS = {"Qformer.bert.embeddings.position_ids": "a buffer: 0, 1, 2, ..."}
# Stored with fewer axes in some files: axes of length 1 are added in front
DIMENSIONS = {
    "temperature.weight": 1,
    "vision_model.embeddings.class_embedding": 3,
    "vision_model.embeddings.position_embedding": 3,
}
# One tensor in LAVIS's model, stored under both names
TIED = (
    ("lm_head.decoder.weight", "embeddings.word_embeddings.weight"),
    ("lm_head.decoder.bias", "lm_head.bias"),
)
# Heads of the towers that LAVIS has, which shapes do not tell, by (is a CLIP, width)
TOWER_HEADS = {(False, 1408): 16, (True, 1024): 16}
QFORMER_HEAD_DIM = 64
LANGUAGE_MODEL_TYPES = {"opt_proj.weight": "opt", "t5_proj.weight": "t5"}


@dataclass
class ConversionReport:
    r"""
    What became of each tensor of a LAVIS checkpoint.

    Args:
        taken (`dict[str, str]`):
            LAVIS's name of each tensor that was taken, and the parameter that it became (part of).
        reshaped (`dict[str, str]`):
            Parameters that are not stored as they are here, and what they were made of.
        left (`dict[str, str]`):
            LAVIS's name of each tensor that was not taken, and why.
        missing (`list[str]`):
            Parameters that are not in the checkpoint, but came with `vision_model` or `language_model`.
    """

    taken: dict[str, str] = field(default_factory=dict)
    reshaped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        sections = {
            "taken": [f"{name} -> {new_name}" for name, new_name in self.taken.items()],
            "reshaped": [f"{name}: {how}" for name, how in self.reshaped.items()],
            "left": [f"{name}: {why}" for name, why in self.left.items()],
            "missing (in the parts given)": list(self.missing),
        }
        lines = []
        for title, entries in sections.items():
            lines.append(f"{title}: {len(entries)}")
            # Layers that are alike share a line
            counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", entry) for entry in entries)
            lines += [f"  {entry}{f' ({count} times)' if count > 1 else ''}" for entry, count in counts.items()]
        return "\n".join(lines)

    def leave(self, new_name: str, why: str):
        """Moves what had become `new_name` from `taken` to `left`."""
        for name in self.sources(new_name):
            del self.taken[name]
            self.left[name] = why
        self.reshaped.pop(new_name, None)

    def sources(self, new_name: str) -> list[str]:
        """LAVIS's names of what became `new_name`."""
        return [name for name, taken_as in self.taken.items() if taken_as == new_name]


def load_lavis_checkpoint(
    path_or_state_dict: str | os.PathLike | Mapping[str, Any],
    config: Blip2Config | None = None,
    model_class: type[Blip2PreTrainedModel] | None = None,
    *,
    language_model: str | os.PathLike | PreTrainedModel | None = None,
    vision_model: str | os.PathLike | PreTrainedModel | None = None,
) -> Blip2PreTrainedModel:
    r"""
    Loads a BLIP-2 that was saved by LAVIS, the authors' code. Each tensor is accounted for: what is unknown or missing
    is an error, and the [`ConversionReport`] is logged at level info.

    LAVIS leaves frozen parts out of its files: the language model always, the vision tower where it was not trained.
    They are given as `language_model` and `vision_model`, and become part of the model that is returned: the tower
    gets the LayerNorm of the file, and a FlanT5 the activation that LAVIS runs it with.

    Args:
        path_or_state_dict (`str`, `os.PathLike` or `dict`):
            A file of `torch.save` (of which only tensors and plain values are read, no code is run) or of safetensors,
            or what is in it: a state dict, or a `dict` with one under `"model"`.
        config ([`Blip2Config`], *optional*):
            Sizes. Read from the file if it is not given: the Q-Former's heads are then taken to be 64 wide, as BERT's
            are, and the tower to be EVA-CLIP ViT-g or CLIP ViT-L.
        model_class (`type`, *optional*):
            Class of the model, such as [`Blip2Model`]. Told from the file if it is not given: [`Blip2ForPreTraining`]
            if there is the Q-Former's language-modelling head, [`Blip2ForConditionalGeneration`] if there is a
            projection to a language model, [`Blip2ForImageTextRetrieval`] if there is a head for matching alone.
        language_model (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`], *optional*):
            The language model that the file was trained with. `image_token_index` is taken from its tokenizer where it
            is a folder or an id and `config` is not given.
        vision_model (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`], *optional*):
            The tower that the file was trained with, or a BLIP-2 that has it. Its `last_hidden_state`, or what
            `config.vision_feature_layer` picks, is to be what LAVIS takes: the output of the last block but one,
            before any LayerNorm.

    Returns:
        [`Blip2ForPreTraining`], [`Blip2ForConditionalGeneration`], [`Blip2ForImageTextRetrieval`] or `model_class`: in
        eval mode, its tower and language model frozen.

    Raises:
        ValueError: if the file holds something else, lacks a part that is not given, or does not fit `config`.

    Example:

    ```python
    >>> from blip2_hf import Blip2Model, load_lavis_checkpoint

    >>> tower = Blip2Model.from_pretrained("Salesforce/blip2-opt-2.7b")
    >>> model = load_lavis_checkpoint("blip2_pretrained.pth", vision_model=tower)
    ```"""
    weights, report = convert_lavis_state_dict(_read(path_or_state_dict))
    if model_class is None:
        model_class = _model_class(weights)
    _check_parts(weights, config, model_class, language_model, vision_model)
    tower = None if vision_model is None else _load_tower(vision_model)
    loaded_language_model = None if language_model is None else load_language_model(language_model)
    if config is None:
        config = _config_from_shapes(weights, tower, loaded_language_model)
        if isinstance(language_model, (str, os.PathLike)):
            config.image_token_index = image_token_id(AutoTokenizer.from_pretrained(language_model))
    else:
        config = _config_with_parts(config, tower, loaded_language_model)
    _check_language_model_type(report, config)
    parts = {"vision_model": tower, "language_model": loaded_language_model}
    # Each parameter is loaded or was given: random weights would be made for nothing
    with no_init_weights():
        model = model_class(config, **{name: part for name, part in parts.items() if part is not None})
    _set_what_lavis_sets(model, weights)
    _fit(weights, model, report, given=[name for name, part in parts.items() if part is not None])
    model.load_state_dict(weights, strict=False)
    model.tie_weights(recompute_mapping=False)
    logger.info("%s from a LAVIS checkpoint.\n%s", type(model).__name__, report)
    return model.freeze().eval()


def convert_lavis_state_dict(state_dict: Mapping[str, torch.Tensor]) -> tuple[StateDict, ConversionReport]:
    r"""
    The weights of a LAVIS checkpoint under the names, and in the shapes, that they have in this library.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            LAVIS's. It is not changed.

    Returns:
        `tuple` of `dict[str, torch.Tensor]` and [`ConversionReport`]: the weights, and what became of each tensor.

    Raises:
        ValueError: if a name is not known, or tensors that are one in LAVIS differ.
    """
    report = ConversionReport()
    weights: StateDict = {}
    unknown = []
    for name, tensor in state_dict.items():
        new_name = _rename(name)
        if name in BUFFERS:
            report.left[name] = BUFFERS[name]
        elif new_name is None:
            unknown.append(name)
        elif new_name in weights:
            raise ValueError(f"{name} and {report.sources(new_name)[0]} are both {new_name}: one of them is too many.")
        else:
            weights[new_name] = tensor
            report.taken[name] = new_name
    if unknown:
        raise ValueError(
            f"{len(unknown)} names that BLIP-2 does not have in LAVIS: {_enumerate(unknown)}. Give a checkpoint of "
            "its blip2, blip2_opt or blip2_t5, or remove what is not part of the model."
        )
    _join_qkv_biases(weights, report)
    _add_axes(weights, report)
    _add_patch_bias(weights, report)
    _check_tied(weights, TIED)
    return weights, report


def _rename(name: str) -> str | None:
    for pattern, new_name in RENAMINGS:
        if match := re.fullmatch(pattern, name):
            return match.expand(new_name)
    return None


def _join_qkv_biases(weights: StateDict, report: ConversionReport):
    """EVA-CLIP has a bias of queries and one of values; keys have none, which is a bias of zeros."""
    prefixes = {name.removesuffix(end) for name in weights for end in ("q_bias", "v_bias") if name.endswith(end)}
    for prefix in sorted(prefixes):
        for name, other in (("q_bias", "v_bias"), ("v_bias", "q_bias")):
            if prefix + name not in weights:
                raise ValueError(f"{report.sources(prefix + other)[0]} is there, but not the {name} next to it.")
        query, value = weights.pop(f"{prefix}q_bias"), weights.pop(f"{prefix}v_bias")
        weights[f"{prefix}qkv.bias"] = torch.cat([query, torch.zeros_like(value), value])
        report.reshaped[f"{prefix}qkv.bias"] = "q_bias, zeros for the keys, v_bias"
        for name in (f"{prefix}q_bias", f"{prefix}v_bias"):
            report.taken[report.sources(name)[0]] = f"{prefix}qkv.bias"


def _add_axes(weights: StateDict, report: ConversionReport):
    for name, dimensions in DIMENSIONS.items():
        if name in weights and weights[name].dim() < dimensions:
            shape = weights[name].shape
            weights[name] = weights[name].reshape((1,) * (dimensions - len(shape)) + shape)
            report.reshaped[name] = f"{tuple(shape)} to {tuple(weights[name].shape)}"


def _add_patch_bias(weights: StateDict, report: ConversionReport):
    """CLIP's patch embedding has no bias."""
    name = "vision_model.embeddings.patch_embedding.bias"
    weight = weights.get("vision_model.embeddings.patch_embedding.weight")
    if weight is not None and "vision_model.pre_layernorm.weight" in weights and name not in weights:
        weights[name] = weight.new_zeros(len(weight))
        report.reshaped[name] = "zeros: CLIP has none"


def _check_tied(weights: StateDict, pairs):
    for name, other in pairs:
        if name in weights and other in weights and not torch.equal(weights[name], weights[other]):
            raise ValueError(
                f"{name} and {other} are one tensor in LAVIS, but are stored with different values: the file is "
                "damaged, or its model has been changed."
            )


def _read(path_or_state_dict: str | os.PathLike | Mapping[str, Any]) -> StateDict:
    """A state dict, whatever it was given in."""
    content, given = path_or_state_dict, "The dict given"
    if not isinstance(content, Mapping):
        given = os.fspath(content)
        content = load_file(given) if given.endswith(".safetensors") else _load_pickle(given)
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f'{given} holds no weights: a state dict was expected, or a dict with one under "model".')
    others = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(
            f"{given} holds what is not a tensor: {_enumerate(others)}. A state dict was expected, or a dict with one "
            'under "model".'
        )
    return dict(content)


def _load_pickle(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no file of torch.save, or holds more than tensors and plain values, and reading that could "
            "run code of whoever wrote it. Give a file of tensors, or, if you trust it, the state dict that is in it."
        ) from error


def _model_class(weights: StateDict) -> type[Blip2PreTrainedModel]:
    heads = {name.partition(".")[0] for name in weights}
    if "language_projection" in heads:
        return Blip2ForConditionalGeneration
    if "lm_head" in heads:
        return Blip2ForPreTraining
    if "itm_head" in heads:
        return Blip2ForImageTextRetrieval
    raise ValueError(
        f"The class cannot be told from parts named {_enumerate(sorted(heads))}: neither a head of stage 1 "
        "(Qformer.cls.*) nor a projection of stage 2 (opt_proj.*, t5_proj.*) is there. Give model_class."
    )


def _check_parts(weights: StateDict, config: Blip2Config | None, model_class: type, language_model, vision_model):
    """Whether the tower and the language model are in the file or given."""
    parts = {name.partition(".")[0] for name in weights if not name.startswith("vision_model.post_layernorm.")}
    if "vision_model" in parts and vision_model is not None:
        raise ValueError("vision_model was given, but the file has its own tower (visual_encoder.*): leave it out.")
    wants_tower = config is None or config.has_vision_tower
    if wants_tower and "vision_model" not in parts and vision_model is None:
        raise ValueError(
            "The vision tower (visual_encoder.*) is not in the file: LAVIS leaves it out where it was frozen. Give "
            "the tower that the file was trained with as vision_model."
        )
    if not issubclass(model_class, Blip2ForConditionalGeneration):
        if language_model is not None:
            raise ValueError(f"language_model was given, but {model_class.__name__} has none: leave it out.")
        return
    if "language_projection" not in parts:
        raise ValueError(
            "The file has no projection to a language model (opt_proj.*, t5_proj.*): it is from stage 1. Load it "
            "without model_class, and join it to one with Blip2ForConditionalGeneration.from_pretrained_parts."
        )
    if "language_model" not in parts and language_model is None:
        raise ValueError(
            "The language model (opt_model.*, t5_model.*) is not in the file: LAVIS leaves it out, for it is frozen. "
            "Give the one that the file was trained with as language_model."
        )
    if language_model is None and (config is None or config.text_config is None):
        raise ValueError(
            "The language model is in the file, but its heads cannot be read from there: give a config with a "
            "text_config, or a language_model of the same sizes, into which the weights are loaded."
        )


def _load_tower(vision_model) -> PreTrainedModel:
    tower = load_tower(vision_model)
    if isinstance(tower.config, TransformersBlip2VisionConfig):
        raise ValueError(
            "vision_model is transformers' Blip2VisionModel, which applies the LayerNorm that the file has too. Give "
            "the same checkpoint as blip2_hf loads it: vision_model=blip2_hf.Blip2Model.from_pretrained(...)."
        )
    return tower


def _check_language_model_type(report: ConversionReport, config: Blip2Config):
    for name, expected in LANGUAGE_MODEL_TYPES.items():
        found = None if config.text_config is None else config.text_config.model_type
        if name in report.taken and found not in (None, expected):
            raise ValueError(
                f"The file has {name}: it was trained with a language model of type {expected!r}, but the one given "
                f"is of type {found!r}."
            )


class _Shapes(dict):
    def __missing__(self, name: str):
        raise ValueError(f"{name} is not in the file, so its sizes cannot be read: give a whole checkpoint.")

    def num_layers(self, prefix: str) -> int:
        return 1 + max(self.layers_with(prefix, ""), default=-1)

    def layers_with(self, prefix: str, part: str) -> list[int]:
        """Indices of the layers that have a parameter whose name goes on with `part`."""
        matches = (re.match(rf"{re.escape(prefix)}\.(\d+)\.{re.escape(part)}", name) for name in self)
        return sorted({int(match[1]) for match in matches if match})


def _config_from_shapes(
    weights: StateDict, tower: PreTrainedModel | None, language_model: PreTrainedModel | None
) -> Blip2Config:
    shapes = _Shapes({name: tuple(tensor.shape) for name, tensor in weights.items()})
    sizes = {"num_query_tokens": shapes["query_tokens.weight"][1]}
    if "vision_projection.weight" in shapes:
        sizes["image_text_hidden_size"] = shapes["vision_projection.weight"][0]
    return Blip2Config(
        vision_config=_vision_config_from_shapes(shapes) if tower is None else copy.deepcopy(tower.config),
        qformer_config=_qformer_config_from_shapes(shapes),
        text_config=None if language_model is None else copy.deepcopy(language_model.config),
        **sizes,
    )


def _vision_config_from_shapes(shapes: _Shapes) -> Blip2VisionConfig:
    width, _, patch_size, _ = shapes["vision_model.embeddings.patch_embedding.weight"]
    is_clip = "vision_model.pre_layernorm.weight" in shapes
    if (is_clip, width) not in TOWER_HEADS:
        raise ValueError(
            f"The tower is {width} wide, which is neither EVA-CLIP ViT-g (1408) nor CLIP ViT-L (1024): how many heads "
            "it has cannot be told. Give a config."
        )
    num_patches = shapes["vision_model.embeddings.position_embedding"][1] - 1
    make = Blip2VisionConfig.clip_vit_l if is_clip else Blip2VisionConfig
    return make(
        hidden_size=width,
        intermediate_size=shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=shapes.num_layers("vision_model.encoder.layers"),
        num_attention_heads=TOWER_HEADS[is_clip, width],
        image_size=math.isqrt(num_patches) * patch_size,
        patch_size=patch_size,
    )


def _qformer_config_from_shapes(shapes: _Shapes) -> Blip2QFormerConfig:
    layers = "qformer.encoder.layer"
    width = shapes["query_tokens.weight"][-1]
    if width % QFORMER_HEAD_DIM:
        raise ValueError(
            f"The Q-Former is {width} wide, no multiple of the {QFORMER_HEAD_DIM} that BERT's heads have: how many "
            "heads it has cannot be told. Give a config."
        )
    num_layers = shapes.num_layers(layers)
    cross_layers = shapes.layers_with(layers, "crossattention.")
    sizes = {"use_qformer_text_input": bool(shapes.layers_with(layers, "intermediate."))}
    if "embeddings.word_embeddings.weight" in shapes:
        # [DEC] is the last of LAVIS's vocabulary
        sizes["vocab_size"] = shapes["embeddings.word_embeddings.weight"][0]
        sizes["bos_token_id"] = sizes["vocab_size"] - 1
        sizes["max_position_embeddings"] = shapes["embeddings.position_embeddings.weight"][0]
    return Blip2QFormerConfig(
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=width // QFORMER_HEAD_DIM,
        intermediate_size=shapes[f"{layers}.0.intermediate_query.dense.weight"][0],
        cross_attention_frequency=cross_layers[1] if len(cross_layers) > 1 else max(num_layers, 1),
        encoder_hidden_size=shapes[f"{layers}.0.crossattention.attention.key.weight"][1],
        **sizes,
    )


def _config_with_parts(
    config: Blip2Config, tower: PreTrainedModel | None, language_model: PreTrainedModel | None
) -> Blip2Config:
    """A copy of the configuration, with those of the parts in their places."""
    parts: dict[str, Any] = {}
    if tower is not None:
        parts |= {"vision_config": copy.deepcopy(tower.config), "has_vision_tower": True}
    if language_model is not None:
        parts["text_config"] = copy.deepcopy(language_model.config)
    return Blip2Config(**(config.to_dict() | parts)) if parts else copy.deepcopy(config)


def _set_what_lavis_sets(model: Blip2PreTrainedModel, weights: StateDict):
    """What LAVIS does to the parts, beside loading their weights."""
    # LAVIS's ln_vision; the tower of a checkpoint of transformers' comes with 1e-6
    model.vision_model.post_layernorm.eps = 1e-5
    if hasattr(model.config.vision_config, "post_layernorm_eps"):
        model.config.vision_config.post_layernorm_eps = 1e-5
    language_model = getattr(model, "language_model", None)
    if language_model is not None and language_model.config.model_type == "t5":
        if "language_model.lm_head.weight" in weights:
            _untie_t5(model)
        _use_exact_gelu(model)


def _t5_configs(model: Blip2ForConditionalGeneration):
    """All that a T5 and its parts read from: each has a copy."""
    language_model = model.language_model
    return (
        model.config.text_config,
        *(part.config for part in (language_model, language_model.encoder, language_model.decoder)),
    )


def _untie_t5(model: Blip2ForConditionalGeneration):
    # transformers ties the head of every T5 that it makes, and scales what goes in; FlanT5 has a head of its own
    language_model = model.language_model
    language_model.lm_head.weight = nn.Parameter(torch.empty_like(language_model.lm_head.weight))
    language_model.all_tied_weights_keys.pop("lm_head.weight", None)
    model.all_tied_weights_keys.pop("language_model.lm_head.weight", None)
    for config in (model.config, *_t5_configs(model)):
        config.tie_word_embeddings = False
    for config in _t5_configs(model):
        config.scale_decoder_outputs = False


def _use_exact_gelu(model: Blip2ForConditionalGeneration):
    # LAVIS runs FlanT5 with the exact GELU in place of the tanh approximation, and trains on that
    for config in _t5_configs(model):
        config.dense_act_fn = "gelu"
    for module in model.language_model.modules():
        if isinstance(module, (T5DenseActDense, T5DenseGatedActDense)):
            module.act = ACT2FN["gelu"]


def _fit(weights: StateDict, model: Blip2PreTrainedModel, report: ConversionReport, given: list[str]):
    """Makes `weights` those of the model: all that it has, but the parts `given`, and no others."""
    expected = model.state_dict()
    unknown = []
    for name in [name for name in weights if name not in expected]:
        why = _why_left(name, model)
        if why is None:
            unknown += report.sources(name)
        else:
            report.leave(name, why)
            del weights[name]
    if unknown:
        raise ValueError(
            f"{type(model).__name__} of this configuration has no place for {len(unknown)} tensors of the file: "
            f"{_enumerate(unknown)}. Give a config of the file's sizes (number of layers, kind of tower)."
        )
    tied = model.all_tied_weights_keys.items()
    _check_tied(weights, tied)
    for pair in tied:
        for name, other in (pair, pair[::-1]):
            if other in weights:
                weights.setdefault(name, weights[other])
    _check_shapes(weights, expected, report)
    missing = [name for name in expected if name not in weights]
    report.missing = [name for name in missing if _is_given(name, given)]
    if len(missing) > len(report.missing):
        names = [name for name in missing if not _is_given(name, given)]
        raise ValueError(
            f"{len(names)} parameters of {type(model).__name__} are not in the file: {_enumerate(names)}. Give a "
            "whole checkpoint, a config of its sizes, or the model_class that it is of."
        )


def _why_left(name: str, model: Blip2PreTrainedModel) -> str | None:
    """Why the model may do without a tensor of this name; `None` if it may not."""
    part = name.partition(".")[0]
    if not hasattr(model, part):
        return f"{type(model).__name__} has no {part}"
    if part == "vision_model" and not model.config.has_vision_tower:
        return "has_vision_tower=False"
    if re.match(r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\.", name):
        index = int(name.split(".")[3])
        is_there = index < model.config.qformer_config.num_hidden_layers
        return "this Q-Former reads no text (use_qformer_text_input=False)" if is_there else None
    return None


def _is_given(name: str, given: list[str]) -> bool:
    return name.partition(".")[0] in given and not name.startswith("vision_model.post_layernorm.")


def _check_shapes(weights: StateDict, expected: Mapping[str, torch.Tensor], report: ConversionReport):
    differing = [
        f"{' and '.join(report.sources(name)) or name} {tuple(tensor.shape)} for {tuple(expected[name].shape)}"
        for name, tensor in weights.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if differing:
        raise ValueError(
            f"{len(differing)} tensors of the file have other shapes than the model: {_enumerate(differing)}. Give a "
            "config, and parts, of the file's sizes."
        )


def _enumerate(names: list[str], limit: int = 20) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
