"""The settings of the recipe: sizes, steps, learning rates, ablations, and the folder of its results."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))
from real_assets import cache_folder  # noqa: E402


SEEDS = (0, 1, 2)
VIEWS = 4
FOLDER = cache_folder() / "recipe"


@dataclass(frozen=True)
class Training:
    """Length and learning rates of a stage."""

    steps: int
    batch_size: int
    learning_rate: float
    # That of parts without pretrained weights; in stage 1 with all losses, that of the two heads
    new_parts_learning_rate: float


@dataclass(frozen=True)
class Stage1(Training):
    """
    The settings of a stage 1. It learns from contrast alone first, then from all losses.

    Contrast keeps its large batches, because a pair costs it a third of what it costs the other losses.
    """

    # The losses beside contrast
    losses: tuple[str, ...] = ("itm", "itg")
    # Another variant whose model it continues from, instead of the model after contrast
    after: str | None = None
    # How many pairs of a batch these losses learn from
    part: int = 64
    num_query_tokens: int = 4
    random_initialisation: bool = False
    # The hardness of matching's negatives at the start and at the end: 0 is a random pair, 1 is that of the paper
    hardness: tuple[float, float] = (0.0, 1.0)
    contrast: Training = Training(steps=200, batch_size=256, learning_rate=5e-4, new_parts_learning_rate=5e-4)
    clip_art: bool = False
    steps: int = 110
    batch_size: int = 256
    learning_rate: float = 3.5e-4
    new_parts_learning_rate: float = 1.5e-3


FULL = Stage1()
LONGER = "ITC and ITG for longer"
STAGE1 = {
    "full": FULL,
    "no ITG": replace(FULL, losses=("itm",)),
    "no ITM": replace(FULL, losses=("itg",)),
    "ITC alone": replace(FULL, losses=()),
    "random initialisation": replace(FULL, random_initialisation=True),
    "random negatives": replace(FULL, hardness=(0.0, 0.0)),
    "1 query": replace(FULL, num_query_tokens=1),
    "hard negatives from the start": replace(FULL, hardness=(1.0, 1.0)),
    "with Open Clip Art": replace(FULL, clip_art=True),
    "16 queries": replace(FULL, num_query_tokens=16),
    LONGER: replace(FULL, after="full", losses=("itg",), part=256, steps=250),
    "ITC for longer": replace(FULL, after="full", losses=(), steps=250),
    "all losses for longer": replace(FULL, after="full", part=128, hardness=(1.0, 1.0), steps=250),
}


@dataclass(frozen=True)
class Stage2(Training):
    """The settings of a stage 2, and the stage 1 that it follows, if any."""

    stage1: str | None = LONGER
    num_query_tokens: int = 1
    steps: int = 300
    batch_size: int = 64
    learning_rate: float = 2e-4
    new_parts_learning_rate: float = 2e-3


STAGE2 = {
    "full": Stage2(),
    # The Q-Former starts with the learning rate of contrast
    "no stage 1": Stage2(stage1=None, learning_rate=FULL.contrast.learning_rate),
}
