"""Frozen parts of a model: which they are, their dtype, and activation checkpointing in them."""

from functools import partial

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def is_frozen(part: nn.Module) -> bool:
    """Return whether no parameter of a part is trained."""
    return not any(parameter.requires_grad for parameter in part.parameters())


def keep_weights(part: nn.Module):
    """Tell `post_init` of a model that a given part has its weights: it would draw those of PEFT's adapters anew."""
    for module in part.modules():
        module._is_hf_initialized = True


def cast_parameters(part: nn.Module, dtype: torch.dtype):
    """
    Cast the parameters of a frozen part. `part.to(dtype)` would also round buffers that stay in float32 for every
    dtype of the parameters, such as the frequencies of rotary positions.

    Args:
        part (`nn.Module`):
            The part.
        dtype (`torch.dtype`):
            The new dtype.
    """
    for parameter in part.parameters():
        parameter.data = parameter.data.to(dtype)


def upcast_trained_parameters(model: nn.Module):
    """Cast trained parameters in half precision to float32, because AdamW would lose small steps there."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def checkpoint_in_eval_mode(part: nn.Module):
    """
    Enable activation checkpointing in a frozen part. transformers checkpoints a layer only in training mode, but a
    frozen part stays in eval mode because its dropout must be off. So only the flag of each layer is set to training
    mode, and it is reset while the layer runs.

    Args:
        part (`nn.Module`):
            The frozen part, in eval mode.
    """
    for layer in part.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            layer.training = True
            function = layer._gradient_checkpointing_func
            if getattr(function, "func", None) is not _checkpoint_layer_in_eval_mode:
                layer._gradient_checkpointing_func = partial(_checkpoint_layer_in_eval_mode, layer, function)


def _checkpoint_layer_in_eval_mode(layer: nn.Module, checkpoint, forward, *args, **kwargs):
    def forward_in_eval_mode(*args, **kwargs):
        training, layer.training = layer.training, False
        try:
            return forward(*args, **kwargs)
        finally:
            layer.training = training

    return checkpoint(forward_in_eval_mode, *args, **kwargs)
