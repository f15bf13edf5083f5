"""How many items a model takes at a time: as many as its memory allows."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers.utils import logging


logger = logging.get_logger(__name__)


def first_batch_size(given: int | None, device: torch.device) -> int:
    """Return the number that is given, or else how many items are computed at a time before memory runs out."""
    if given is not None and given < 1:
        raise ValueError(f"batch_size={given}: at least 1 was expected.")
    # A CPU has no error that tells that memory runs out
    return given or (16 if device.type == "cpu" else 128)


class BatchSize:
    """A number of items that is halved whenever memory runs out, and stays so. Without `size`, all items at a time."""

    def __init__(self, size: int = sys.maxsize):
        if size < 1:
            raise ValueError(f"batch_size={size}: at least 1 was expected.")
        self.size = size

    def run(self, function: Callable[[Any], Any], items: Any) -> Iterator[tuple[Any, Any]]:
        """
        Call a function with some of the items, which are sliced, as many at a time as memory takes. Yield these items
        and what the function returned for them. The error stays if memory does not even take one item.
        """
        done = 0
        while done < len(items):
            part = items[done : done + self.size]
            try:
                result = function(part)
            except RuntimeError as error:
                if len(part) == 1 or not should_reduce_batch_size(error):
                    raise
            else:
                done += len(part)
                yield part, result
                continue
            # Only here, where the error is gone, does nothing hold the tensors of the batch
            self._halve(len(part))

    def fit(self, function: Callable[[int], Any]) -> Any:
        """
        Return what a function returns that is called with the number, until memory takes it. The error stays if memory
        does not even take one item.
        """
        while True:
            try:
                return function(self.size)
            except RuntimeError as error:
                if self.size == 1 or not should_reduce_batch_size(error):
                    raise
            self._halve(self.size)

    def _halve(self, failed: int):
        clear_device_cache(garbage_collection=True)
        self.size = failed // 2
        logger.warning(f"Too little memory for {failed} at a time: going on with {self.size}.")
