"""Models that jobs compute with: with all their weights, all of which are numbers."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from ..models.backbones import load_whole


def load_model(model_class: Any, name: str | os.PathLike, expected: str, **kwargs) -> Any:
    """
    Load a model with all its weights, all of which are numbers. If weights are missing, NaN or infinite, a
    `ValueError` asks for `expected`, a kind of checkpoint. `kwargs` are those of `from_pretrained`, such as `dtype`.
    """
    model = load_whole(model_class, name, expected, **kwargs)
    check_finite(model, name)
    return model


def check_finite(model: torch.nn.Module, name: str | os.PathLike):
    """
    Refuse a model whose weights are NaN or infinite. Weights that are quantised, or that accelerate has put on the
    disk, are not looked at. `name` is where the model comes from, for the message.
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


@contextlib.contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Run a model without dropout; it is left as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Let what is sampled begin at a seed; PyTorch's generators are left as they were. `None` changes nothing."""
    if seed is None:
        yield
        return
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
