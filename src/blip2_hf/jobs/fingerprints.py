"""What results depend on: short hashes of models and data, and the one comparison of settings."""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import MadeOtherwiseError, shorten
from .state_files import as_json, read_json


_HASH = re.compile("[0-9a-f]{32}")
_MOST_DIFFERENCES = 8  # that a message tells; options come first
_SAMPLED_ROWS = 32
_SAMPLED_VALUES = 32  # of each weight, at least


def fingerprint(parts: Iterable[bytes]) -> str:
    """Return a hash of all parts together, the same in every process and on every machine."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def sampled_rows(num_rows: int) -> list[int]:
    """Return the numbers of 32 rows, or of all if there are fewer, by which data is told from other data."""
    return sorted({num_rows * sample // _SAMPLED_ROWS for sample in range(_SAMPLED_ROWS)}) if num_rows else []


def stable_repr(value: Any) -> str:
    """Return the `repr` of a value without addresses in memory, which differ from run to run."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def model_settings(model: torch.nn.Module, image_processor: Any) -> dict[str, Any]:
    """Return what tells a model from others: the weights, not the name, because a model may move."""
    return {
        "weights": model_fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "image_processor": json.loads(image_processor.to_json_string()),
    }


def model_fingerprint(model: torch.nn.Module) -> str:
    """Return a hash of some values of each weight."""
    return fingerprint(name.encode() + sample.numpy().tobytes() for name, sample in sampled_weights(model))


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


def check_settings_file(
    path: Path, given: Mapping[str, Any], place: str | os.PathLike, advice: str, free: Collection[str] = ()
):
    """
    Refuse results that other settings made, by the file beside them that says which did. `place` is what the message
    calls the results, `advice` a sentence that says what to do. Settings in `free`, such as the name of a model whose
    weights are compared, may differ.
    """
    if not path.exists():
        raise MadeOtherwiseError(
            f"{place} is there already, without {path.name}, which would tell what made it. {advice}"
        )
    check_settings(
        read_json(path, f"It says what made {place}: restore it, or delete both. {advice}"), given, place, advice, free
    )


def check_settings(
    found: Mapping[str, Any],
    given: Mapping[str, Any],
    place: str | os.PathLike,
    advice: str,
    free: Collection[str] = (),
):
    """Refuse results that other settings made. Arguments are those of [`check_settings_file`], with `found` read."""
    given = as_json(given)
    names = sorted(name for name in {*found, *given} if found.get(name) != given.get(name))
    if set(names) - set(free):
        told = [text for name in names for text in _differences(name, found.get(name), given.get(name))]
        details = "; ".join(sorted(told, key=lambda text: not text.startswith("--"))[:_MOST_DIFFERENCES])
        more = f"; and {len(told) - _MOST_DIFFERENCES} more" if len(told) > _MOST_DIFFERENCES else ""
        raise MadeOtherwiseError(f"{place} was made otherwise ({details}{more}). {advice}")


def _differences(name: str, found: Any, given: Any) -> list[str]:
    """Return what differs of a setting. Of a dictionary only the entries that differ are told."""
    if isinstance(found, Mapping) and isinstance(given, Mapping):
        pairs = {key: (found.get(key), given.get(key)) for key in sorted({*found, *given})}
        return [f"{name}: {text}" for key, (a, b) in pairs.items() if a != b for text in _differences(key, a, b)]
    if all(isinstance(value, str) and _HASH.fullmatch(value) for value in (found, given)):
        return [f"{name}: some there, others now"]
    return [f"{name}: {shorten(found)} there, {shorten(given)} now"]
