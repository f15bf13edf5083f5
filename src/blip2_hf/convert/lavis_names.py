"""
The names of BLIP-2's tensors in LAVIS, the authors' code, and here. `RENAMINGS` has both names of each, functions
change what is stored differently, and a [`ConversionReport`] accounts for each tensor.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from .reading import StateDict, enumerate_names, match_name


# Blocks of a tower: in LAVIS those of EVA-CLIP ViT-g and of CLIP ViT-L, and here
_BLOCK, _LAYER = r"visual_encoder\.(?:transformer\.res)?blocks\.(\d+)", r"vision_model.encoder.layers.\1"
# A parameter's whole name in LAVIS, and its name here; the first pattern that matches is taken
RENAMINGS: tuple[tuple[str, str], ...] = (
    (r"visual_encoder\.(?:cls_token|class_embedding)", r"vision_model.embeddings.class_embedding"),
    (r"visual_encoder\.(?:pos_embed|positional_embedding)", r"vision_model.embeddings.position_embedding"),
    (r"visual_encoder\.(?:patch_embed\.proj|conv1)\.(weight|bias)", r"vision_model.embeddings.patch_embedding.\1"),
    (r"visual_encoder\.ln_pre\.(weight|bias)", r"vision_model.pre_layernorm.\1"),
    (rf"{_BLOCK}\.(?:norm|ln_)([12])\.(weight|bias)", rf"{_LAYER}.layer_norm\2.\3"),
    (rf"{_BLOCK}\.attn\.(?:qkv\.|in_proj_)(weight|bias)", rf"{_LAYER}.self_attn.qkv.\2"),
    (rf"{_BLOCK}\.attn\.([qv]_bias)", rf"{_LAYER}.self_attn.\2"),
    (rf"{_BLOCK}\.attn\.(?:out_)?proj\.(weight|bias)", rf"{_LAYER}.self_attn.projection.\2"),
    (rf"{_BLOCK}\.mlp\.(?:fc1|c_fc)\.(weight|bias)", rf"{_LAYER}.mlp.fc1.\2"),
    (rf"{_BLOCK}\.mlp\.(?:fc2|c_proj)\.(weight|bias)", rf"{_LAYER}.mlp.fc2.\2"),
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
    (r"(vision|text)_proj\.(weight|bias)", r"\1_projection.\2"),
    (r"itm_head\.(weight|bias)", r"itm_head.\1"),
    (r"temp", r"temperature.weight"),
    # Stage 2
    (r"(?:opt|t5|llm)_proj\.(weight|bias)", r"language_projection.\1"),
    (r"(?:opt|t5|llm)_model\.(.+)", r"language_model.\1"),
)
# Parameters that some files store with fewer axes: axes of length 1 are added in front
DIMENSIONS = {
    "temperature.weight": 1,
    "vision_model.embeddings.class_embedding": 3,
    "vision_model.embeddings.position_embedding": 3,
}
# Pairs of names of one tensor in LAVIS's model
TIED = (
    ("lm_head.decoder.weight", "embeddings.word_embeddings.weight"),
    ("lm_head.decoder.bias", "lm_head.bias"),
)


@dataclass
class ConversionReport:
    r"""
    A list of what became of each tensor of a LAVIS checkpoint.

    Args:
        taken (`dict[str, str]`):
            LAVIS's name of each tensor that was taken, and the parameter that it became, or became a part of.
        reshaped (`dict[str, str]`):
            Parameters that LAVIS stores in another form, and what they were made of.
        left (`dict[str, str]`):
            LAVIS's name of each tensor that was not taken, and why; also what else is in the file.
        missing (`list[str]`):
            Parameters that are not in the checkpoint, but came with `vision_model` or `language_model`.
        tower (`ConversionReport`, *optional*):
            The report of the tower's own file, if `vision_model` was one.
    """

    taken: dict[str, str] = field(default_factory=dict)
    reshaped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    tower: "ConversionReport | None" = None

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
            # Equal layers share a line
            counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", entry) for entry in entries)
            lines += [f"  {entry}{f' ({count} times)' if count > 1 else ''}" for entry, count in counts.items()]
        if self.tower is not None:
            lines += ["file of the vision tower:", *(f"  {line}" for line in str(self.tower).split("\n"))]
        return "\n".join(lines)

    def leave(self, new_name: str, why: str):
        """Move what had become `new_name` from `taken` to `left`."""
        for name in self.sources(new_name):
            del self.taken[name]
            self.left[name] = why
        self.reshaped.pop(new_name, None)

    def sources(self, new_name: str) -> list[str]:
        """Return LAVIS's names of what became `new_name`."""
        return [name for name, taken_as in self.taken.items() if taken_as == new_name]


