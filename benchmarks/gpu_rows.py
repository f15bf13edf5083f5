"""Rows of the table that benchmarks/gpu.py writes, and what its parts are given."""

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from shapes import PAPER, TINY, Shapes


@dataclass
class Row:
    """
    A line of the table. `here` is this library's value, or what a check found. A `ratio` above 1 means that this
    library is faster, one below 1 that it needs less memory. `passed` is `None` if nothing was checked.
    """

    name: str
    here: float | str | None = None
    baseline: float | str | None = None
    ratio: float | None = None
    passed: bool | None = None
    note: str = ""
    traceback: str | None = None


@dataclass(frozen=True)
class Setting:
    """The device, and whether models and batches are tiny."""

    device: str
    is_small: bool

    @property
    def is_cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def number(self) -> int:
        """Return the GPU's number, for maps of devices."""
        return torch.device(self.device).index or 0

    @property
    def shapes(self) -> Shapes:
        return TINY if self.is_small else PAPER

    @property
    def compiler(self) -> str:
        """Return the backend of torch.compile: on a CPU one that traces, but makes no kernels, which takes minutes."""
        return "inductor" if self.is_cuda else "aot_eager"

    def size(self, full: int, small: int) -> int:
        return small if self.is_small else full


def check(name: str, found: float, at_most: float, note: str = "") -> Row:
    """Make the row of a value that must not be larger than another, and not NaN."""
    limit = f"at most {at_most:.2g}"
    return Row(name, here=found, passed=bool(found <= at_most), note=f"{limit}; {note}" if note else limit)


def needs_gpu(name: str) -> Row:
    return Row(name, note="needs a GPU")


def attempt(name: str, rows: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """Yield the rows of a function. If it fails, yield a row that says so, because others follow."""
    try:
        yield from rows()
    except Exception as error:
        yield failed(name, error)
    free_memory()


def failed(name: str, error: BaseException) -> Row:
    first_line = next(iter(str(error).splitlines()), "")
    lines = "".join(traceback.format_exception(error))
    return Row(name, passed=False, note=f"{type(error).__name__}: {first_line[:200]}", traceback=lines)


def free_memory():
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        # After some errors a GPU refuses everything, and the rows before them are to be kept
        with suppress(RuntimeError):
            torch.cuda.empty_cache()
