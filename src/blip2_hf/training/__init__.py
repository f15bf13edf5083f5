"""Training with transformers' `Trainer`: the paper's settings, what decays, what is logged, going on after a stop."""

from .arguments import Stage1Arguments
from .checkpoints import last_complete_checkpoint
from .trainer import Blip2Trainer, describe_trained_parts


__all__ = ["Blip2Trainer", "Stage1Arguments", "describe_trained_parts", "last_complete_checkpoint"]
