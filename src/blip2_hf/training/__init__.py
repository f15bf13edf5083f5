"""Training with transformers' `Trainer`: the paper's settings, trained parts, learning rates by layer, resumption."""

from .arguments import (
    Blip2Arguments,
    FineTuningArguments,
    RetrievalArguments,
    Stage1Arguments,
    Stage2Arguments,
)
from .checkpoints import checkpoint_to_resume, last_complete_checkpoint
from .diversity import query_diversity
from .early_stopping import EarlyStopping
from .layer_decay import vision_layer_scales
from .model_loading import load_stage1, load_writer, make_stage1, make_stage2
from .presets import describe_trained_parts, train_only
from .runs import make_trainer, save_result, train_from_last_checkpoint, training_pairs, without_bad_rows
from .sample_table import SampleTable
from .trainer import Blip2Trainer


__all__ = [
    "Blip2Arguments",
    "Blip2Trainer",
    "EarlyStopping",
    "FineTuningArguments",
    "RetrievalArguments",
    "SampleTable",
    "Stage1Arguments",
    "Stage2Arguments",
    "checkpoint_to_resume",
    "describe_trained_parts",
    "last_complete_checkpoint",
    "load_stage1",
    "load_writer",
    "make_stage1",
    "make_stage2",
    "make_trainer",
    "query_diversity",
    "save_result",
    "train_from_last_checkpoint",
    "train_only",
    "training_pairs",
    "vision_layer_scales",
    "without_bad_rows",
]
