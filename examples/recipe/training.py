"""What both stages of the recipe share: their options, a Q-Former whose new parts learn faster, and their results."""

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
    """Trains, without checkpoints, and returns the trainer."""
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
    # Of several GPUs one: losses that call parts of the model can't go through DataParallel
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
    parser.add_argument("--validate", action="store_true", help="test on a style of the training pictures")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings, in JSON")
    parser.add_argument("--output", type=Path, help="another folder than that of the recipe's results")
    options = parser.parse_args()
    if options.set and not (options.validate or options.output):
        parser.error("Other settings would take the place of the recipe's results: give --output, or --validate.")
    options.set = {name: json.loads(value) for name, _, value in (text.partition("=") for text in options.set)}
    return options


def made_of(settings: Training, rows: datasets.Dataset) -> dict:
    """What a model that has been learned depends on: where it differs, what is there is another model."""
    return {"settings": repr(settings), "rows": rows._fingerprint, "dtype": str(fast_dtype())}


def save_json(file: Path, value):
    _save(file, lambda unfinished: unfinished.write_text(json.dumps(value)))


def save_tensors(file: Path, value):
    _save(file, lambda unfinished: torch.save(value, unfinished))


def _save(file: Path, write: Callable[[Path], object]):
    """All of it or nothing: a file that is there stands for a step that is done."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    write(unfinished)
    unfinished.replace(file)
