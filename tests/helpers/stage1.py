"""Tiny stage-1 models and batches, and what their tests compare with."""

import torch
from tiny import QFORMER, make_config, randomize

from blip2_hf import Blip2ForPreTraining


STAGE1_QFORMER = {
    **QFORMER,
    "use_qformer_text_input": True,
    "eos_token_id": 3,
}


def make_stage1(qformer_dropout: float = 0.0, **kwargs) -> Blip2ForPreTraining:
    """A model whose gradients are neither tiny nor huge, for a comparison in float32 to mean something."""
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), qformer_dropout)
    fields = {"qformer_config": {**STAGE1_QFORMER, **dropout}, "image_token_index": None}
    model = randomize(Blip2ForPreTraining(make_config(None, **(fields | kwargs))), std=0.15)
    with torch.no_grad():
        model.temperature.weight.fill_(0.5)
    return model


def make_inputs(batch_size: int = 5, lengths=(7, 3, 9, 5, 4), seed: int = 0) -> dict[str, torch.Tensor]:
    """Ragged text; [CLS] is 2, [SEP] 3, padding 0."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [lengths[i % len(lengths)] for i in range(batch_size)]
    input_ids = torch.randint(4, 60, (batch_size, max(lengths)), generator=generator)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        input_ids[row, 0], input_ids[row, length - 1], input_ids[row, length:] = 2, 3, 0
        attention_mask[row, :length] = 1
    image_embeds = torch.randn(batch_size, 5, 32, generator=generator)
    return {"image_embeds": image_embeds, "input_ids": input_ids, "attention_mask": attention_mask}


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(actual: dict, expected: dict, tolerance: float):
    """Each within `tolerance` of its own largest entry, or of 1 where that is smaller."""
    for name in expected:
        scale = expected[name].abs().max().clamp(min=1)
        difference = (actual[name] - expected[name]).abs().max() / scale
        assert difference <= tolerance, f"{name}: {difference:.1e}"
