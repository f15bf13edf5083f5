"""What a run is told from another by: results of other settings are refused, not mixed."""

import json
import re
from abc import ABC, abstractmethod
from typing import Any

import torch

from ..jobs.fingerprints import model_fingerprint


class WithSettings(ABC):
    """A captioner or a filter that can say what its results depend on."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Values that JSON has."""


def settings_of(function: Any) -> Any:
    """The settings of a captioner or a filter; of any other function its name, which says little, but not nothing."""
    if isinstance(function, WithSettings):
        return function.settings()
    # The address of a function differs from run to run
    return None if function is None else re.sub(r" at 0x[0-9a-f]+", "", repr(function))


def model_settings(model: torch.nn.Module, image_processor: Any) -> dict[str, Any]:
    """The weights, not the name: a model may move."""
    return {
        "weights": model_fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "image_processor": json.loads(image_processor.to_json_string()),
    }
