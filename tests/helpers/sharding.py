"""Gradients of parameters that lie in pieces in several processes."""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


def sharded_gradients(model) -> dict[str, torch.Tensor]:
    """Return the gradients, or, if they lie flat in pieces, their norms, under the names of the bare model."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad
            whole = grad.full_tensor() if isinstance(grad, DTensor) else sum_of_squares(grad).sqrt()
            gradients[name.replace("_fsdp_wrapped_module.", "")] = whole
    return gradients


def sum_of_squares(shard: torch.Tensor | None) -> torch.Tensor:
    total = torch.zeros(()) if shard is None else shard.square().sum()
    dist.all_reduce(total)
    return total
