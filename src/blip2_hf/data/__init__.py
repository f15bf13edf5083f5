"""Data for training: pictures with texts, batches of them, and the vision tower's features, computed once."""

from .callbacks import SetEpochCallback
from .collators import ImageTextCollator
from .feature_cache import VisionTower, cache_features, load_cached_features, read_cached_features
from .pairs import ImageTextPairs, ImageTextStream
from .text import clean_caption, clean_question
from .transforms import RandomResizedCropAndFlip


__all__ = [
    "ImageTextCollator",
    "ImageTextPairs",
    "ImageTextStream",
    "RandomResizedCropAndFlip",
    "SetEpochCallback",
    "VisionTower",
    "cache_features",
    "clean_caption",
    "clean_question",
    "load_cached_features",
    "read_cached_features",
]
