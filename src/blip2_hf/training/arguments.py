"""The paper's settings, as `TrainingArguments` with other defaults."""

import copy
from dataclasses import dataclass, field
from typing import Any

from transformers.training_args_seq2seq import Seq2SeqTrainingArguments
from transformers.utils import logging


logger = logging.get_logger(__name__)

PAPER_SCHEDULE = "cosine_warmup_with_min_lr"


@dataclass
class Blip2Arguments(Seq2SeqTrainingArguments):
    r"""
    [`~transformers.Seq2SeqTrainingArguments`] with the settings that are common to the paper's trainings: AdamW with a
    weight decay of 0.05, linear warm-up and a cosine, no limit on the norm of gradients.

    If `warmup_steps` is more than a tenth of all steps, it is shortened to a tenth, with a warning, because the
    paper's 2,000 could be all of a short run. A share of all steps, such as 0.3, is taken as it is.

    Args:
        preset (`str`, *optional*):
            Which parts are trained (see [`train_only`]). Defaults to those that the model trains already.
        vision_layer_decay (`float`, *optional*, defaults to 1.0):
            Learning rate of each block of the tower over that of the block after it (appendix: 0.95 or 0.9, if the
            tower is trained).
        min_learning_rate (`float`, *optional*):
            Last learning rate of the paper's cosine, or `learning_rate` if that is lower.
        gradient_caching_chunk_size (`int`, *optional*):
            Stage 1: number of pairs of a batch that have a graph at the same time, if the batch is larger than memory
            (see [`Blip2ForPreTraining.gradient_caching_enable`]). The batches of `gradient_accumulation_steps` then
            become one, which is contrasted as a whole.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether [`checkpoint_to_resume`] deletes the checkpoints in `output_dir` to start again.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak of the learning rate."})
    min_learning_rate: float = field(default=0.0, metadata={"help": "Where the cosine ends."})
    weight_decay: float = field(default=0.05, metadata={"help": "Of all but queries, temperature, biases and norms."})
    warmup_steps: float = field(
        default=2000, metadata={"help": "Steps of warm-up (a tenth of all at most), or a share."}
    )
    lr_scheduler_type: str = field(default=PAPER_SCHEDULE, metadata={"help": "Schedule of the learning rate."})
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the schedule, in place of the paper's."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Largest norm of gradients; 0 for no limit."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator chooses what it needs."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every parameter that is trained has a gradient at each step."}
    )
    preset: str | None = field(default=None, metadata={"help": "Which parts are trained."})
    vision_layer_decay: float = field(
        default=1.0, metadata={"help": "Learning rate of a block of the tower over that of the block after it."}
    )
    gradient_caching_chunk_size: int | None = field(
        default=None, metadata={"help": "Stage 1: number of pairs of a batch that have a graph at the same time."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete the checkpoints in output_dir, and start again."})

    def __post_init__(self):
        if not 0 < self.vision_layer_decay <= 1:
            raise ValueError(f"vision_layer_decay is {self.vision_layer_decay}: a number in (0, 1] was expected.")
        if self.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor}: 0 was expected, because Trainer would "
                "smooth labels that are not shifted. The losses of stage 1 have the authors' smoothing already."
            )
        if self.lr_scheduler_type == PAPER_SCHEDULE and self.lr_scheduler_kwargs is None:
            # Warm-up starts from a hundredth of the peak, as in the authors' code
            min_rate = min(self.min_learning_rate / self.learning_rate, 1.0) if self.learning_rate > 0 else 0.0
            self.lr_scheduler_kwargs = {"min_lr_rate": min_rate, "warmup_lr_rate": 0.01}
        if self.gradient_caching_chunk_size is not None:
            # The batches that would have been accumulated become one contrastive batch
            self.per_device_train_batch_size *= self.gradient_accumulation_steps
            self.gradient_accumulation_steps = 1
        super().__post_init__()

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """
        Return the number of steps of warm-up.

        Args:
            num_training_steps (`int`):
                Steps of the run.

        Returns:
            `int`: `warmup_steps`, or that share of all steps if it is below 1; otherwise a tenth of all steps at most.
        """
        steps = super().get_warmup_steps(num_training_steps)
        longest = num_training_steps // 10
        if self.warmup_steps < 1 or steps <= longest:
            return steps
        if self.process_index == 0:
            logger.warning(
                f"warmup_steps: {steps:,} is more than a tenth of the {num_training_steps:,} steps of this run, and "
                f"is shortened to {longest:,}. A longer warm-up can be given as a share of all steps, such as 0.3."
            )
        return longest

    def __getstate__(self) -> dict[str, Any]:
        # Trainer pickles the arguments into training_args.bin and pushes it: no place for a secret
        return {**vars(self), "hub_token": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Blip2Arguments":
        # Not by `__getstate__`, because a copy would lose the token
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __copy__(self) -> "Blip2Arguments":
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied


@dataclass
class _PreTrainingArguments(Blip2Arguments):
    """Arguments of both stages, which are counted in steps unless `num_train_epochs` is given."""

    num_train_epochs: float = field(default=0, metadata={"help": "Epochs, in place of the paper's number of steps."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Beta2 of AdamW."})

    def __post_init__(self):
        if self.num_train_epochs > 0 and self.max_steps == type(self).max_steps:
            self.max_steps = -1
        super().__post_init__()


@dataclass
class Stage1Arguments(_PreTrainingArguments):
    r"""
    The paper's stage 1 (section 3.4): AdamW with betas of 0.9 and 0.98 and a weight decay of 0.05, 2,000 steps of
    warm-up to a learning rate of 1e-4 from a hundredth of it (as in the authors' code), and a cosine down to a tenth
    of it, 250,000 steps in all.

    The paper's batch, over all processes, has 2,320 pairs for ViT-L and 1,680 for ViT-g.

    Args:
        num_train_epochs (`float`, *optional*, defaults to 0):
            Length of the run in epochs, in place of the paper's number of steps.
        kwargs:
            Arguments of [`Blip2Arguments`].
    """

    max_steps: int = field(default=250_000, metadata={"help": "Number of steps."})
    min_learning_rate: float = field(default=1e-5, metadata={"help": "Where the cosine ends."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "A last batch of one pair has no negatives."})
    label_names: list[str] | None = field(
        default_factory=lambda: ["image_ids"], metadata={"help": "Inputs that the metrics of evaluation are given."}
    )


@dataclass
class Stage2Arguments(_PreTrainingArguments):
    r"""
    The paper's stage 2 (section 3.4): as stage 1, but 80,000 steps and a cosine that ends at 5e-5. Its batch, over all
    processes, has 1,920 pairs for OPT and 1,520 for FlanT5.

    Args:
        num_train_epochs (`float`, *optional*, defaults to 0):
            Length of the run in epochs, in place of the paper's number of steps.
        kwargs:
            Arguments of [`Blip2Arguments`].
    """

    max_steps: int = field(default=80_000, metadata={"help": "Number of steps."})
    min_learning_rate: float = field(default=5e-5, metadata={"help": "Where the cosine ends."})


@dataclass
class FineTuningArguments(Blip2Arguments):
    r"""
    The paper's fine-tuning (appendix): 5 epochs, a learning rate of 1e-5 after 1,000 steps of warm-up, betas of 0.9
    and 0.999, the tower trained beside the Q-Former, evaluation by generation. Captioning: a batch of 256, pictures of
    364 pixels, a `vision_layer_decay` of 1 (FlanT5-XL, OPT-2.7B) or 0.95 (OPT-6.7B). VQA: a batch of 128, 490 pixels,
    0.95 (FlanT5-XL, OPT-2.7B) or 0.9 (OPT-6.7B).

    Args:
        kwargs:
            Arguments of [`Blip2Arguments`].
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "Peak of the learning rate."})
    num_train_epochs: float = field(default=5, metadata={"help": "Epochs."})
    warmup_steps: float = field(
        default=1000, metadata={"help": "Steps of warm-up (a tenth of all at most), or a share."}
    )
    preset: str | None = field(default="finetune", metadata={"help": "Which parts are trained."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Number of checkpoints to keep."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Whether the best checkpoint is kept."})
    metric_for_best_model: str | None = field(default="word_f1", metadata={"help": "Metric of the best checkpoint."})
    predict_with_generate: bool = field(default=True, metadata={"help": "Evaluation by generation."})


