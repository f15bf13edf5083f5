"""What the benchmarks measure: time, work and memory of a step."""

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode


def synchronize(device: str):
    if device != "cpu":
        torch.cuda.synchronize()


def seconds(run: Callable, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def seconds_in_turn(runs: dict[str, Callable], device: str, repeats: int) -> dict[str, float]:
    """The median of each, one after the other, so that what disturbs the machine disturbs all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the best of some large matrix products."""
    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    torch.matmul(a, b)
    return 2 * size**3 / min(seconds(lambda: torch.matmul(a, b), device) for _ in range(10))


def peak_memory(step: Callable, device: str) -> int:
    """Bytes that a step needs at most, above what is there before it."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    before = _resident("VmRSS")
    # Linux: the high-water mark starts anew
    Path("/proc/self/clear_refs").write_text("5")
    step()
    return _resident("VmHWM") - before


def peak_memory_of_fresh_process(name: str) -> int:
    """
    On a CPU: in a process in which memory that is freed goes back at once, so that the resident size tells. It runs
    the same script with `--memory-of name`, which prints the number.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    command = [sys.executable, *sys.argv, "--memory-of", name]
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def flops(run: Callable) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
