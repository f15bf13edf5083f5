"""Parameters that lie in pieces in several processes, and their gradients."""

from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from blip2_hf.models.modeling_qformer import Blip2QFormerLayer, FoldedLinear


LAYERS = (Blip2QFormerLayer, FoldedLinear, OPTDecoderLayer)


def wrap_in_fsdp(model) -> FullyShardedDataParallel:
    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls=set(LAYERS))
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )


def wrap_in_fsdp2(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in reversed(list(model.modules())):
        if isinstance(module, LAYERS):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


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
