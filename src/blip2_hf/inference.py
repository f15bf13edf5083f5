"""What runs over many pictures share: how large a batch is, and which weights they were."""

import hashlib

import torch


_FIRST_BATCH_SIZE = {"cpu": 16}  # for it has no error to tell that memory runs out
_FIRST_BATCH_SIZE_OF_ACCELERATORS = 128
_SAMPLED_VALUES = 32  # of each weight, for a fingerprint


def first_batch_size(device: torch.device) -> int:
    """How many texts are written at a time, before memory runs out."""
    return _FIRST_BATCH_SIZE.get(device.type, _FIRST_BATCH_SIZE_OF_ACCELERATORS)


def model_fingerprint(model: torch.nn.Module) -> str:
    """A hash of some values of each weight."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in model.state_dict().items():
        # Weights that accelerate has put on the disk are not here
        if isinstance(weight, torch.Tensor) and not weight.is_meta:
            flat = weight.detach().flatten()
            sample = flat[:: max(1, flat.numel() // _SAMPLED_VALUES)].float().cpu()
            digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()
