"""
The loss of a frozen language model, some rows of the batch at a time.

All that is wanted of a frozen language model in training is the loss, and its gradient into what the model is given.
Each part of the batch is run forward and backward before the next, so that activations of all of it are never kept,
and nothing is computed twice. Each is as long as its own last label.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_utils import PreTrainedModel

from ._compat import CACHE_NAMES
from .frozen import is_frozen


# So many that the products take far longer than reading the weights does, once for each part
_TOKENS_AT_A_TIME = 4096
_TOKENS_AT_A_TIME_ON_A_CPU = 384  # in float32; half precision is several times as fast where it is fast at all
# The gradient of the sum over labels is of the order of 1, or less: half precision would lose the small ones
_FLOAT16_SCALE = 1024.0


def can_run_by_rows(language_model: PreTrainedModel, inputs: dict[str, Any], shift_labels: torch.Tensor) -> bool:
    """Whether nothing but the loss, and its gradient into `inputs_embeds`, is wanted of the language model."""
    embeds, mask = inputs.get("inputs_embeds"), inputs.get("attention_mask")
    outputs = ("output_hidden_states", "output_attentions")
    given = ("encoder_outputs", *CACHE_NAMES)
    if embeds is None or inputs["use_cache"] or any(inputs.get(name) is not None for name in given):
        return False
    if any(inputs.get(name, getattr(language_model.config, name)) for name in outputs):
        return False
    position_ids = inputs.get("position_ids")
    if position_ids is not None and position_ids.shape != embeds.shape[:2]:
        return False
    predicting = embeds if inputs.get("decoder_input_ids") is None else inputs["decoder_input_ids"]
    return (
        predicting.shape[1] == shift_labels.shape[1]
        and (mask is None or mask.dim() == 2)
        and is_frozen(language_model)
        and not language_model.training
        and not any(getattr(module, "gradient_checkpointing", False) for module in language_model.modules())
        and not _is_sharded(language_model)
    )


def _is_sharded(language_model: PreTrainedModel) -> bool:
    """Whether parts of it are gathered and scattered around its own backward pass."""
    if is_deepspeed_zero3_enabled():
        return True
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in language_model.modules())


def loss_by_rows(
    run: Callable[[dict[str, Any], torch.Tensor], torch.Tensor], inputs: dict[str, Any], shift_labels: torch.Tensor
) -> torch.Tensor:
    """
    The sum over rows of what `run` gives for them, with its gradient into `inputs["inputs_embeds"]` alone.

    Args:
        run (`Callable`):
            `run(inputs, shift_labels)` of some rows gives the sum of their loss, a `torch.Tensor` of shape `()`.
        inputs (`dict`):
            Those of the language model. Tensors of `batch_size` rows are split.
        shift_labels (`torch.LongTensor` of shape `(batch_size, length)`):
            What each position predicts; -100 is not learned.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    inputs = dict(inputs)
    embeds = inputs.pop("inputs_embeds")
    parts = [_take_rows(inputs, embeds, shift_labels, rows) for rows in _split(embeds, shift_labels)]
    return _LossByRows.apply(embeds, run, parts)


class _LossByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embeds, run, parts):
        needs_gradient = ctx.needs_input_grad[0]
        dtype = torch.promote_types(embeds.dtype, torch.float32)
        gradient = torch.zeros(embeds.shape, dtype=dtype, device=embeds.device) if needs_gradient else None
        scale = _FLOAT16_SCALE if _computes_in_float16(embeds) else 1.0
        total = None
        for rows, length, inputs, labels in parts:
            own = embeds[rows, :length].detach().requires_grad_(needs_gradient)
            with torch.set_grad_enabled(needs_gradient):
                loss = run({**inputs, "inputs_embeds": own}, labels)
                if needs_gradient:
                    gradient[rows, :length] = torch.autograd.grad(loss * scale, own)[0].to(dtype) / scale
            total = loss.detach() if total is None else total + loss.detach()
        ctx.save_for_backward(gradient)
        ctx.dtype = embeds.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output.to(gradient)).to(ctx.dtype), None, None


def _computes_in_float16(embeds: torch.Tensor) -> bool:
    kind = embeds.device.type
    return embeds.dtype == torch.float16 or (
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    )


def _split(embeds: torch.Tensor, shift_labels: torch.Tensor) -> list[torch.Tensor]:
    """Row numbers, rows of like lengths together, as many tokens at a time as keep the processor busy."""
    is_slow = embeds.device.type == "cpu" and embeds.dtype == torch.float32
    budget = _TOKENS_AT_A_TIME_ON_A_CPU if is_slow else _TOKENS_AT_A_TIME
    order = _lengths(shift_labels.ne(-100)).argsort()
    return list(order.split(max(1, budget // embeds.shape[1])))


def _lengths(is_used: torch.Tensor) -> torch.Tensor:
    """How many positions of each row there are, up to the last that is used."""
    position = torch.arange(1, is_used.shape[1] + 1, device=is_used.device)
    return (is_used * position).amax(dim=1)


def _take_rows(
    inputs: dict[str, Any], embeds: torch.Tensor, shift_labels: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, int, dict[str, Any], torch.Tensor]:
    """`(rows, length of their embeddings, inputs, labels)`; nothing behind the last label of these rows is read."""
    num_labels = max(int(_lengths(shift_labels[rows].ne(-100)).max()), 1)
    length = num_labels
    if inputs.get("decoder_input_ids") is not None:
        mask = inputs["attention_mask"]
        length = embeds.shape[1] if mask is None else max(int(_lengths(mask[rows].bool()).max()), 1)
    taken = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == len(shift_labels):
            value = value[rows.to(value.device), : num_labels if name.startswith("decoder_") else length]
        taken[name] = value
    return rows.to(embeds.device), length, taken, shift_labels[rows, :num_labels]
