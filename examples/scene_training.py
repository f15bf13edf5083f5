"""Shared by the demo and the recipe: chosen losses, batches of twins, two learning rates, the projection's start."""

from collections.abc import Iterator
from pathlib import Path

import datasets
import torch
from precision import device_type, fast_dtype, training_attention

from blip2_hf import Blip2ForConditionalGeneration, Blip2ForPreTraining
from blip2_hf.data import read_cached_features
from blip2_hf.training import Blip2Arguments, Blip2Trainer, last_complete_checkpoint


# Parts of stage 1 without pretrained weights, which learn faster than the rest
NEW_PARTS = ("crossattention", "query_tokens", "_projection", "itm_head", "lm_head.transform", "post_layernorm")

# Options of Q-Formers
QFORMER = {
    # In every layer instead of every second one as in the paper: the faster learning outweighs the cost
    "cross_attention_frequency": 1,
    # Dropout takes a tenth of the time, and did not help in so short a training
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


class ChosenLosses(Blip2ForPreTraining):
    """Stage 1 by some of its losses. Matching (ITM) takes half of the time of a step, which is saved without it."""

    losses: tuple[str, ...] = ("itc", "itm", "itg")

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        if outputs.loss is not None:
            outputs.loss = sum(outputs[f"loss_{name}"] for name in self.losses)
        return outputs

    def _second_pass(self, images, negative_images, text_embeds, *args):
        if "itm" in self.losses:
            return super()._second_pass(images, negative_images, text_embeds, *args)
        return self.itm_head.weight.new_zeros(3 * len(text_embeds), 2)


def save_as_library_class(model: ChosenLosses, folder: Path) -> Blip2ForPreTraining:
    """Save the model as [`Blip2ForPreTraining`], and return it. Commands do not know the classes of examples."""
    model.save_pretrained(folder)
    plain = Blip2ForPreTraining.from_pretrained(folder)
    plain.save_pretrained(folder)
    return plain


class Twins(torch.utils.data.Sampler):
    """
    Yields the rows of scenes in random order: two twins, then two others, in turn.

    Args:
        rows (`int`):
            Number of scenes.
        seed (`int`):
            Seed of the order, which differs from epoch to epoch.
        alone (`int`, *optional*, defaults to 0):
            Number of rows, even, that come first in the first epoch, in an order that does not look at twins. The
            first epoch has as many rows as any other, so that some come twice.
    """

    def __init__(self, rows: int, seed: int, alone: int = 0):
        self.rows, self.seed, self.alone, self.epoch = rows, seed, min(alone, rows), 0

    def __len__(self) -> int:
        return self.rows

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        chance = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        order = torch.randperm(self.rows, generator=chance).tolist()
        alone = 0 if self.epoch else self.alone
        yield from order[:alone]
        pairs = 2 * torch.randperm(self.rows // 2, generator=chance)
        together, apart = pairs[: (len(pairs) + 1) // 2], pairs[(len(pairs) + 1) // 2 :]
        others = torch.cat([apart, apart + 1])
        others = others[torch.randperm(len(others), generator=chance)].tolist()
        mixed = []
        for number, first in enumerate(together.tolist()):
            mixed += [first, first + 1, *others[2 * number : 2 * number + 2]]
        yield from mixed[: self.rows - alone]


class LearnsFromTwins(Blip2Trainer):
    """
    Makes half of a batch twins, after a quarter of the steps, or an epoch if that is shorter.

    Without twins, hardly any two scenes of a batch differ in a relation or a count alone. Contrast and matching then
    need no relations (Yuksekgonul et al. 2023: a bag of words). Matching learns them sooner if it knows the things
    before. The share of the steps is that on one device, without accumulation.
    """

    def _get_train_sampler(self, train_dataset=None):
        alone = self.args.per_device_train_batch_size * (self.args.max_steps // 4)
        return Twins(len(self.train_dataset), self.args.seed, alone)


def train(
    model,
    pairs: torch.utils.data.Dataset,
    collator,
    folder: Path,
    arguments_class: type[Blip2Arguments],
    steps: int,
    batch_size: int,
    learning_rate: float,
    new_parts: tuple[str, ...],
    new_parts_learning_rate: float,
    trainer_class: type[Blip2Trainer] = Blip2Trainer,
    **arguments,
) -> list[dict]:
    """
    Train a model, and return the log. Parameters whose name has one of `new_parts` in it have their own rate. A
    training that was stopped goes on from its last complete checkpoint in `folder`.
    """
    new, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (new if any(part in name for part in new_parts) else rest).append(parameter)
    groups = [{"params": new, "lr": new_parts_learning_rate}, {"params": rest, "lr": learning_rate}]
    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        # The last rate of the schedule is that of new parts; the other group ends at the same share of its own
        "learning_rate": new_parts_learning_rate,
        "min_learning_rate": new_parts_learning_rate / 100,
        "warmup_steps": 20,
        "max_grad_norm": 1.0,
        "logging_steps": 20,
        "save_strategy": "no",
        "report_to": [],
        "bf16": fast_dtype() == torch.bfloat16,
        "use_cpu": device_type() == "cpu",
        "dataloader_pin_memory": device_type() != "cpu",
    }
    trainer = trainer_class(
        model,
        arguments_class(str(folder), **settings | arguments),
        train_dataset=pairs,
        data_collator=collator,
        optimizers=(torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.05), None),
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    return trainer.state.log_history


def set_training_attention(model):
    """Let Q-Former and language model attend in the way that trains faster here. The tower, a CNN, cannot."""
    for part in (model.qformer, getattr(model, "language_model", None)):
        if part is not None:
            part.set_attn_implementation(training_attention())


def stack_features(scenes: datasets.Dataset) -> torch.Tensor:
    """Return the stored features of all scenes, of shape `(scenes, places, width)`, in float32."""
    stored = scenes.select_columns([name for name in scenes.column_names if name.startswith("image_embeds")])
    return torch.stack([read_cached_features(row).float() for row in stored])


@torch.no_grad()
def start_projection(model: Blip2ForConditionalGeneration, image_embeds: torch.Tensor, targets: torch.Tensor):
    """
    Start the projection, which stage 1 does not have, by least squares from queries to word embeddings.

    Args:
        model ([`Blip2ForConditionalGeneration`]):
            The model.
        image_embeds (`torch.Tensor` of shape `(scenes, places, width)`):
            Features of scenes.
        targets (`torch.Tensor` of shape `(scenes, language model hidden_size)`):
            Mean word embedding of each scene's caption. The outputs get its mean and, in each scene and over all, its
            spread.
    """
    queries = model.eval().encode_image(None, image_embeds)[2].last_hidden_state
    middle, target_middle = queries.mean(dim=(0, 1)), targets.mean(dim=0)
    centred = (queries - middle).flatten(0, 1)
    wanted = (targets - target_middle).repeat_interleave(queries.shape[1], dim=0)
    ridge = 0.1 * len(centred) * centred.var() * torch.eye(centred.shape[1], device=centred.device)
    weight = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ wanted)
    weight *= wanted.std() / (centred @ weight).std()
    model.language_projection.weight.copy_(weight.T)
    model.language_projection.bias.copy_(target_middle - middle @ weight)


def caption_embeddings(model: Blip2ForConditionalGeneration, tokenizer, captions: list[str]) -> torch.Tensor:
    """Return the mean word embedding of each caption, of shape `(captions, hidden_size)`, in float32."""
    words = model.get_input_embeddings().weight.detach().float()
    return torch.stack([words[tokenizer(f" {caption}")["input_ids"]].mean(dim=0) for caption in captions])
