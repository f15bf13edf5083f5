"""Measures what is fastest on this machine: the dtype of products, and the attention of a training."""

import time
from collections.abc import Callable
from functools import cache

import torch
from torch.nn import functional as F


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


@cache
def training_attention() -> str:
    """
    Return the implementation of attention that trains faster, `"eager"` or `"sdpa"`.

    On a CPU it is measured once, forward and backward, in [`fast_dtype`], on 64 rows of 40 tokens with a mask: in
    bfloat16 the backward of the fused kernel takes longer than plain products, in float32 it may not.
    """
    if device_type() != "cpu":
        return "sdpa"
    kinds = {"eager": _plain_attention, "sdpa": F.scaled_dot_product_attention}
    seconds = {name: min(_seconds_of_attention(attend) for _ in range(5)) for name, attend in kinds.items()}
    return min(seconds, key=seconds.__getitem__)


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


def _plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5 + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value


def _seconds_of_attention(attend: Callable[..., torch.Tensor]) -> float:
    inputs = [torch.ones(64, 12, 40, 32, dtype=fast_dtype(), requires_grad=True) for _ in range(3)]
    mask = torch.zeros(64, 1, 40, 40, dtype=fast_dtype())
    start = time.perf_counter()
    attend(*inputs, mask).sum().backward()
    return time.perf_counter() - start
