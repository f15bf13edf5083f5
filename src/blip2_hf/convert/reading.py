"""State dicts out of files, which are read without running code that is in them."""

import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers.utils import cached_file


StateDict = dict[str, torch.Tensor]
# As safetensors names them
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def read_state_dict(path_or_state_dict: str | os.PathLike | Mapping[str, Any]) -> tuple[StateDict, dict[str, str]]:
    """A state dict, whatever it was given in, and what stands beside it there, with why it is left."""
    content, given = path_or_state_dict, "The dict given"
    if not isinstance(content, Mapping):
        given = os.fspath(content)
        content = _load_safetensors(given) if given.endswith(".safetensors") else _load_pickle(given)
    left: dict[str, str] = {}
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        left = {str(name): 'beside "model", which alone is read' for name in content if name != "model"}
        content = content["model"]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f'{given} holds no weights: a state dict was expected, or a dict with one under "model".')
    others = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(
            f"{given} holds what is not a tensor: {enumerate_names(others)}. A state dict was expected, or a dict "
            'with one under "model".'
        )
    return dict(content), left


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


def read_dtypes(name_or_path: str | os.PathLike, renamings: Mapping[str, str]) -> dict[str, torch.dtype]:
    """The precision of each tensor in the safetensors of a checkpoint of transformers, under its name here."""
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


def rename(name: str, renamings: Mapping[str, str]) -> str:
    """A name by the first pattern of `renamings` that is found in it."""
    for pattern, new_name in renamings.items():
        name, count = re.subn(pattern, new_name, name)
        if count:
            break
    return name


def enumerate_names(names: list[str], limit: int = 20) -> str:
    """The first of the names, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
