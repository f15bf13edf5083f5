"""Models that jobs compute with: with all their weights, all of which are numbers, and with adapters of PEFT."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import PROCESSOR_NAME, cached_file, find_adapter_config_file

from ..models.backbones import load_whole
from ..models.configuration_blip2 import is_hub_id
from .state_files import read_json


def load_model(model_class: Any, name: str | os.PathLike, expected: str, **kwargs) -> Any:
    """
    Load a model with all its weights, all of which are numbers. If weights are missing, NaN or infinite, a
    `ValueError` asks for `expected`, a kind of checkpoint. `kwargs` are those of `from_pretrained`, such as `dtype`.
    If `name` holds adapters of PEFT, they are put into their base model.
    """
    base = weights_place(name)
    model = load_whole(model_class, base, expected, **kwargs)
    if base != str(name):
        model = _with_adapters(model, name)
    check_finite(model, name)
    return model


def quantization(bits: int, dtype: torch.dtype, kept: list[str] | None = None) -> Any:
    """
    Return the configuration with which bitsandbytes quantises linear layers to 4 or 8 bits.

    Args:
        bits (`int`):
            4 or 8.
        dtype (`torch.dtype`):
            Dtype in which layers of 4 bits compute.
        kept (`list[str]`, *optional*):
            Names of the modules that stay as they are. Without it, those that transformers keeps: heads, and what the
            model names.
    """
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=kept
    )


def merge_adapters(model: torch.nn.Module, name: str | os.PathLike) -> Any:
    """Return the base model of the adapters in `name` with their weights added to its own."""
    from peft import PeftModel

    merged = PeftModel.from_pretrained(model, name).merge_and_unload()
    check_finite(merged, name)
    return merged


def weights_place(name: str | os.PathLike) -> str:
    """
    Return the folder or id with the configuration and the weights of a model: `name` itself or, if `name` holds
    adapters of PEFT, their base model. A base that is not there is a `ValueError`.
    """
    base = adapter_base(name)
    return str(name) if base is None else base


def adapter_base(name: str | os.PathLike) -> str | None:
    """Return the base model of the adapters of PEFT in a folder or repository, `None` if there are no adapters."""
    try:
        path = find_adapter_config_file(str(name))
    except OSError:
        return None
    if path is None:
        return None
    base = read_json(Path(path), "It names the base model of the adapters.").get("base_model_name_or_path")
    mend = "Give the base model as base_model_name_or_path in adapter_config.json."
    if not base:
        raise ValueError(f"{name} holds adapters, and does not say of which model. {mend}")
    for folder in (Path(base), Path(path).parent / base):
        if folder.is_dir():
            return str(folder)
    if not is_hub_id(base):
        raise ValueError(f"{name} holds adapters of {base}, which is not there. Bring it back. {mend}")
    return base


def processor_place(name: str | os.PathLike) -> str:
    """Return the folder or id with the processor of a model: `name` itself, or the base of adapters without one."""
    base = adapter_base(name)
    if base is None or cached_file(str(name), PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False):
        return str(name)
    return base


def _with_adapters(model: torch.nn.Module, name: str | os.PathLike) -> Any:
    """Put adapters into a model, unless all of them are of parts that it does not have."""
    from peft import PeftConfig, PeftModel
    from peft.tuners.tuners_utils import check_target_module_exists

    config = PeftConfig.from_pretrained(name)
    if not any(check_target_module_exists(config, part) for part, _ in model.named_modules()):
        return model
    return PeftModel.from_pretrained(model, name).get_base_model()


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
