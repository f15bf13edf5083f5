"""Options, training with two learning rates, and results: what the trainings of the recipe share."""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from settings import Training


sys.path.insert(0, str(Path(__file__).parents[1]))
from precision import computed_in  # noqa: E402
from scene_training import train  # noqa: E402

from blip2_hf.training import Blip2Arguments, Blip2Trainer, last_complete_checkpoint  # noqa: E402


def learn(
    model,
    pairs: torch.utils.data.Dataset,
    collator,
    settings: Training,
    new_parts: tuple[str, ...],
    seed: int,
    folder: Path,
    arguments_class: type[Blip2Arguments],
    trainer_class: type[Blip2Trainer] = Blip2Trainer,
) -> tuple[list[dict], float | None]:
    """
    Train a model. A stopped training goes on from its last checkpoint in `folder`.

    Return the log, and the seconds that it took, which are unknown after a stop.
    """
    is_continued, start = last_complete_checkpoint(folder) is not None, time.time()
    log = train(
        model,
        pairs,
        collator,
        folder,
        arguments_class,
        settings.steps,
        settings.batch_size,
        settings.learning_rate,
        new_parts,
        settings.new_parts_learning_rate,
        trainer_class,
        save_strategy="steps",
        save_steps=100,
        save_total_limit=1,
        seed=seed,
        disable_tqdm=True,
    )
    return log, None if is_continued else time.time() - start


def parse_options(description: str, variants: Iterable[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--variant", choices=variants, default=next(iter(variants)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validate", action="store_true", help="hold out one of the training styles, and test on it")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings, in JSON")
    parser.add_argument("--output", type=Path, help="another folder than that of the recipe's results")
    options = parser.parse_args()
    if options.set and not (options.validate or options.output):
        parser.error(
            "--set would overwrite the recipe's results with those of other settings: give --output or --validate."
        )
    options.set = {name: json.loads(value) for name, _, value in (text.partition("=") for text in options.set)}
    return options


def save_results(folder: Path, results: dict, log: list[dict], seconds: float | None, **more):
    """Print the results, and write them with the log and what they depend on besides the settings."""
    print(json.dumps(results, indent=1))
    record = {"results": results, "log": log, "seconds": seconds, "computed in": computed_in()}
    save_json(folder / "results.json", record | more)
    # With the state of the optimizer they are larger than the model, and nothing goes on from them
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def save_json(file: Path, value):
    """Write a whole file or none, because run.py skips a step whose file exists."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(value))
    unfinished.replace(file)
