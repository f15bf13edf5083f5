"""
Run the whole recipe: scenes, features, a probe of them, both stages, questions, ablations, three seeds, tables.

    python examples/recipe/run.py                 # README.md says how long each step takes on a core
    python examples/recipe/run.py --seeds 0       # a first look
    python examples/recipe/run.py --dry-run       # the commands

Each step is a command that can be run alone. A step whose result exists is skipped. A training that was stopped goes
on from its last checkpoint. On a CPU as many trainings run at a time as there are cores, one core each; on a GPU one
after the other. Tables go into outputs/recipe.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from settings import FOLDER, QUESTIONS, SEEDS, STAGE1, STAGE2, START


HERE = Path(__file__).parent


def stages(seeds: list[int]) -> Iterator[list[tuple[Path, list[str]]]]:
    """Yield lists of jobs that can run at the same time. A job is its result and its command."""

    def job(script: str, result: str, *arguments: str) -> tuple[Path, list[str]]:
        return FOLDER / result, [sys.executable, str(HERE / script), *arguments]

    def runs(stage: str, variants: Iterable[str]) -> list[tuple[Path, list[str]]]:
        # All variants of a seed before those of the next one, so that a run that is stopped has whole tables
        return [
            job(
                f"learn_{stage}.py",
                f"{stage}/{variant}-seed{seed}/results.json",
                *("--variant", variant, "--seed", str(seed)),
            )
            for seed in seeds
            for variant in variants
        ]

    yield [job("features.py", "features.json")]
    yield [job("probe.py", "probe.json")]
    yield runs("stage1", START)
    yield runs("stage1", STAGE1)
    yield runs("stage2", STAGE2)
    yield [job("choose_captions.py", f"choose/full-seed{seed}/results.json", "--seed", str(seed)) for seed in seeds]
    yield runs("questions", QUESTIONS)
    # No step writes this result, so that it runs each time: there may be new results to show
    yield [job("report.py", "report")]


def run(job: tuple[Path, list[str]], threads: int) -> bool:
    result, command = job
    if result.exists():
        return True
    log = FOLDER / "logs" / (result.relative_to(FOLDER).as_posix().replace("/", "-") + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.time()
    with log.open("a") as output:
        code = subprocess.run(
            command, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": str(threads)}
        ).returncode
    print(
        f"{time.time() - start:6.0f} s  {shlex.join(command[1:])}{'' if code == 0 else f'  FAILED, see {log}'}",
        flush=True,
    )
    return code == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--jobs", type=int, help="trainings at a time; one for each core, or one on a GPU")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    options = parser.parse_args()
    # The cores that this process may use, if the system tells
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    at_a_time = options.jobs or (1 if torch.cuda.is_available() else cores)
    for jobs in stages(options.seeds):
        if options.dry_run:
            print(*(shlex.join(command) for _, command in jobs), sep="\n")
            continue
        workers = min(at_a_time, len(jobs))
        with ThreadPoolExecutor(workers) as pool:
            if not all(pool.map(partial(run, threads=max(1, cores // workers)), jobs)):
                sys.exit("A step failed. Run this again to continue from there.")
    if not options.dry_run:
        print("The tables are in outputs/recipe.")


if __name__ == "__main__":
    main()
