"""Loading, batch sizes and fingerprints of models, for the jobs on many pictures."""

import hashlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from ..models.backbones import load_whole


_FIRST_BATCH_SIZE = {"cpu": 16}  # for it has no error to tell that memory runs out
_FIRST_BATCH_SIZE_OF_ACCELERATORS = 128
_SAMPLED_VALUES = 32  # of each weight, at least: they tell a model from another


def first_batch_size(device: torch.device) -> int:
    """How many texts are written at a time, before memory runs out."""
    return _FIRST_BATCH_SIZE.get(device.type, _FIRST_BATCH_SIZE_OF_ACCELERATORS)


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


def model_fingerprint(model: torch.nn.Module) -> str:
    """A hash of some values of each weight."""
    digest = hashlib.blake2b(digest_size=16)
    for name, sample in sampled_weights(model):
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def sampled_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name of each weight and some of its values, in float32 on the CPU, wherever accelerate keeps it."""
    for name, weight in model.state_dict().items():
        if not isinstance(weight, torch.Tensor):
            continue
        if not weight.is_meta:
            yield name, _sample(weight)
            continue
        from accelerate.utils import align_module_device

        path, _, own_name = name.rpartition(".")
        module = model.get_submodule(path)
        with align_module_device(module):
            yield name, _sample(getattr(module, own_name))


def _sample(weight: torch.Tensor) -> torch.Tensor:
    flat = weight.detach().flatten()
    return flat[:: max(1, flat.numel() // _SAMPLED_VALUES)].float().cpu()
