"""Tiny pictures with captions for stage 2 and fine-tuning, and what their tests need of a run."""

import torch
from tiny import make_image, make_model, make_processor

from blip2_hf.training import Blip2Trainer, FineTuningArguments


CAPTIONS = ["a dog", "a red bus", "two people", "the sky"]


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return len(CAPTIONS)

    def __getitem__(self, index):
        return {"image": make_image(index), "caption": CAPTIONS[index]}


def make_collator(processor):
    def collate(examples):
        return dict(
            processor(
                images=[example["image"] for example in examples],
                text="a photo of",
                text_target=[example["caption"] for example in examples],
                return_tensors="pt",
            )
        )

    return collate


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def remove_dropout(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


def make_batch(name: str = "opt") -> dict[str, torch.Tensor]:
    """Ragged texts, with prompts that are not learned."""
    processor = make_processor(is_encoder_decoder=name == "t5")
    collate = make_collator(processor)
    return collate([Pictures()[index] for index in range(len(CAPTIONS))])


def trained_names(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def make_arguments(folder, kind=FineTuningArguments, **kwargs):
    fields = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "max_steps": 6,
        "warmup_steps": 0.3,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "load_best_model_at_end": False,
    }
    return kind(str(folder), **(fields | kwargs))


def make_trainer(folder, name="opt", kind=FineTuningArguments, model=None, compute_metrics=None, **kwargs):
    processor = make_processor(is_encoder_decoder=name == "t5")
    model = model or make_model(name)
    model.generation_config.max_new_tokens = 6
    return Blip2Trainer(
        model,
        make_arguments(folder, kind, **kwargs),
        train_dataset=Pictures(),
        eval_dataset=Pictures(),
        data_collator=make_collator(processor),
        compute_metrics=compute_metrics and compute_metrics(processor),
        processing_class=processor,
    )
