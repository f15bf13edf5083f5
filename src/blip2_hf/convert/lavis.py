"""Checkpoints of BLIP-2 in LAVIS, the authors' code, loaded into the models of this library."""

import os
import re
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5DenseGatedActDense
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging

from ..models.backbones import image_token_id, load_language_model
from ..models.configuration_blip2 import Blip2Config
from ..models.modeling_base import Blip2PreTrainedModel
from ..models.modeling_blip2 import Blip2ForConditionalGeneration
from ..models.modeling_pretraining import Blip2ForPreTraining
from ..models.modeling_retrieval import Blip2ForImageTextRetrieval
from .lavis_names import ConversionReport, check_tied, convert_lavis_state_dict
from .lavis_sizes import config_from_shapes, config_with_parts
from .reading import StateDict, check_shapes, enumerate_names, read_state_dict
from .towers import load_tower_for_lavis


logger = logging.get_logger(__name__)

# The class of a file, by the first of these heads that it has
HEADS: dict[str, type[Blip2PreTrainedModel]] = {
    "language_projection": Blip2ForConditionalGeneration,
    "lm_head": Blip2ForPreTraining,
    "itm_head": Blip2ForImageTextRetrieval,
}
# What the published files were trained with, by the widths of their projections and cross-attentions
LANGUAGE_MODELS = {
    "opt": {2560: "facebook/opt-2.7b", 4096: "facebook/opt-6.7b"},
    "t5": {2048: "google/flan-t5-xl", 4096: "google/flan-t5-xxl"},
    "llama": {4096: "lmsys/vicuna-7b-v1.1", 5120: "lmsys/vicuna-13b-v1.1"},
}
# What LAVIS's names begin with, in `opt_proj` and `opt_model`
PREFIXES = {"opt": "opt", "t5": "t5", "llm": "llama"}
TOWERS = {
    1408: "EVA-CLIP ViT-g: LAVIS's eva_vit_g.pth, or a checkpoint that has it, such as Salesforce/blip2-opt-2.7b",
    1024: "CLIP ViT-L/14: LAVIS's clip_vit_L.pth, or openai/clip-vit-large-patch14",
}


