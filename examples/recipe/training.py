"""What both stages of the recipe share: a Q-Former whose new parts learn faster than those that were pretrained."""

from collections.abc import Callable
from pathlib import Path

import torch
from settings import Training

from blip2_hf.training import Blip2Arguments, Blip2Trainer


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
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        **arguments,
    )
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.05)
    trainer = trainer_class(
        model, arguments, train_dataset=pairs, data_collator=collator, optimizers=(optimizer, None)
    )
    trainer.train()
    return trainer
