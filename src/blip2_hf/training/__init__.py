"""Training with transformers' `Trainer`: the paper's settings, trained parts, learning rates by layer, resumption."""

from .arguments import Blip2Arguments, FineTuningArguments, Stage1Arguments, Stage2Arguments
from .checkpoints import checkpoint_to_resume, last_complete_checkpoint
from .layer_decay import vision_layer_scales
from .presets import describe_trained_parts, train_only
from .trainer import Blip2Trainer


__all__ = [
    "Blip2Arguments",
    "Blip2Trainer",
    "FineTuningArguments",
    "Stage1Arguments",
    "Stage2Arguments",
    "checkpoint_to_resume",
    "describe_trained_parts",
    "last_complete_checkpoint",
    "train_only",
    "vision_layer_scales",
]
