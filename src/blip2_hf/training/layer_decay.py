"""Learning rates that fall from the tower's last block to its first."""

import re

import torch
from torch import nn

from ..models.modeling_base import Blip2PreTrainedModel


_BLOCK = re.compile(r"(?:^|\.)(?:layers?|blocks?|stages)\.(\d+)\.")


def vision_layer_scales(model: Blip2PreTrainedModel, decay: float) -> dict[nn.Parameter, float]:
    """
    What the learning rate is multiplied by in each layer of the tower (appendix; LAVIS computes the same numbers, and
    does not use them).

    Args:
        model ([`Blip2PreTrainedModel`]):
            The model, its tower trained.
        decay (`float`):
            The learning rate of a block over that of the block behind it: the last of n blocks has `decay`, the first
            `decay**n`, and the embeddings before it `decay**(n + 1)`.

    Returns:
        `dict`: the factor of each parameter of the tower that is trained. What stands behind its blocks, and the
        LayerNorm after it, have 1.

    Raises:
        ValueError: if no numbered block of the tower is trained.
    """
    named = model.vision_model.named_parameters()
    tower = [(n, p) for n, p in named if p.requires_grad and not n.startswith("post_layernorm.")]
    blocks = [int(match[1]) if (match := _BLOCK.search(name)) else None for name, _ in tower]
    found = [block for block in blocks if block is not None]
    if not found:
        raise ValueError(
            "vision_layer_decay: the tower has no numbered blocks that are trained. The presets that train it are "
            "'finetune' and 'everything'."
        )
    last = max(found)
    scales = {}
    for index, ((_, parameter), block) in enumerate(zip(tower, blocks, strict=True)):
        if block is not None:
            scales[parameter] = decay ** (last + 1 - block)
        elif index < blocks.index(found[0]):
            scales[parameter] = decay ** (last + 2)
    return scales


def split_by_scale(optimizer: torch.optim.Optimizer, scales: dict[nn.Parameter, float]):
    """
    Splits the groups of an optimizer that has not begun, so that each has the learning rate of its layers. A scheduler
    multiplies them all alike.

    Args:
        optimizer (`torch.optim.Optimizer`):
            The optimizer.
        scales (`dict`):
            What the learning rate of a parameter is multiplied by, where it is not 1.
    """
    groups = []
    for group in optimizer.param_groups:
        by_scale: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_scale.setdefault(scales.get(parameter, 1.0), []).append(parameter)
        groups += [group | {"params": params, "lr": group["lr"] * scale} for scale, params in by_scale.items()]
    optimizer.param_groups[:] = groups


__all__ = ["split_by_scale", "vision_layer_scales"]
