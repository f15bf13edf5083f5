"""Folders of checkpoints: read in any of the formats, and written whole or not at all."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from transformers.configuration_utils import PreTrainedConfig

from ..jobs.atomic_files import rename, temporary_folder
from ..jobs.inference import adapter_base, check_finite, merge_adapters
from ..models.backbones import load_with_info
from ..models.configuration_blip2 import TRANSFORMERS_CONFIGS, Blip2Config, TransformersBlip2Config
from ..models.modeling_base import NAMES_IN_TRANSFORMERS, Blip2Model, Blip2PreTrainedModel
from ..models.modeling_blip2 import Blip2ForConditionalGeneration
from ..models.modeling_pretraining import Blip2ForPreTraining
from ..models.modeling_retrieval import Blip2ForImageTextRetrieval
from .instructblip import load_instructblip_checkpoint
from .reading import enumerate_names, read_dtypes


# By the architecture that config.json names; some of these names are transformers' too
CLASSES: dict[str, type[Blip2PreTrainedModel]] = {
    "Blip2ForConditionalGeneration": Blip2ForConditionalGeneration,
    "Blip2ForPreTraining": Blip2ForPreTraining,
    "Blip2ForImageTextRetrieval": Blip2ForImageTextRetrieval,
    "Blip2HfModel": Blip2Model,
}


def load_checkpoint(name_or_path: str | os.PathLike) -> tuple[Blip2PreTrainedModel, list[str]]:
    r"""
    Load a checkpoint of this library, or of transformers' BLIP-2 or InstructBLIP, in its own class and precision.
    Adapters of PEFT are merged into their base model.

    Args:
        name_or_path (`str` or `os.PathLike`):
            A folder or an id on the Hub.

    Returns:
        `tuple`: the model, and the names of the tensors that it has no place for.

    Raises:
        ValueError: if it is something else, or weights are missing, NaN or infinite.
    """
    if (base := adapter_base(name_or_path)) is not None:
        model, left = load_checkpoint(base)
        return merge_adapters(model, name_or_path), left
    load = _loader(name_or_path)
    # transformers loads most tensors in one dtype, and each is to have that of its file
    model, left = load()
    dtypes = read_dtypes(name_or_path, NAMES_IN_TRANSFORMERS)
    if any(tensor.dtype not in (dtype, torch.float32) for tensor, dtype in _with_dtypes(model, dtypes)):
        model, left = load(dtype=torch.float32)
    for tensor, dtype in _with_dtypes(model, dtypes):
        tensor.data = tensor.data.to(dtype)
    check_finite(model, name_or_path)
    return model, left


def _loader(name_or_path: str | os.PathLike) -> Callable[..., tuple[Blip2PreTrainedModel, list[str]]]:
    """Return a function that loads the model, and returns what [`load_checkpoint`] does."""
    # Empty if there is no config.json
    content, _ = PreTrainedConfig.get_config_dict(name_or_path)
    model_type, architecture = content.get("model_type"), (content.get("architectures") or ["no class"])[0]
    if model_type not in (Blip2Config.model_type, *TRANSFORMERS_CONFIGS):
        raise ValueError(f"{name_or_path} is of type {model_type!r}: a BLIP-2 or an InstructBLIP was expected.")
    if model_type not in (Blip2Config.model_type, TransformersBlip2Config.model_type):
        return lambda **kwargs: (load_instructblip_checkpoint(name_or_path, **kwargs), [])
    # Blip2Model itself is not among the names: transformers' has a language model, and ours has none
    model_class = CLASSES.get(architecture) or CLASSES.get(architecture.replace("Blip2Hf", "Blip2"))
    if model_class is None:
        raise ValueError(f"{name_or_path} holds {architecture}: one of {', '.join(CLASSES)} was expected.")
    return partial(_load_blip2, name_or_path, model_class)


def _load_blip2(
    name_or_path: str | os.PathLike, model_class: type[Blip2PreTrainedModel], **kwargs
) -> tuple[Blip2PreTrainedModel, list[str]]:
    model, info = load_with_info(model_class, name_or_path, **kwargs)
    # transformers' checkpoints have no temperature
    if missing := [name for name in info["missing_keys"] if name != "temperature.weight"]:
        raise ValueError(f"{name_or_path} lacks {len(missing)} weights: {enumerate_names(missing)}.")
    return model, info["unexpected_keys"]


def _with_dtypes(
    model: Blip2PreTrainedModel, dtypes: dict[str, torch.dtype]
) -> Iterator[tuple[torch.Tensor, torch.dtype]]:
    for name, tensor in chain(model.named_parameters(remove_duplicate=False), model.named_buffers()):
        if name in dtypes:
            yield tensor, dtypes[name]


def check_output(output: str | os.PathLike, overwrite: bool, sources: Iterable[str | os.PathLike] = ()):
    """Refuse to replace a folder, unless `overwrite` is set, it holds a model, and none of the sources lies in it."""
    path = Path(output)
    if not path.exists():
        return
    if not overwrite:
        raise ValueError(f"{output} is there already: give another --output, or --overwrite to replace it.")
    for source in map(Path, sources):
        if source.exists() and path.resolve() in (source.resolve(), *source.resolve().parents):
            raise ValueError(f"{source} would be replaced by what is made of it: give another --output.")
    if not path.is_dir() or (any(path.iterdir()) and not (path / "config.json").is_file()):
        raise ValueError(f"{output} is not the folder of a model, and is not replaced: give another --output.")


@contextmanager
def whole_folder(output: str | os.PathLike) -> Iterator[Path]:
    """Yield a new folder beside `output`, which takes its place once all is written. If that fails, it is removed."""
    target = Path(output).resolve()
    # Whoever is killed between the two renamings finds here what was there before
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(target.parent) as part:
        yield part
        try:
            if target.exists():
                rename(target, old)
            rename(part, target)
        finally:
            if old.exists() and not target.exists():
                rename(old, target)
            shutil.rmtree(old, ignore_errors=True)
