"""Folders of checkpoints: read in any of the formats, and written whole or not at all."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import find_adapter_config_file

from ..jobs.inference import check_finite
from ..models.configuration_blip2 import TRANSFORMERS_MODEL_TYPE, Blip2Config
from ..models.modeling_base import Blip2Model, Blip2PreTrainedModel
from ..models.modeling_blip2 import Blip2ForConditionalGeneration
from ..models.modeling_pretraining import Blip2ForPreTraining
from ..models.modeling_retrieval import Blip2ForImageTextRetrieval
from .instructblip import RENAMINGS, InstructBlipConfig, load_instructblip_checkpoint
from .reading import enumerate_names, read_dtypes


# By the architecture that config.json names; some of these names are transformers' too
CLASSES: dict[str, type[Blip2PreTrainedModel]] = {
    "Blip2ForConditionalGeneration": Blip2ForConditionalGeneration,
    "Blip2ForPreTraining": Blip2ForPreTraining,
    "Blip2ForImageTextRetrieval": Blip2ForImageTextRetrieval,
    "Blip2HfModel": Blip2Model,
}
# What transformers' checkpoints lack
NEW_IN_OURS = {"temperature.weight"}
# In transformers' checkpoints the queries are a bare parameter
QUERY_TOKENS = {r"^query_tokens$": "query_tokens.weight"}


def load_checkpoint(name_or_path: str | os.PathLike) -> tuple[Blip2PreTrainedModel, list[str]]:
    r"""
    Load a checkpoint of this library, or of transformers' BLIP-2 or InstructBLIP, in its own class and precision.

    Args:
        name_or_path (`str` or `os.PathLike`):
            A folder or an id on the Hub.

    Returns:
        `tuple`: the model, and the names of the tensors that it has no place for.

    Raises:
        ValueError: if it is something else, such as an adapter of PEFT, or weights are missing, NaN or infinite.
    """
    model, left = _load_checkpoint(name_or_path)
    check_finite(model, name_or_path)
    return model, left


def _load_checkpoint(name_or_path: str | os.PathLike) -> tuple[Blip2PreTrainedModel, list[str]]:
    content = _read_config(name_or_path)
    model_type, architecture = content.get("model_type"), (content.get("architectures") or ["no class"])[0]
    if model_type == InstructBlipConfig.model_type:
        return _in_precision_of_files(partial(_load_instructblip, name_or_path), name_or_path)
    if model_type not in (Blip2Config.model_type, TRANSFORMERS_MODEL_TYPE):
        raise ValueError(f"{name_or_path} is of type {model_type!r}: a BLIP-2 or an InstructBLIP was expected.")
    # Blip2Model itself is not among the names: transformers' has a language model, and ours has none
    model_class = CLASSES.get(architecture) or CLASSES.get(architecture.replace("Blip2Hf", "Blip2"))
    if model_class is None:
        raise ValueError(f"{name_or_path} holds {architecture}: one of {', '.join(CLASSES)} was expected.")
    return _in_precision_of_files(partial(_load_blip2, name_or_path, model_class), name_or_path)


def _load_instructblip(name_or_path: str | os.PathLike, **kwargs) -> tuple[Blip2PreTrainedModel, list[str]]:
    return load_instructblip_checkpoint(name_or_path, **kwargs), []


def _load_blip2(
    name_or_path: str | os.PathLike, model_class: type[Blip2PreTrainedModel], **kwargs
) -> tuple[Blip2PreTrainedModel, list[str]]:
    loaded: Any = model_class.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    model, info = loaded
    if missing := sorted({str(name) for name in info["missing_keys"]} - NEW_IN_OURS):
        raise ValueError(f"{name_or_path} lacks {len(missing)} weights: {enumerate_names(missing)}.")
    return model, sorted(str(name) for name in info["unexpected_keys"])


def _read_config(name_or_path: str | os.PathLike) -> dict[str, Any]:
    # Empty if there is no config.json
    content, _ = PreTrainedConfig.get_config_dict(name_or_path)
    if not content.get("model_type") and find_adapter_config_file(str(name_or_path)) is not None:
        raise ValueError(
            f"{name_or_path} holds an adapter of PEFT without the model that it adapts. Load it with "
            "PeftModel.from_pretrained, save what its merge_and_unload() returns, and give that folder."
        )
    return content


def _in_precision_of_files(
    load: Callable[..., tuple[Blip2PreTrainedModel, list[str]]], name_or_path: str | os.PathLike
) -> tuple[Blip2PreTrainedModel, list[str]]:
    """Return what `load` returns, with each tensor in the dtype of its file."""
    # transformers loads most tensors in one dtype
    model, left = load()
    dtypes = read_dtypes(name_or_path, RENAMINGS | QUERY_TOKENS)
    if any(tensor.dtype not in (dtype, torch.float32) for tensor, dtype in _with_dtypes(model, dtypes)):
        model, left = load(dtype=torch.float32)
    for tensor, dtype in _with_dtypes(model, dtypes):
        tensor.data = tensor.data.to(dtype)
    return model, left


def _with_dtypes(
    model: Blip2PreTrainedModel, dtypes: dict[str, torch.dtype]
) -> Iterator[tuple[torch.Tensor, torch.dtype]]:
    for name, tensor in chain(model.named_parameters(remove_duplicate=False), model.named_buffers()):
        if name in dtypes:
            yield tensor, dtypes[name]


def check_output(output: str | os.PathLike, overwrite: bool, sources: Iterable[str | os.PathLike | None] = ()):
    r"""
    Check that a folder may be written.

    Args:
        output (`str` or `os.PathLike`):
            The folder that is to be written.
        overwrite (`bool`):
            Whether the folder of a model may be replaced.
        sources (`Iterable`, *optional*):
            Files and folders that are read, and so must not be replaced. Ids on the Hub and `None` are ignored.

    Raises:
        ValueError: if the folder exists and must not be replaced.
    """
    path = Path(output)
    if not path.exists():
        return
    if not overwrite:
        raise ValueError(f"{output} is there already: give another --output, or --overwrite to replace it.")
    for source in (Path(source) for source in sources if source is not None):
        if source.exists() and path.resolve() in (source.resolve(), *source.resolve().parents):
            raise ValueError(f"{source} would be replaced by what is made of it: give another --output.")
    if not path.is_dir() or (any(path.iterdir()) and not (path / "config.json").is_file()):
        raise ValueError(f"{output} is not the folder of a model, and is not replaced: give another --output.")


@contextmanager
def whole_folder(output: str | os.PathLike) -> Iterator[Path]:
    r"""
    Make a new folder beside `output` that replaces it once all is written. If writing fails, it is removed.

    Args:
        output (`str` or `os.PathLike`):
            The folder that is to be written. An older one is replaced.

    Returns:
        A context manager that gives the `Path` of the new folder.
    """
    target = Path(output).resolve()
    part, old = (target.with_name(f".{target.name}.{kind}-{os.getpid()}") for kind in ("part", "old"))
    part.mkdir(parents=True)
    try:
        yield part
        if target.exists():
            os.replace(target, old)
        os.replace(part, target)
    finally:
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
