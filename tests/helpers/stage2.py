"""Tiny pictures with captions for stage 2 and fine-tuning, and what their tests need of a run."""

import torch
from tiny import make_image


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


def remove_dropout(model: torch.nn.Module):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
