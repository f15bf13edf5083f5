"""Time, FLOP and memory of a step, for the benchmarks."""

import contextlib
import ctypes
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils.memory import should_reduce_batch_size
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
    """Measure the median of each run, in turn, so that other jobs on the machine disturb all of them equally."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of the fastest of ten large matrix products."""
    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    torch.matmul(a, b)
    return 2 * size**3 / min(seconds(lambda: torch.matmul(a, b), device) for _ in range(10))


def peak_memory(step: Callable, device: str) -> int:
    """Measure the largest number of bytes that a step needs in addition to those before it."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    before = _resident("VmRSS")
    # Linux resets the high-water mark
    Path("/proc/self/clear_refs").write_text("5")
    step()
    return _resident("VmHWM") - before


def peak_memory_of_fresh_process(name: str) -> int:
    """
    Measure [`peak_memory`] on a CPU in a fresh process, which returns freed memory to the system at once.

    The process runs the same script with `--memory-of name`, which prints the number.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    command = [sys.executable, *sys.argv, "--memory-of", name]
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


class PeakOfOwnMemory:
    """
    Measures the largest number of bytes that a block needs in addition to those before it, 50 times a second. Mapped
    files do not count, because the system drops them when it needs the memory.
    """

    def __enter__(self):
        gc.collect()
        with contextlib.suppress(AttributeError):  # glibc gives back what is free, which would be used again unseen
            ctypes.CDLL(None).malloc_trim(0)
        self.before = self.peak = own_memory()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._stopped.wait(0.02):
            self.peak = max(self.peak, own_memory())

    def __exit__(self, *error):
        self._stopped.set()
        self._thread.join()
        self.peak = max(self.peak, own_memory())

    @property
    def mebibytes(self) -> float:
        return (self.peak - self.before) / 2**20


def own_memory() -> int:
    """Return the number of bytes of this process that are in memory, without those of mapped files."""
    return _resident("RssAnon")


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def flops(run: Callable) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def fits(step: Callable) -> bool:
    """Run a step, and tell whether the device's memory has sufficed."""
    try:
        step()
        torch.cuda.synchronize()
        return True
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
    # Only here, where the error is gone, does nothing hold the tensors of the step
    gc.collect()
    torch.cuda.empty_cache()
    return False


def largest(fits: Callable[[int], bool], start: int, probes: int = 3) -> int:
    """
    Find a number that fits, so large that hardly a larger one does: doubled until one does not, then bisected.

    Returns 0 if `start` does not fit.
    """
    if not fits(start):
        return 0
    low, high = start, 2 * start
    while fits(high):
        low, high = high, 2 * high
    for _ in range(probes):
        middle = (low + high) // 2
        if middle in (low, high):
            break
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
