"""Finds where a program waits for its device, to read a value or to make a tensor whose size depends on one."""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode


aten = torch.ops.aten
# Their result is a number for Python, or its shape depends on values
_READS = {
    aten._local_scalar_dense,
    aten._unique2,
    aten.equal,
    aten.masked_scatter_backward,
    aten.masked_select,
    aten.nonzero,
    aten.repeat_interleave,
    aten.unique_consecutive,
    aten.unique_dim,
}
_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
_PRODUCTS = {aten.addmm, aten.baddbmm, aten.bmm, aten.convolution, aten.mm}
_PACKAGES = ("blip2_hf", "transformers")


@dataclass
class Read:
    """The package and the place in it, the operation, and the number of matrix products before it."""

    package: str
    place: str
    operation: str
    products_before: int


class DeviceReads(TorchDispatchMode):
    """
    Records each [`Read`] in `reads`, in the order of the program, on any device. On a GPU, torch itself tells of those
    that are no operations of their own.
    """

    def __init__(self):
        super().__init__()
        self.reads: list[Read] = []
        self.products = 0
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> "DeviceReads":
        if torch.cuda.is_available():
            self._warnings.__enter__()
            warnings.simplefilter("always")
            warnings.showwarning = self._hear
            torch.cuda.set_sync_debug_mode("warn")
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
            self._warnings.__exit__(*error)

    def _hear(self, message, *_):
        # Not what torch says of the mode itself, which has the word "synchronizing" too
        if "called a synchronizing" in str(message):
            self.reads.append(Read(*_place(), "synchronize", self.products))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operation = function.overloadpacket
        self.products += operation in _PRODUCTS
        if operation in _READS or _moves(operation, args, kwargs) or _reads_index(operation, args):
            self.reads.append(Read(*_place(), operation.__name__, self.products))
        return function(*args, **kwargs)

    def late(self) -> list[Read]:
        """Return the reads, other than those of transformers, that wait for matrix products."""
        return [read for read in self.reads if read.package != "transformers" and read.products_before]


def _moves(operation, args, kwargs) -> bool:
    """Return whether values go from one kind of device to another."""
    if operation is aten._to_copy and kwargs.get("device") is not None:
        return args[0].device.type != torch.device(kwargs["device"]).type
    return operation is aten.copy_ and args[0].device.type != args[1].device.type


def _reads_index(operation, args) -> bool:
    """Return whether an index is a mask, whose True are counted first, or is on another device."""
    if operation not in _INDEXING:
        return False
    index = [tensor for tensor in args[1] if tensor is not None]
    return any(tensor.dtype == torch.bool or tensor.device.type != args[0].device.type for tensor in index)


def _place() -> tuple[str, str]:
    """Return the package of the innermost frame that is in one, and its file, line and function."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        for package in _PACKAGES:
            if package in path.parts:
                return package, f"{path.parent.name}/{path.name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "", "backward"
