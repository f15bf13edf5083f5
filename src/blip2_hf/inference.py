"""What runs over many pictures share: how large a batch and a picture are, and which weights they were."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch


_FIRST_BATCH_SIZE = {"cpu": 16}  # for it has no error to tell that memory runs out
_FIRST_BATCH_SIZE_OF_ACCELERATORS = 128
_SAMPLED_VALUES = 32  # of each weight, at least: they tell a model from another


def first_batch_size(device: torch.device) -> int:
    """How many texts are written at a time, before memory runs out."""
    return _FIRST_BATCH_SIZE.get(device.type, _FIRST_BATCH_SIZE_OF_ACCELERATORS)


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


def own_image_size(image_processor: Any) -> dict[str, int]:
    """The size of what an image processor makes of a picture."""
    is_cropped = getattr(image_processor, "do_center_crop", None)
    size = image_processor.crop_size if is_cropped else image_processor.size
    return {name: value for name, value in dict(size).items() if value is not None}


def with_image_size(image_processor: Any, image_size: int | None) -> Any:
    """The same image processor for squares of a size, which hold the whole picture."""
    if image_size is None:
        return image_processor
    size = {"size": {"height": image_size, "width": image_size}, "do_center_crop": False}
    return type(image_processor).from_dict(image_processor.to_dict() | size)