@dataclass
class RetrievalArguments(FineTuningArguments):
    r"""
    The paper's fine-tuning for retrieval (section 4.4, appendix): ITC, ITM and ITG of a [`Blip2ForPreTraining`], the
    tower trained too, 5 epochs of pictures of 364 pixels. These are the settings for ViT-g: a learning rate of 1e-5,
    betas of 0.9 and 0.999, a `vision_layer_decay` of 0.95. ViT-L: 5e-6, 0.9 and 0.98, 1. The batch has 224 pairs, over
    all processes. The best checkpoint is that with the best mean of all recalls of contrast.

    Args:
        kwargs:
            Arguments of [`Blip2Arguments`].
    """

    vision_layer_decay: float = field(
        default=0.95, metadata={"help": "Learning rate of a block of the tower over that of the block after it."}
    )
    dataloader_drop_last: bool = field(default=True, metadata={"help": "A last batch of one pair has no negatives."})
    label_names: list[str] | None = field(
        default_factory=lambda: ["image_ids"], metadata={"help": "Inputs that the metrics of evaluation are given."}
    )
    metric_for_best_model: str | None = field(
        default="mean_recall", metadata={"help": "Metric of the best checkpoint."}
    )
    predict_with_generate: bool = field(default=False, metadata={"help": "Evaluation by generation."})


__all__ = ["Blip2Arguments", "FineTuningArguments", "RetrievalArguments", "Stage1Arguments", "Stage2Arguments"]
