"""Models that jobs compute with: with all their weights, all of which are numbers."""

import os
from typing import Any

import torch

from ..models.backbones import load_whole


def load_model(model_class: Any, name: str | os.PathLike, expected: str, **kwargs) -> Any:
    r"""
    Load a model with all its weights, all of which are numbers.

    Args:
        model_class (`type`):
            Class of the model.
        name (`str` or `os.PathLike`):
            Folder or id on the Hub.
        expected (`str`):
            The kind of checkpoint that the error asks for.
        kwargs:
            Those of `from_pretrained`, such as `dtype`.

    Returns:
        [`~transformers.PreTrainedModel`].

    Raises:
        ValueError: if weights are missing, NaN or infinite.
    """
    model = load_whole(model_class, name, expected, **kwargs)
    check_finite(model, name)
    return model


def check_finite(model: torch.nn.Module, name: str | os.PathLike):
    """
    Refuse a model out of which nothing can come.

    Args:
        model (`nn.Module`):
            The model. Weights that are quantised, or that accelerate has put on the disk, are not looked at.
        name (`str` or `os.PathLike`):
            Where it comes from, for the message.

    Raises:
        ValueError: if weights are NaN or infinite.
    """
    weights = [(key, x) for key, x in model.state_dict().items() if isinstance(x, torch.Tensor) and not x.is_meta]
    broken = [key for key, x in weights if x.is_floating_point() and x.itemsize > 1 and not x.isfinite().all()]
    if broken:
        dtypes = {str(x.dtype).removeprefix("torch.") for key, x in weights if key in broken}
        raise ValueError(
            f"{name} has weights that are NaN or infinite in {' and '.join(sorted(dtypes))}: {len(broken)} of "
            f"{len(weights)} ({broken[0]}{', ...' if len(broken) > 1 else ''}). Its training diverged, or its values "
            "are too large for that type: give an earlier checkpoint, or another dtype."
        )
