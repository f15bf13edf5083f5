"""State dicts from files, read without running code that is in them."""

import json
import os
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers.utils import cached_file


StateDict = dict[str, torch.Tensor]
# By their names in safetensors
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def read_state_dict(path_or_state_dict: str | os.PathLike | Mapping[str, Any]) -> tuple[StateDict, dict[str, str]]:
    """Return a state dict from a file or a dict, and what else is there, by name, with the reason that it is left."""
    content, given = path_or_state_dict, "The dict given"
    if not isinstance(content, Mapping):
        given = os.fspath(content)
        content = _load(given)
    left: dict[str, str] = {}
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        left = {str(name): 'beside "model", which alone is read' for name in content if name != "model"}
        content = content["model"]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f'{given} holds no weights: a state dict was expected, or a dict with one under "model".')
    others = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(
            f"{given} holds entries that are not a tensor: {enumerate_names(others)}. A state dict was expected, or a "
            'dict with one under "model".'
        )
    return dict(content), left


def _load(path: str) -> Any:
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{path} is no file of torch.save or safetensors, or is cut off: {error}. Download it again."
        ) from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no file of torch.save, or holds more than tensors and plain values. Reading it could run code "
            "of whoever wrote it. Give a file of tensors or, if you trust this one, the state dict that is in it."
        ) from error


def read_dtypes(name_or_path: str | os.PathLike, renamings: Mapping[str, str]) -> dict[str, torch.dtype]:
    """Return the dtype of each tensor in a checkpoint's safetensors, by its name in this library."""
    folder = Path(cached_file(name_or_path, "config.json")).parent
    files, index = [folder / "model.safetensors"], folder / "model.safetensors.index.json"
    if not files[0].is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
        files = sorted({folder / file for file in weight_map.values()})
    dtypes = {}
    for file in files:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118
                dtype = DTYPES.get(content.get_slice(name).get_dtype())
                if dtype is not None:
                    dtypes[rename(name, renamings)] = dtype
    return dtypes


def check_shapes(weights: StateDict, expected: StateDict, sources: Callable[[str], list[str]] = lambda name: [name]):
    """Refuse weights of other shapes than expected. `sources` returns their names in the file."""
    differing = [
        f"{' and '.join(sources(name)) or name} {tuple(tensor.shape)} for {tuple(expected[name].shape)}"
        for name, tensor in weights.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if differing:
        raise ValueError(
            f"{len(differing)} tensors of the file have other shapes than the model: {enumerate_names(differing)}. "
            "Give a config and parts of the file's sizes."
        )


def rename(name: str, renamings: Mapping[str, str]) -> str:
    """Change a name by the first pattern of `renamings` that is found in it."""
    for pattern, new_name in renamings.items():
        name, count = re.subn(pattern, new_name, name)
        if count:
            break
    return name


def match_name(name: str, renamings: Iterable[tuple[str, str]]) -> str | None:
    """Return the new name by the first pattern of `renamings` that is the whole of the name, or `None`."""
    for pattern, new_name in renamings:
        if match := re.fullmatch(pattern, name):
            return match.expand(new_name)
    return None


def enumerate_names(names: list[str], limit: int = 20) -> str:
    """Join the first of the names, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
