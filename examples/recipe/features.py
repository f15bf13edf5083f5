"""
Compute the frozen tower's output for all pictures of the recipe once, with several views of each training picture.

    python examples/recipe/features.py
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from datasets import concatenate_datasets
from settings import FOLDER, VIEWS
from styles import remove_styles
from training import save_json

# Not from transformers itself: in 5.17 that name needs torchvision
from transformers.models.auto.image_processing_auto import AutoImageProcessor


sys.path.insert(0, str(Path(__file__).parents[1]))
import two_towers  # noqa: E402
from picture_views import RandomView  # noqa: E402
from pictures import SPLITS, VALIDATION_STYLE, load_pictures  # noqa: E402
from precision import device_type, fast_dtype  # noqa: E402

from blip2_hf.data import VisionTower, cache_features, load_cached_features  # noqa: E402


LEARNED_FROM = ("train", "clip_art")


def image_processor():
    return AutoImageProcessor.from_pretrained(two_towers.pretrained_folder())


def load_features(splits: Sequence[str] = SPLITS) -> dict[str, datasets.Dataset]:
    """
    Load the features of some splits, and compute those that are missing. Splits without pictures are left out. After a
    change of pictures or towers, delete the old features.
    """
    pictures, features = load_pictures(), {}
    for split in splits:
        if len(pictures[split]) == 0:
            continue
        folder = FOLDER / "features" / split
        try:
            # Without the towers, because these may compute in another dtype here
            features[split] = load_cached_features(folder)
        except FileNotFoundError:
            make_features(pictures[split], folder, VIEWS if split in LEARNED_FROM else 1)
            features[split] = load_cached_features(folder)
    return remove_styles(features)


def make_features(pictures: datasets.Dataset, folder: Path, views: int):
    """Compute the features of some pictures. A stopped run continues."""
    tower = VisionTower(two_towers.pretrained_folder()).to(device_type(), fast_dtype())
    transform = RandomView(image_processor().size["height"])
    cache_features(pictures, tower, image_processor(), folder, views=views, transform=transform, rows_per_shard=250)


def choose_splits(validate: bool, clip_art: bool = False) -> tuple[datasets.Dataset, dict[str, datasets.Dataset]]:
    """Return the training rows, and the test sets."""
    features = load_features([split for split in SPLITS if clip_art or split != "clip_art"])
    if clip_art and "clip_art" not in features:
        sys.exit("There are no pictures of Open Clip Art; pictures.py says why.")
    train_rows = features["train"]
    tests = {"seen": features["test_seen"], "unseen": features["test_unseen"]}
    if validate:
        styles = train_rows["style"]
        tests = {"seen": train_rows.select([i for i, style in enumerate(styles) if style == VALIDATION_STYLE])}
        train_rows = train_rows.select([i for i, style in enumerate(styles) if style != VALIDATION_STYLE])
    return concatenate_datasets([train_rows, features["clip_art"]]) if clip_art else train_rows, tests


def main():
    torch.manual_seed(0)
    counts = {split: len(rows) for split, rows in load_features().items()}
    print(counts)
    # Written last: run.py takes it as the sign that all features are there
    save_json(FOLDER / "features.json", counts)


if __name__ == "__main__":
    main()
