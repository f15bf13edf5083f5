"""Runs of a job in a process of its own, in which something happens at a step that is chosen."""

import builtins
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch


open_plainly = open

WRITE, RENAME, REMOVE = "write", "rename", "remove"
_EVENTS = {"os.rename": RENAME, "os.remove": REMOVE, "os.rmdir": REMOVE, "shutil.rmtree": REMOVE}


def run_apart(run: Callable[[], object], report: Path) -> tuple[int, str]:
    """Return the exit status, which is -9 if the process was killed, and the exception that ended it."""
    # Before the child begins, which may have ended when the parent goes on
    report.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # the threads of the parent are not here
            run()
            status = 0
        except BaseException as error:
            with open_plainly(report, "w") as file:
                file.write(f"{type(error).__name__}: {error}")
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, report.read_text() if report.exists() else ""


class Steps:
    r"""
    Counts what this process writes, renames and removes below a folder, from now until it ends.

    Args:
        folder (`Path`):
            The folder.
        strike (`Callable`):
            `strike(kind, number)` is called before each step; before a write, half of it is written.
    """

    def __init__(self, folder: Path, strike: Callable[[str, int], None]):
        self.folder = os.path.join(folder, "")
        self.strike = strike
        self.count = 0
        sys.addaudithook(self._audit)
        builtins.open = io.open = self._open

    def step(self, kind: str):
        self.count += 1
        self.strike(kind, self.count)

    def is_inside(self, path) -> bool:
        return isinstance(path, (str, os.PathLike)) and str(os.path.abspath(path)).startswith(self.folder)

    def _audit(self, event: str, arguments: tuple):
        if event in _EVENTS and self.is_inside(arguments[0]):
            self.step(_EVENTS[event])

    def _open(self, path, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *others):
        if not (set(mode) & set("wxa+") and self.is_inside(path)):
            return open_plainly(path, mode, buffering, encoding, errors, newline, *others)
        raw = _Counted(path, mode.replace("b", "").replace("t", ""))
        raw.steps = self
        file = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return file if "b" in mode else io.TextIOWrapper(file, encoding, errors, newline)


class _Counted(io.FileIO):
    """A file whose every write to the disk is a step."""

    steps: Steps

    def write(self, data) -> int:
        data = memoryview(data).cast("B")
        half = super().write(data[: len(data) // 2])
        self.steps.step(WRITE)
        return half + super().write(data[half:])
