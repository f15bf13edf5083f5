"""Learning rates that fall from the tower's last block to its first."""

import re

import torch
from torch import nn

from ..models.modeling_base import Blip2PreTrainedModel


_BLOCK = re.compile(r"(?:^|\.)(?:layers?|blocks?|stages)\.(\d+)\.")


def vision_layer_scales(model: Blip2PreTrainedModel, decay: float) -> dict[nn.Parameter, float]:
    """
    Return the factor of the learning rate in each layer of the tower (appendix; LAVIS computes the same numbers, but
    does not use them).

    Args:
        model ([`Blip2PreTrainedModel`]):
            The model, its tower trained.
        decay (`float`):
            The learning rate of a block over that of the block after it: the last of n blocks has `decay`, the first
            `decay**n`, and the embeddings before it `decay**(n + 1)`.

    Returns:
        `dict`: the factor of each trained parameter of the tower. Those after the blocks, which have a factor of 1,
        are left out.

    Raises:
        ValueError: if no numbered block of the tower is trained.
    """
    named = model.vision_model.named_parameters()
    tower = [(n, p) for n, p in named if p.requires_grad and not n.startswith("post_layernorm.")]
    blocks = [int(match[1]) if (match := _BLOCK.search(name)) else None for name, _ in tower]
    found = [block for block in blocks if block is not None]
    if not found:
        raise ValueError(
            "vision_layer_decay was given, but the tower has no numbered blocks that are trained. The presets "
            "'finetune' and 'everything' train the tower."
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
    Split the groups of a new optimizer, so that each has the learning rate of its layers: that of the optimizer times
    the factor of a parameter, which is 1 if `scales` has none. A scheduler multiplies them all alike.
    """
    groups = []
    for group in optimizer.param_groups:
        by_scale: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_scale.setdefault(scales.get(parameter, 1.0), []).append(parameter)
        groups += [group | {"params": params, "lr": group["lr"] * scale} for scale, params in by_scale.items()]
    optimizer.param_groups[:] = groups


__all__ = ["split_by_scale", "vision_layer_scales"]
