"""
Run the whole recipe: pictures, features, both stages with three seeds, ablations, baselines, CapFilt, tables, plots.

    python examples/recipe/run.py                 # README.md says how long each step takes on two cores
    python examples/recipe/run.py --seeds 0       # a first look
    python examples/recipe/run.py --dry-run       # the commands

Each step is a command that can be run alone. A step whose result exists is skipped. On a CPU as many trainings run at
a time as there are cores, one core each; on a GPU one after the other. Tables and plots go into outputs/recipe.
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
    """Tell whether there are pictures of Open Clip Art, or may be once the pictures are made."""
    file = FOLDER / "pictures" / "clip_art.parquet"
    return not file.exists() or pyarrow.parquet.read_metadata(file).num_rows > 0


def stages(seeds: list[int]) -> Iterator[list[tuple[Path, list[str]]]]:
    """Yield lists of jobs that can run at the same time. A job is its result and its command."""

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
    # These continue from "full"
    left_out = ("full",) if has_clip_art() else ("full", "with Open Clip Art")
    yield runs("stage1", [variant for variant in STAGE1 if variant not in left_out])
    yield runs("stage2", STAGE2)
    # No step writes these results, so that these steps run each time: there may be new results to show
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
        print(
            f"Tables and plots are in outputs/recipe. The output of learned.py and prompts.py is in {FOLDER / 'logs'}."
        )


if __name__ == "__main__":
    main()
