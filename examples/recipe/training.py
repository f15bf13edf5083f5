"""Options, training with higher learning rates for new parts, and results, for both stages of the recipe."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import datasets
import torch
from settings import Training


sys.path.insert(0, str(Path(__file__).parents[1]))
from precision import fast_dtype  # noqa: E402

from blip2_hf.training import Blip2Arguments, Blip2Trainer  # noqa: E402


def learn(
    model,
    pairs: torch.utils.data.Dataset,
    collator,
    settings: Training,
    new_parts: tuple[str, ...],
    seed: int,
    folder: Path,
    trainer_class: Callable[..., Blip2Trainer],
    arguments_class: type[Blip2Arguments],
    **arguments,
) -> Blip2Trainer:
    """Train a model without checkpoints, and return the trainer."""
    new, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (new if any(part in name for part in new_parts) else rest).append(parameter)
    groups = [
        {"params": new, "lr": settings.new_parts_learning_rate},
        {"params": rest, "lr": settings.learning_rate},
    ]
    arguments = arguments_class(
        str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.new_parts_learning_rate,
        warmup_steps=settings.steps // 20,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        seed=seed,
        bf16=fast_dtype() == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        **arguments,
    )
    # One of several GPUs, because losses that call parts of the model cannot go through DataParallel
    arguments._n_gpu = min(1, arguments.n_gpu)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.05)
    trainer = trainer_class(
        model, arguments, train_dataset=pairs, data_collator=collator, optimizers=(optimizer, None)
    )
    trainer.train()
    return trainer


def parse_options(description: str, variants: Iterable[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--variant", choices=variants, default="full")
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


def fingerprint(settings: Training, rows: datasets.Dataset) -> dict:
    """Return what a trained model depends on. If it has changed, the saved model is another one."""
    return {"settings": repr(settings), "rows": rows._fingerprint, "dtype": str(fast_dtype())}


def save_json(file: Path, value):
    _save(file, lambda unfinished: unfinished.write_text(json.dumps(value)))


def save_tensors(file: Path, value):
    _save(file, lambda unfinished: torch.save(value, unfinished))


def _save(file: Path, write: Callable[[Path], object]):
    """Write a whole file or none, because run.py skips a step whose file exists."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    write(unfinished)
    unfinished.replace(file)
