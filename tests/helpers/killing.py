"""Runs of a job that end at a moment that is chosen: killed, or with a full disk."""

import os
from collections.abc import Callable

import torch


def fork(run: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> int:
    """Run in a process of its own, and return its exit status: 0, 1 after an exception, or -9 if it was killed."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # the threads of the parent are not here
            prepare()
            run()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