def convert_lavis_state_dict(state_dict: Mapping[str, torch.Tensor]) -> tuple[StateDict, ConversionReport]:
    r"""
    Convert the weights of a LAVIS checkpoint to the names and the shapes that they have in this library.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            LAVIS's state dict. It is not changed.

    Returns:
        `tuple` of `dict[str, torch.Tensor]` and [`ConversionReport`]: the weights, and what became of each tensor.

    Raises:
        ValueError: if a name is unknown, or if two tensors differ that are one in LAVIS.
    """
    report = ConversionReport()
    weights: StateDict = {}
    unknown = []
    for name, tensor in state_dict.items():
        new_name = match_name(name, RENAMINGS)
        if name == "Qformer.bert.embeddings.position_ids":
            report.left[name] = "a buffer: 0, 1, 2, ..."
        elif new_name is None:
            unknown.append(name)
        elif new_name in weights:
            raise ValueError(f"{name} and {report.sources(new_name)[0]} are both {new_name}: remove one of them.")
        else:
            weights[new_name] = tensor
            report.taken[name] = new_name
    if unknown:
        raise ValueError(
            f"{len(unknown)} names are not those of a BLIP-2 in LAVIS: {enumerate_names(unknown)}. Give a checkpoint "
            "of its blip2, blip2_opt or blip2_t5, or remove what is not part of the model."
        )
    _join_qkv_biases(weights, report)
    _add_axes(weights, report)
    _add_patch_bias(weights, report)
    check_tied(weights, TIED)
    return weights, report


def _join_qkv_biases(weights: StateDict, report: ConversionReport):
    """Join EVA-CLIP's biases of queries and values. Keys have none, so theirs is zeros."""
    names = sorted(name for name in weights if name.endswith(("q_bias", "v_bias")))
    for prefix in dict.fromkeys(name.removesuffix(name[-6:]) for name in names):
        for name, other in (("q_bias", "v_bias"), ("v_bias", "q_bias")):
            if prefix + name not in weights:
                raise ValueError(f"{report.sources(prefix + other)[0]} is there, but not the {name} next to it.")
        joined, query, value = f"{prefix}qkv.bias", weights.pop(f"{prefix}q_bias"), weights.pop(f"{prefix}v_bias")
        weights[joined] = torch.cat([query, torch.zeros_like(value), value])
        report.reshaped[joined] = "q_bias, zeros for the keys, v_bias"
        for name in ("q_bias", "v_bias"):
            report.taken[report.sources(prefix + name)[0]] = joined


def _add_axes(weights: StateDict, report: ConversionReport):
    for name, dimensions in DIMENSIONS.items():
        if name in weights and weights[name].dim() < dimensions:
            shape = weights[name].shape
            weights[name] = weights[name].reshape((1,) * (dimensions - len(shape)) + shape)
            report.reshaped[name] = f"{tuple(shape)} to {tuple(weights[name].shape)}"


def _add_patch_bias(weights: StateDict, report: ConversionReport):
    """Add zeros as the bias of CLIP's patch embedding, which has none."""
    name = "vision_model.embeddings.patch_embedding.bias"
    weight = weights.get("vision_model.embeddings.patch_embedding.weight")
    if weight is not None and "vision_model.pre_layernorm.weight" in weights and name not in weights:
        weights[name] = weight.new_zeros(len(weight))
        report.reshaped[name] = "zeros: CLIP has none"


def check_tied(weights: StateDict, pairs: Iterable[tuple[str, str]]):
    """Refuse a file that stores one tensor of the model twice with different values."""
    for name, other in pairs:
        # The meta device has no values to compare
        if name not in weights or other not in weights or weights[name].is_meta or weights[other].is_meta:
            continue
        if not torch.equal(weights[name], weights[other]):
            raise ValueError(
                f"{name} and {other} are one tensor in LAVIS, but are stored with different values: the file is "
                "damaged, or its model was changed. Give an unchanged checkpoint."
            )
