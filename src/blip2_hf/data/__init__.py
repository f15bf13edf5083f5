"""Data for training: images with texts, batches of them, and the vision tower's features, computed once."""

from .bad_rows import BadRow, BadRowError, check_pairs, leave_out_bad_rows, report_bad_rows
from .callbacks import SetEpochCallback
from .collators import ImageTextCollator, LanguageModelCollator
from .feature_cache import (
    VisionTower,
    cache_features,
    check_feature_settings,
    check_feature_size,
    load_cached_features,
    read_cached_features,
)
from .held_out import find_id_column, hold_out, with_picture_ids
from .image_size import with_image_size
from .loading import check_held_out, find_splits, load_rows
from .pairs import ImageTextPairs, ImageTextStream
from .text import clean_caption, clean_question, split_prefix
from .transforms import RandomResizedCropAndFlip


__all__ = [
    "BadRow",
    "BadRowError",
    "ImageTextCollator",
    "ImageTextPairs",
    "ImageTextStream",
    "LanguageModelCollator",
    "RandomResizedCropAndFlip",
    "SetEpochCallback",
    "VisionTower",
    "cache_features",
    "check_feature_settings",
    "check_feature_size",
    "check_held_out",
    "check_pairs",
    "clean_caption",
    "clean_question",
    "find_id_column",
    "find_splits",
    "hold_out",
    "leave_out_bad_rows",
    "load_cached_features",
    "load_rows",
    "read_cached_features",
    "report_bad_rows",
    "split_prefix",
    "with_image_size",
    "with_picture_ids",
]
