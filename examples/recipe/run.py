"""
The whole recipe: pictures, features, both stages with three seeds, ablations, baselines, CapFilt, tables and plots.

    python examples/recipe/run.py                 # two cores: see README.md for how long each step takes
    python examples/recipe/run.py --seeds 0       # a first look
    python examples/recipe/run.py --dry-run       # the commands

Each step is a command that can be run alone; what is there already is not made again. As many trainings run beside
each other as there are cores, one core each, or one after the other on a GPU. Tables and plots go into outputs/recipe.
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

import pyarrow.parquet
import torch
from settings import FOLDER, SEEDS, STAGE1, STAGE2


HERE = Path(__file__).parent


def has_clip_art() -> bool:
    """Or will have it, for all that is known before there are pictures."""
    file = FOLDER / "pictures" / "clip_art.parquet"
    return not file.exists() or pyarrow.parquet.read_metadata(file).num_rows > 0


def stages(seeds: list[int]) -> Iterator[list[tuple[Path, list[str]]]]:
    """What can run at the same time, in order: what it writes last, and the command."""

    def job(script: str, result: str, *arguments: str) -> tuple[Path, list[str]]:
        return FOLDER / result, [sys.executable, str(HERE / script), *arguments]

    def runs(stage: str, variants: Iterable[str]) -> list[tuple[Path, list[str]]]:
        return [
            job(
                f"learn_{stage}.py",
                f"{stage}/{variant}-seed{seed}/results.json",
                *("--variant", variant, "--seed", str(seed)),
            )
            for variant in variants
            for seed in seeds
        ]

    yield [job("pictures.py", "pictures/clip_art.parquet")]
    yield [job("features.py", "features.json")]
    yield [
        *runs("stage1", ["full"]),
        job("baselines.py", "baselines.json"),
        *(job("capfilt.py", f"capfilt/seed{seed}.json", "--seed", str(seed)) for seed in seeds),
    ]
    # These go on from what "full" has left them
    left_out = ("full",) if has_clip_art() else ("full", "with Open Clip Art")
    yield runs("stage1", [variant for variant in STAGE1 if variant not in left_out])
    yield runs("stage2", STAGE2)
    # Each time, for there may be more results by then: there is no file of these names that would stop it
    of_one = ("--seed", str(seeds[0]))
    yield [job("report.py", "report"), job("figures.py", "figures", *of_one)]
    yield [job("learned.py", "learned", *of_one), job("prompts.py", "prompts")]


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
    # Those that this process may use, where the system tells
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    at_a_time = options.jobs or (1 if torch.cuda.is_available() else cores)
    for jobs in stages(options.seeds):
        if options.dry_run:
            print(*(shlex.join(command) for _, command in jobs), sep="\n")
            continue
        workers = min(at_a_time, len(jobs))
        with ThreadPoolExecutor(workers) as pool:
            if not all(pool.map(partial(run, threads=max(1, cores // workers)), jobs)):
                sys.exit("A step failed; run again to go on from there.")
    if not options.dry_run:
        print(f"Tables and plots are in outputs/recipe; what learned.py and prompts.py say is in {FOLDER / 'logs'}.")


if __name__ == "__main__":
    main()