def load_lavis_checkpoint(
    path_or_state_dict: str | os.PathLike | Mapping[str, Any],
    config: Blip2Config | None = None,
    model_class: type[Blip2PreTrainedModel] | None = None,
    *,
    language_model: str | os.PathLike | PreTrainedModel | None = None,
    vision_model: str | os.PathLike | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output_loading_info: bool = False,
) -> Any:
    r"""
    Load a BLIP-2 that was saved by LAVIS, the authors' code. Each tensor is accounted for: an unknown or a missing one
    is an error, and the [`ConversionReport`] is logged at level info.

    LAVIS leaves frozen parts out of its files: the language model always, the vision tower if it was not trained. Give
    them as `language_model` and `vision_model`. They become part of the model that is returned: the tower gets the
    LayerNorm of the file, and a FlanT5 the activation that LAVIS runs it with.

    Args:
        path_or_state_dict (`str`, `os.PathLike` or `dict`):
            A file of `torch.save` or of safetensors, or its content: a state dict, or a `dict` with one under
            `"model"`. Only tensors and plain values are read from it, and no code is run.
        config ([`Blip2Config`], *optional*):
            The model's configuration. If it is not given, the sizes are read from the file. The Q-Former's heads are
            then assumed to be 64 wide, as BERT's are, and the tower to be EVA-CLIP ViT-g or CLIP ViT-L.
        model_class (`type`, *optional*):
            The model's class, such as [`Blip2Model`]. If it is not given, the file decides: [`Blip2ForPreTraining`]
            if it has the Q-Former's language-modelling head, [`Blip2ForConditionalGeneration`] if it has a projection
            to a language model, [`Blip2ForImageTextRetrieval`] if it has a head for matching alone.
        language_model (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`], *optional*):
            The language model that the file was trained with.
        vision_model (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`], *optional*):
            The tower that the file was trained with: LAVIS's own file of it (`eva_vit_g.pth`, `clip_vit_L.pth`; see
            [`load_lavis_tower`]), transformers' CLIP ViT-L, or a BLIP-2 that has it. Any other tower must return what
            LAVIS takes, as its `last_hidden_state` or from `config.vision_feature_layer`: the output of the second
            last block, before any LayerNorm.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The language model's tokenizer. If it is not given, and `language_model` is a folder or an id, it is loaded
            from there. It gives `image_token_index` if there is no `config`. It also gives the newline, at which LAVIS
            lets an OPT end instead of at `</s>`.
        output_loading_info (`bool`, *optional*, defaults to `False`):
            Whether to return the [`ConversionReport`] too.

    Returns:
        [`Blip2ForPreTraining`], [`Blip2ForConditionalGeneration`], [`Blip2ForImageTextRetrieval`] or `model_class`: in
        eval mode, its tower and language model frozen. With `output_loading_info`, a `tuple` of model and report.

    Raises:
        ValueError: if the file holds something else, lacks a part that is not given, or does not fit `config`.

    Example:

    ```python
    >>> from blip2_hf import load_lavis_checkpoint

    >>> model = load_lavis_checkpoint("blip2_pretrained.pth", vision_model="eva_vit_g.pth")
    ```"""
    state_dict, beside = read_state_dict(path_or_state_dict)
    weights, report = convert_lavis_state_dict(state_dict)
    report.left |= beside
    if model_class is None:
        model_class = _model_class(weights)
    kind = next((kind for prefix, kind in PREFIXES.items() if f"{prefix}_proj.weight" in report.taken), None)
    _check_parts(weights, kind, config, model_class, language_model, vision_model)
    tower = None
    if vision_model is not None:
        tower, report.tower = load_tower_for_lavis(vision_model, config)
    loaded_language_model = None if language_model is None else load_language_model(language_model)
    if tokenizer is None and isinstance(language_model, (str, os.PathLike)):
        tokenizer = AutoTokenizer.from_pretrained(language_model)
    if config is None:
        config = config_from_shapes(weights, tower, loaded_language_model)
        config.image_token_index = None if tokenizer is None else image_token_id(tokenizer)
    else:
        config = config_with_parts(config, tower, loaded_language_model)
    if kind is not None and config.text_config is not None and config.text_config.model_type != kind:
        raise ValueError(
            f"The file was trained with a language model of type {kind!r}, but the one given is of type "
            f"{config.text_config.model_type!r}."
        )
    parts = {"vision_model": tower, "language_model": loaded_language_model}
    parts = {name: part for name, part in parts.items() if part is not None}
    # No random weights because each parameter is loaded or given
    with no_init_weights():
        model = model_class(config, **parts)
    _apply_lavis_settings(model, weights)
    _fit(weights, model, report, parts)
    model.load_state_dict(weights, strict=False)
    model.tie_weights(recompute_mapping=False)
    if tokenizer is not None and config.text_config is not None and config.text_config.model_type == "opt":
        _end_at_newline(model, tokenizer)
    logger.info("%s from a LAVIS checkpoint.\n%s", type(model).__name__, report)
    model.freeze().eval()
    return (model, report) if output_loading_info else model


def _end_at_newline(model: Blip2ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase):
    """Let an OPT end at the newline instead of at </s>, as LAVIS does."""
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    generation_configs = (model.generation_config, model.language_model.generation_config)
    for config in (model.config, model.config.text_config, model.language_model.config, *generation_configs):
        config.eos_token_id = newline


def _model_class(weights: StateDict) -> type[Blip2PreTrainedModel]:
    parts = {name.partition(".")[0] for name in weights}
    for head, model_class in HEADS.items():
        if head in parts:
            return model_class
    raise ValueError(
        "The file has no head of stage 1 (Qformer.cls.*, itm_head.*) and no projection of stage 2 (opt_proj.*, "
        f"t5_proj.*, llm_proj.*), but only {enumerate_names(sorted(parts))}, so its class is unknown. Give "
        "model_class."
    )


def _check_parts(
    weights: StateDict, kind: str | None, config: Blip2Config | None, model_class: type, language_model, vision_model
):
    """Check that the tower and the language model are either in the file or given."""
    parts = {name.partition(".")[0] for name in weights if not name.startswith("vision_model.post_layernorm.")}
    if "vision_model" in parts and vision_model is not None:
        raise ValueError("vision_model was given, but the file has its own tower (visual_encoder.*): leave it out.")
    if "vision_model" not in parts and vision_model is None and (config is None or config.has_vision_tower):
        which = _which(weights, "qformer.encoder.layer.0.crossattention.attention.key.weight", 1, TOWERS)
        raise ValueError(
            "The vision tower (visual_encoder.*) is not in the file: LAVIS leaves a frozen one out. Give the "
            f"tower that the file was trained with as vision_model{which}."
        )
    if not issubclass(model_class, Blip2ForConditionalGeneration):
        if language_model is not None:
            raise ValueError(f"language_model was given, but {model_class.__name__} has none: leave it out.")
    elif "language_projection" not in parts:
        raise ValueError(
            "The file has no projection to a language model (opt_proj.*, t5_proj.*, llm_proj.*): it is from stage 1. "
            "Load it without model_class, and give the model to Blip2ForConditionalGeneration.from_pretrained_parts."
        )
    elif "language_model" not in parts and language_model is None:
        which = _which(weights, "language_projection.weight", 0, LANGUAGE_MODELS.get(kind or "", {}))
        raise ValueError(
            "The language model (opt_model.*, t5_model.*, llm_model.*) is not in the file: LAVIS leaves it out. Give "
            f"the one that the file was trained with as language_model{which}."
        )
    elif language_model is None and (config is None or config.text_config is None):
        raise ValueError(
            "The language model is in the file, but the file does not say how many heads it has. Give a config with a "
            "text_config, or a language_model of the same sizes: the weights of the file are loaded into it."
        )


