"""
Make the scenes of the recipe, and compute the frozen tower's output for each once.

    python examples/recipe/features.py
"""

import sys
from pathlib import Path

import datasets
import torch
from settings import FOLDER, TEST, TRAIN

# Not from transformers itself: in 5.17 that name needs torchvision
from transformers.models.auto.image_processing_auto import AutoImageProcessor


sys.path.insert(0, str(Path(__file__).parents[1]))
import efficientnet_lite  # noqa: E402
from precision import device_type, fast_dtype  # noqa: E402
from scenes import STYLES, TEST_STYLE, VALIDATION_STYLE, make_scenes  # noqa: E402
from training import save_json  # noqa: E402

from blip2_hf.data import VisionTower, cache_features, load_cached_features  # noqa: E402


SEEN = tuple(style for style in STYLES if style != VALIDATION_STYLE)
# Styles, number of scenes, compositions, and whether drawings are restyled. With --validate a run learns from
# "validate train" and is tested on the two sets after it, because the test style must not choose settings
SETS = {
    "train": (STYLES, TRAIN, "seen", True),
    "seen styles": (STYLES, TEST, "seen", False),
    "new compositions": (STYLES, TEST, "held out", False),
    "new style": ((TEST_STYLE,), TEST, "seen", False),
    "validate train": (SEEN, TRAIN, "seen", True),
    "validate seen styles": (SEEN, TEST, "seen", False),
    "validate new style": ((VALIDATION_STYLE,), TEST, "seen", False),
}


def image_processor():
    return AutoImageProcessor.from_pretrained(efficientnet_lite.pretrained_folder())


def load_scenes(name: str) -> datasets.Dataset:
    """Load a set of scenes with their features, and make it first if it does not exist."""
    folder = FOLDER / "features" / name
    try:
        # Without the tower, because it may compute in another dtype here
        return load_cached_features(folder)
    except FileNotFoundError:
        styles, count, compositions, restyle = SETS[name]
        scenes = make_scenes(styles, count, name, compositions, restyle)
        # Convolutions on a CPU are faster with the channels last
        tower = VisionTower(efficientnet_lite.pretrained_folder()).to(fast_dtype(), memory_format=torch.channels_last)
        return load_cached_features(cache_features(scenes, tower.to(device_type()), image_processor(), folder))


def choose_scenes(validate: bool) -> tuple[datasets.Dataset, dict[str, datasets.Dataset]]:
    """Return the training scenes, and the test sets."""
    prefix = "validate " if validate else ""
    names = ["seen styles", "new style"] if validate else ["seen styles", "new compositions", "new style"]
    return load_scenes(f"{prefix}train"), {name: load_scenes(f"{prefix}{name}") for name in names}


def main():
    counts = {name: len(load_scenes(name)) for name in SETS}
    print(counts)
    # Written last: run.py takes it as the sign that all features are there
    save_json(FOLDER / "features.json", counts)


if __name__ == "__main__":
    main()
