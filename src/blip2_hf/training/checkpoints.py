"""Which checkpoint a run that was stopped, at whatever moment, goes on from."""

import json
import os
import re
import zipfile
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging


logger = logging.get_logger(__name__)


def last_complete_checkpoint(output_dir: str | os.PathLike, world_size: int = 1) -> str | None:
    r"""
    The newest checkpoint of `Trainer` that is whole. A run that is killed while it saves leaves a part of one, from
    which `resume_from_checkpoint=True` would fail.

    Args:
        output_dir (`str` or `os.PathLike`):
            That of the run.
        world_size (`int`, *optional*, defaults to 1):
            Number of processes of the run that goes on. A checkpoint of another number is taken with a warning: the
            data are then shared out in another way.

    Returns:
        `str` or `None`: the folder, for `trainer.train(resume_from_checkpoint=...)`; `None` if there is none yet.

    Example:

    ```python
    >>> trainer.train(resume_from_checkpoint=last_complete_checkpoint(arguments.output_dir, arguments.world_size))
    ```"""
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    steps = {int(match[1]): folder for folder in folders if (match := pattern.fullmatch(folder.name))}
    # Each process leaves the state of its random numbers: as many as any checkpoint has
    processes = {step: len(list(folder.glob("rng_state*.pth"))) for step, folder in steps.items()}
    expected = max(processes.values(), default=0)
    for step in sorted(steps, reverse=True):
        if processes[step] in (world_size, expected) and _is_complete(steps[step], step):
            if processes[step] != world_size:
                logger.warning(f"{steps[step]} is of {processes[step]} processes, and goes on with {world_size}.")
            return str(steps[step])
        logger.warning(f"{steps[step]} is not whole, and is passed over.")
    return None


def _is_complete(folder: Path, step: int) -> bool:
    """Process 0 writes the state of the training last; the others that of their random numbers before it or after."""
    try:
        state = json.loads((folder / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    # The directory of a zip file, which torch writes, is at its end
    files = folder.glob("rng_state*.pth")
    return state["global_step"] == step and all(zipfile.is_zipfile(file) for file in files)


__all__ = ["last_complete_checkpoint"]
