"""
A device on the CPU, on which an operation on tensors of both devices is an error, as on a GPU.

Tensors on the device `pretend` hold a tensor of the CPU, with which they compute. Not all is possible there:
`parameter.data = ...`, storages (saving a model needs them) and `torch.inference_mode` are not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)


NAME = "pretend"
aten = torch.ops.aten
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class _Backend(_DummyBackendModule):
    """Says that there is no such device, so that nothing chooses it by itself."""

    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


class _Hook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False


class PretendTensor(torch.Tensor):
    """A tensor on the device `pretend`; `held` is its tensor on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "PretendTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, held: torch.Tensor):
        self.held = held

    def __repr__(self) -> str:
        return f"PretendTensor({self.held})"

    def tolist(self) -> list:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} was called on a tensor of `{NAME}` outside of pretend_device().")


class _Pretend(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        is_there = any(isinstance(tensor, PretendTensor) for tensor in tensors)
        goes_there = is_there
        if kwargs.get("device") is not None:
            goes_there = torch.device(kwargs["device"]).type == NAME
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if function is aten.copy_.default:
            goes_there = isinstance(args[0], PretendTensor)
        elif is_there and function is not aten._to_copy.default:
            self._check_devices(function, args, tensors)
        result = function(*tree_map(_held, args), **tree_map(_held, kwargs))
        if not goes_there:
            return result
        # What an operation has changed in place is returned as it was given
        given = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, PretendTensor)}

        def pretend(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return given[id(value)] if id(value) in given else PretendTensor(value)

        return tree_map(pretend, result)

    def _check_devices(self, function, args, tensors: list[torch.Tensor]):
        if function.overloadpacket in INDEXING:
            # An index may be on the CPU
            index = tree_leaves(args[1])
            tensors = [tensor for tensor in tensors if not any(tensor is each for each in index)]
        elsewhere = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor) and tensor.dim() > 0]
        if elsewhere:
            shapes = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
            raise RuntimeError(f"{function} expected all tensors to be on the same device: {shapes}.")


def _held(value: Any) -> Any:
    return value.held if isinstance(value, PretendTensor) else value


@contextmanager
def pretend_device() -> Iterator[None]:
    """Let tensors be on the device `pretend`."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend(), hook=_Hook())
    # torch.tensor(..., device=NAME) makes a tensor of the CPU first, of which the mode sees the copy
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        # Gradients in this thread, because the mode is not in others
        with _Pretend(), torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
