"""State dicts out of files, which are read without running code that is in them."""

import os
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


StateDict = dict[str, torch.Tensor]


def read_state_dict(path_or_state_dict: str | os.PathLike | Mapping[str, Any]) -> StateDict:
    """A state dict, whatever it was given in."""
    content, given = path_or_state_dict, "The dict given"
    if not isinstance(content, Mapping):
        given = os.fspath(content)
        content = _load_safetensors(given) if given.endswith(".safetensors") else _load_pickle(given)
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f'{given} holds no weights: a state dict was expected, or a dict with one under "model".')
    others = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(
            f"{given} holds what is not a tensor: {enumerate_names(others)}. A state dict was expected, or a dict "
            'with one under "model".'
        )
    return dict(content)


def _load_safetensors(path: str) -> StateDict:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no file of safetensors, or a part of one: {error}. Download it again.") from error


def _load_pickle(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError) as error:
        raise ValueError(f"{path} is no file of torch.save, or a part of one: {error}. Download it again.") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no file of torch.save, or holds more than tensors and plain values, and reading that could "
            "run code of whoever wrote it. Give a file of tensors, or, if you trust it, the state dict that is in it."
        ) from error


def enumerate_names(names: list[str], limit: int = 20) -> str:
    """The first of the names, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
