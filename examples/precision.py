"""The dtype that this machine multiplies fastest in."""

import time
from functools import cache

import torch


def device_type() -> str:
    """Return the device type that the examples run on: a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@cache
def fast_dtype() -> torch.dtype:
    """
    Return bfloat16 for a GPU or a CPU with instructions for it, else float32.

    A CPU is measured, because PyTorch does not tell the instructions of all CPUs. bfloat16 must be at least as fast in
    the best of ten products. The difference is clear: without such instructions a product takes many times as long.
    """
    if device_type() != "cpu":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # In turn, because other processes may use the core at times
        pairs = [(_seconds_of_product(torch.bfloat16), _seconds_of_product(torch.float32)) for _ in range(10)]
        bfloat16, float32 = (min(seconds) for seconds in zip(*pairs, strict=True))
        is_fast = bfloat16 <= float32
    return torch.bfloat16 if is_fast else torch.float32


def fast_autocast() -> torch.autocast:
    """Return an autocast to [`fast_dtype`]."""
    return torch.autocast(device_type(), torch.bfloat16, enabled=fast_dtype() == torch.bfloat16)


def computed_in() -> dict[str, str]:
    """Return what results depend on besides their settings."""
    device = torch.cuda.get_device_name() if device_type() == "cuda" else "cpu"
    dtype = str(fast_dtype()).removeprefix("torch.")
    return {"dtype": dtype, "device": device, "torch": str(torch.__version__)}


def _seconds_of_product(dtype: torch.dtype, size: int = 384) -> float:
    matrix = torch.ones(size, size, dtype=dtype)
    start = time.perf_counter()
    torch.matmul(matrix, matrix)
    return time.perf_counter() - start
