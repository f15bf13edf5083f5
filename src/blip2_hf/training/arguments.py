"""The paper's settings, as `TrainingArguments` with other defaults."""

from dataclasses import dataclass, field
from typing import Any

from transformers.training_args import TrainingArguments


PAPER_STEPS = 250_000
PAPER_SCHEDULE = "cosine_warmup_with_min_lr"


@dataclass
class Stage1Arguments(TrainingArguments):
    r"""
    [`~transformers.TrainingArguments`] whose defaults are those of stage 1 in the paper (section 3.4): AdamW with
    betas of 0.9 and 0.98 and a weight decay of 0.05, 2,000 steps of warm-up to a learning rate of 1e-4 from a
    hundredth of it (as in the authors' code), and a cosine down to a tenth of it, 250,000 steps in all.

    The paper's batch, over all processes, is of 2,320 pairs for ViT-L and 1,680 for ViT-g.

    Args:
        num_train_epochs (`float`, *optional*, defaults to 0):
            Length of the run in epochs, in place of the paper's number of steps.
        gradient_caching_chunk_size (`int`, *optional*):
            How many pairs of a batch have a graph at a time, where the batch is larger than memory (see
            [`Blip2ForPreTraining.gradient_caching_enable`]). The batches of `gradient_accumulation_steps` are then
            one, contrasted as a whole.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak of the learning rate."})
    weight_decay: float = field(default=0.05, metadata={"help": "Of all but queries, temperature, biases and norms."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Beta2 of AdamW."})
    num_train_epochs: float = field(default=0, metadata={"help": "Epochs, in place of the paper's number of steps."})
    max_steps: int = field(default=PAPER_STEPS, metadata={"help": "Number of steps."})
    warmup_steps: float = field(default=2000, metadata={"help": "Steps of linear warm-up, or a share of all steps."})
    lr_scheduler_type: str = field(default=PAPER_SCHEDULE, metadata={"help": "Schedule of the learning rate."})
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the schedule, in place of the paper's."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Largest norm of gradients; 0 for no limit."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "A last batch of one pair has no negatives."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator chooses what it needs."})
    label_names: list[str] | None = field(
        default_factory=lambda: ["image_ids"], metadata={"help": "What the metrics of evaluation are told."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every parameter that is trained has a gradient at each step."}
    )
    gradient_caching_chunk_size: int | None = field(
        default=None, metadata={"help": "How many pairs of a batch have a graph at a time."}
    )

    def __post_init__(self):
        if self.num_train_epochs > 0 and self.max_steps == PAPER_STEPS:
            self.max_steps = -1
        if self.lr_scheduler_type == PAPER_SCHEDULE and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1, "warmup_lr_rate": 0.01}
        if self.gradient_caching_chunk_size is not None:
            # One contrastive batch of all that would have been accumulated
            self.per_device_train_batch_size *= self.gradient_accumulation_steps
            self.gradient_accumulation_steps = 1
        super().__post_init__()


__all__ = ["Stage1Arguments"]
