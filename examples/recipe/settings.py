"""The settings of the recipe: sizes, steps, learning rates, ablations, and the folder of its results."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))
from real_assets import cache_folder  # noqa: E402


SEEDS = (0, 1, 2)
FOLDER = cache_folder() / "recipe"
TRAIN, TEST = 6000, 400  # scenes
CAPTION_PROMPT, QUESTION_PROMPT = "a picture of", "Question: {} Answer:"


@dataclass(frozen=True)
class Training:
    """
    Length and learning rates of a training.

    `new_parts_learning_rate` is that of parts without pretrained weights.
    """

    steps: int
    batch_size: int
    learning_rate: float
    new_parts_learning_rate: float


@dataclass(frozen=True)
class Stage1(Training):
    """
    The settings of a training of stage 1, which has two of them.

    The first one has no matching, which takes half of a step. The second one goes on from the model of `start`, whose
    queries it has. After a quarter of its steps half of a batch are twins. Without `hard_negatives`, all negatives of
    matching are equally likely.
    """

    start: str | None = None
    losses: tuple[str, ...] = ("itc", "itg")
    num_query_tokens: int = 16
    query_initialization: str = "words"
    hard_negatives: bool = True


@dataclass(frozen=True)
class Stage2(Training):
    """The settings of a stage 2, and the stage 1 that it follows. Without one, the Q-Former starts from BERT."""

    stage1: str | None = "full"
    steps: int = 250
    batch_size: int = 32
    learning_rate: float = 2e-4
    new_parts_learning_rate: float = 1e-3


@dataclass(frozen=True)
class Questions(Training):
    """The settings of a fine-tuning on questions, after stage 2, and whether the Q-Former reads the question."""

    instruct_qformer: bool = True
    steps: int = 250
    batch_size: int = 32
    learning_rate: float = 1e-4
    new_parts_learning_rate: float = 5e-4


COUNTS = ("1 query", "4 queries")  # instead of 16
FIRST = Stage1(steps=300, batch_size=64, learning_rate=3e-4, new_parts_learning_rate=5e-4)
START = {
    "start": FIRST,
    "start, normal queries": replace(FIRST, query_initialization="normal"),
    "start, no ITG": replace(FIRST, losses=("itc",)),
    **{f"start, {count}": replace(FIRST, num_query_tokens=int(count.split()[0])) for count in COUNTS},
}
FULL = Stage1(
    steps=800,
    batch_size=32,
    learning_rate=2e-4,
    new_parts_learning_rate=4e-4,
    start="start",
    losses=("itc", "itm", "itg"),
)
STAGE1 = {
    "full": FULL,
    "normal queries": replace(FULL, start="start, normal queries"),
    "no ITG": replace(FULL, start="start, no ITG", losses=("itc", "itm")),
    "no ITM": replace(FULL, losses=("itc", "itg")),
    "random negatives": replace(FULL, hard_negatives=False),
    **{count: replace(FULL, start=f"start, {count}") for count in COUNTS},
}
STAGE2 = {
    "full": Stage2(),
    "no stage 1": Stage2(stage1=None),
    **{name: Stage2(stage1=name) for name in ("normal queries", *COUNTS)},
}
QUESTIONS = {
    "question into the Q-Former": Questions(),
    "question to the language model alone": Questions(instruct_qformer=False),
}
