"""The type that this machine multiplies fastest in."""

import time
from functools import cache

import torch


def device_type() -> str:
    """Of what the examples compute on: a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@cache
def fast_dtype() -> torch.dtype:
    """
    bfloat16 on a GPU, and on a CPU that has instructions for it. On one that has none a product in bfloat16 takes many
    times as long as in float32.
    """
    if device_type() != "cpu":
        return torch.bfloat16
    return min((torch.float32, torch.bfloat16), key=_seconds_of_product)


def fast_autocast() -> torch.autocast:
    """Autocast to that type."""
    return torch.autocast(device_type(), torch.bfloat16, enabled=fast_dtype() == torch.bfloat16)


def _seconds_of_product(dtype: torch.dtype, size: int = 384, repeats: int = 5) -> float:
    """The best of some, for other processes may have the core at times."""
    matrix, times = torch.ones(size, size, dtype=dtype), []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.matmul(matrix, matrix)
        times.append(time.perf_counter() - start)
    return min(times)
