"""Finds where a program waits for its device, to read a value or to make a tensor whose size depends on one."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode


aten = torch.ops.aten
_READS = {
    aten._local_scalar_dense,
    aten._unique2,
    aten.equal,
    aten.masked_select,
    aten.nonzero,
    aten.repeat_interleave,
    aten.unique_consecutive,
    aten.unique_dim,
}
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
    """Records each [`Read`] in `reads`, on any device, in the order of the program."""

    def __init__(self):
        super().__init__()
        self.reads: list[Read] = []
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        self.products += packet in _PRODUCTS
        if packet in _READS or _has_boolean_index(packet, args):
            self.reads.append(Read(*_place(), packet.__name__, self.products))
        return func(*args, **kwargs)

    def late(self) -> list[Read]:
        """Return the reads of blip2_hf that wait for matrix products."""
        return [read for read in self.reads if read.package == "blip2_hf" and read.products_before]


def _has_boolean_index(packet, args) -> bool:
    if packet not in (aten.index, aten.index_put, aten.index_put_):
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _place() -> tuple[str, str]:
    """Return the package of the innermost frame that is in one, and its file, line and function."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        for package in _PACKAGES:
            if package in path.parts:
                return package, f"{path.parent.name}/{path.name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "", ""