def _which(weights: StateDict, name: str, axis: int, known: dict[int, str]) -> str:
    """Return, for a message, the part that a weight of this width was trained with."""
    if name not in weights:
        return ""
    width = weights[name].shape[axis]
    return f" (by its width, {width}: {known.get(width, 'none that LAVIS has published')})"


def _apply_lavis_settings(model: Any, weights: StateDict):
    """Change the parts as LAVIS does after loading them."""
    # LAVIS's ln_vision has this eps; a tower from a checkpoint of transformers has 1e-6
    model.vision_model.post_layernorm.eps = 1e-5
    if hasattr(model.config.vision_config, "post_layernorm_eps"):
        model.config.vision_config.post_layernorm_eps = 1e-5
    t5 = getattr(model, "language_model", None)
    if t5 is None or t5.config.model_type != "t5":
        return
    # Each part of a T5 reads a copy of the configuration
    configs = (model.config.text_config, t5.config, t5.encoder.config, t5.decoder.config)
    if "language_model.lm_head.weight" in weights:
        # FlanT5 has a head of its own, but transformers ties the head of every T5, and scales its input
        t5.lm_head.weight = nn.Parameter(torch.empty_like(t5.lm_head.weight))
        t5.all_tied_weights_keys.pop("lm_head.weight", None)
        model.all_tied_weights_keys.pop("language_model.lm_head.weight", None)
        for config in (model.config, *configs):
            config.tie_word_embeddings = False
        for config in configs:
            config.scale_decoder_outputs = False
    # LAVIS trains with the exact GELU instead of FlanT5's tanh approximation
    for config in configs:
        config.dense_act_fn = "gelu"
    for module in t5.modules():
        if isinstance(module, (T5DenseActDense, T5DenseGatedActDense)):
            module.act = ACT2FN["gelu"]


def _fit(weights: StateDict, model: Blip2PreTrainedModel, report: ConversionReport, given: Container[str]):
    """Change `weights` so that they have the names of the model, all but those of the parts `given`."""
    expected = model.state_dict()
    _leave_unused(weights, model, expected, report)
    tied = model.all_tied_weights_keys.items()
    check_tied(weights, tied)
    for pair in tied:
        for name, other in (pair, pair[::-1]):
            if other in weights:
                weights.setdefault(name, weights[other])
    check_shapes(weights, expected, report.sources)
    missing: list[str] = []
    for name in [name for name in expected if name not in weights]:
        is_given = name.partition(".")[0] in given and not name.startswith("vision_model.post_layernorm.")
        (report.missing if is_given else missing).append(name)
    if missing:
        raise ValueError(
            f"{len(missing)} parameters of {type(model).__name__} are not in the file: {enumerate_names(missing)}. "
            "Give a whole checkpoint, a config of its sizes, or the model_class that it was saved from."
        )


def _leave_unused(weights: StateDict, model: Blip2PreTrainedModel, expected: StateDict, report: ConversionReport):
    """Remove the weights that the model does without, and refuse those that it has no place for."""
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
            f"{enumerate_names(unknown)}. Give a config of the file's sizes (number of layers, kind of tower)."
        )


def _why_left(name: str, model: Blip2PreTrainedModel) -> str | None:
    """Return why the model does without a tensor of this name, or `None` if it must have it."""
    part = name.partition(".")[0]
    if not hasattr(model, part):
        return f"{type(model).__name__} has no {part}"
    if part == "vision_model" and not model.config.has_vision_tower:
        return "has_vision_tower=False"
    layer = re.match(r"qformer\.encoder\.layer\.(\d+)\.(intermediate|output)\.", name)
    if layer and int(layer[1]) < model.config.qformer_config.num_hidden_layers:
        return "this Q-Former reads no text (use_qformer_text_input=False)"
    return None
