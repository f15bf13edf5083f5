"""Functions in processes of their own, forked from one that has imported torch and this package, which takes long."""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist


TIMEOUT = 300
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["blip2_hf.data", "blip2_hf.evaluation", "blip2_hf.training", "torch.distributed.fsdp"])


class Printed(NamedTuple):
    stdout: str
    stderr: str


def start(function: Callable, *arguments, folder: Path, rank: int = 0, **environment: str) -> BaseProcess:
    """Start a process that calls a function of a module; what it prints goes to files in the folder."""
    process = _FORKS.Process(target=_call, args=(function, arguments, _files(folder, rank), environment))
    process.start()
    return process


def run(
    function: Callable,
    *arguments,
    folder: Path,
    processes: int = 1,
    machines: int = 1,
    fails: bool = False,
    **environment: str,
) -> list[Printed]:
    """
    Call a function in processes that torch.distributed can join, as with `torchrun`; return what each printed. Each of
    several machines counts its processes from 0, and has a home, a folder of temporary files and a current one.
    """
    # Holds a port of its own, as torchrun does
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    on_one = processes // machines
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(on_one), **environment}
    started = []
    for rank in range(processes):
        own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank % on_one)} if processes > 1 else {}
        if machines > 1:
            own |= make_machine(folder / f"machine-{rank // on_one}")
        started.append(start(function, *arguments, folder=folder, rank=rank, **own))
    # Until all have ended, or one has failed, which others may be waiting for
    while alive := [process.sentinel for process in started if process.is_alive()]:
        if any(process.exitcode for process in started) or not wait(alive, TIMEOUT):
            break
    for process in started:
        process.kill()
        process.join()
    printed = [Printed(*(file.read_text() for file in _files(folder, rank))) for rank in range(processes)]
    assert [process.exitcode for process in started] == [int(fails)] * processes, printed
    return printed


def make_machine(folder: Path) -> dict[str, str]:
    """Make the folders that a machine has for itself, and return the environment that names them."""
    places = {"HOME": "home", "TMPDIR": "tmp", "HF_HOME": "hf", "PWD": "work"}
    for name in places.values():
        (folder / name).mkdir(parents=True, exist_ok=True)
    return {variable: str(folder / name) for variable, name in places.items()}


def run_script(script: Path, *options: str, folder: Path, fails: bool = False) -> Printed:
    """Run a script as `python script options` does in the folder."""
    return run(_run_script, script, options, folder, folder=folder, fails=fails)[0]


def _run_script(script: Path, options: tuple[str, ...], folder: Path):
    os.chdir(folder)
    sys.argv = [str(script), *options]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def _files(folder: Path, rank: int) -> list[Path]:
    return [folder / f"{name}-{rank}.txt" for name in ("stdout", "stderr")]


def _call(function: Callable, arguments: tuple, files: list[Path], environment: dict[str, str]):
    for number, path in enumerate(files, start=1):
        with path.open("w") as file:
            os.dup2(file.fileno(), number)
    os.environ.update(environment)
    if "PWD" in environment:
        os.chdir(environment["PWD"])
    function(*arguments)
    # gloo's threads abort a process now and then that ends by way of the interpreter (pytorch/pytorch#179291)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
