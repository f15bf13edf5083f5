"""What the recipe is made of: sizes, steps and rates, its ablations, and where things lie."""

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
    """How long, and how fast, a stage learns."""

    steps: int
    batch_size: int
    learning_rate: float
    # Of parts without pretrained weights; in stage 1 with all losses, of the two heads
    new_parts_learning_rate: float


@dataclass(frozen=True)
class Stage1(Training):
    """
    A stage 1: which losses there are beside contrast, how many queries, and how long it learns; first from contrast
    alone, then from all losses; contrast still in large batches: a pair costs it a third of what it costs the others.
    """

    losses: tuple[str, ...] = ("itm", "itg")
    # Another variant whose model it goes on from, in place of contrast alone
    after: str | None = None
    # How many pairs of a batch the losses beside contrast learn from
    part: int = 64
    num_query_tokens: int = 4
    random_initialisation: bool = False
    # How hard the negatives of matching are at first and at last: 0 is any other pair, 1 what the paper takes
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
    """A stage 2: after which stage 1, if any, and how long it learns."""

    stage1: str | None = LONGER
    num_query_tokens: int = 1
    steps: int = 300
    batch_size: int = 64
    learning_rate: float = 2e-4
    new_parts_learning_rate: float = 2e-3


STAGE2 = {
    "full": Stage2(),
    # The Q-Former has the rate that contrast starts with
    "no stage 1": Stage2(stage1=None, learning_rate=FULL.contrast.learning_rate),
}
