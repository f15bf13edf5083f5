"""Models for retrieval: loaded, and told from each other."""

import base64
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..jobs.fingerprints import check_settings, fingerprint, sampled_weights
from ..jobs.inference import load_model
from ..jobs.model_checks import MATCHING, check_checkpoint, load_processor
from ..models.modeling_image_text import Blip2ImageTextPreTrainedModel
from ..models.modeling_retrieval import Blip2ForImageTextRetrieval


_WEIGHT_SAMPLES = 32  # values of each weight that tell a model from another
# Without a part in a ranking: a checkpoint of retrieval lacks the head that writes, transformers' own the temperature
_NOT_COMPARED = re.compile(r"temperature\.weight$|lm_head\.")
_PROCESSOR_SETTINGS = re.compile(r"do_\w+|size|crop_size|image_mean|image_std|resample|rescale_factor")


def load_retrieval_model(
    name: str | os.PathLike, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> tuple[Blip2ForImageTextRetrieval, Any]:
    r"""
    Load a model for retrieval, and its processor.

    Args:
        name (`str` or `os.PathLike`):
            Folder or id on the Hub of a [`Blip2ForImageTextRetrieval`], a [`Blip2ForPreTraining`] or transformers'
            own `Blip2ForImageTextRetrieval`, with its processor, or of adapters (PEFT) of one.
        device (`str` or `torch.device`, *optional*):
            What it computes on. Without it, an accelerator if there is one.
        dtype (`str` or `torch.dtype`, *optional*):
            What it computes in. Without it, that of the checkpoint.

    Returns:
        `tuple[Blip2ForImageTextRetrieval, Blip2Processor]`.

    Raises:
        ValueError: if it has not learned to compare images with texts, or weights are NaN or infinite.
    """
    check_checkpoint(name, MATCHING)
    processor = load_processor(name)
    expected = "A model for retrieval, of Blip2ForImageTextRetrieval or Blip2ForPreTraining,"
    model = load_model(Blip2ForImageTextRetrieval, name, expected, dtype=dtype or "auto")
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    # Parts that from_pretrained keeps in float32 too
    model.to(device=device, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return model.eval(), processor


def model_and_processor(
    model: str | os.PathLike | Blip2ImageTextPreTrainedModel | None,
    processor: Any,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
) -> tuple[Blip2ImageTextPreTrainedModel, Any]:
    """Return a model, which is loaded if its place is given, and its processor."""
    if isinstance(model, Blip2ImageTextPreTrainedModel):
        if processor is None:
            raise ValueError("Give the processor of the model.")
        return model, processor
    if not model:
        raise ValueError("Give the model: the index does not say where it is.")
    model, loaded = load_retrieval_model(model, device, dtype)
    return model, loaded if processor is None else processor


def describe_model(model: Blip2ImageTextPreTrainedModel, image_processor: Any) -> dict[str, Any]:
    """Return what tells a model from another: settings, and some values of each weight."""
    compared = {name: sample for name, sample in sampled_weights(model) if not _NOT_COMPARED.match(name)}
    samples = [compared[name][:_WEIGHT_SAMPLES] for name in sorted(compared)]
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    settings = json.loads(image_processor.to_json_string())
    return {
        "num_query_tokens": model.config.num_query_tokens,
        "image_text_hidden_size": model.config.image_text_hidden_size,
        "vision_feature_layer": model.config.vision_feature_layer,
        # None, as in indexes of older versions, which lack the entry
        "vision_position_embedding": model.config.vision_position_embedding or None,
        "tower": model.config.vision_config.model_type,
        "image_processor": {
            name: value
            for name, value in settings.items()
            if _PROCESSOR_SETTINGS.fullmatch(name) and value is not None
        },
        "precision": max(torch.finfo(dtype).eps for dtype in dtypes),
        "weights": base64.b64encode(torch.cat(samples).numpy().astype("<f4").tobytes()).decode(),
    }


def check_same_model(directory: Path, there: dict[str, Any], now: dict[str, Any]):
    """Refuse a model, as described now, whose features can't be compared with those that are there."""
    weights = [np.frombuffer(base64.b64decode(side["weights"]), "<f4") for side in (there, now)]
    # The same weights in another precision are the same model
    precision = max(there["precision"], now["precision"])
    is_same = len(weights[0]) == len(weights[1]) and np.allclose(*weights, rtol=precision, atol=1e-7)
    names = [name for name in now if name != "precision" and not (name == "weights" and is_same)]
    found, given = ({name: side.get(name) for name in names} for side in (there, now))
    if not is_same:
        found["weights"], given["weights"] = (fingerprint([array.tobytes()]) for array in weights)
    name = there["model"] or "that of no name"
    advice = f"Give the model that it was built with, {name}, or build the index anew (rebuild=True, --rebuild)."
    check_settings(found, given, directory, advice)


__all__ = ["load_retrieval_model"]
