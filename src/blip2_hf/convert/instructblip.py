"""transformers' checkpoints of InstructBLIP (arXiv 2305.06500), a BLIP-2 whose Q-Former reads the question."""

import copy
import os
from typing import Any

from transformers.models.instructblip.configuration_instructblip import InstructBlipConfig

from ..models.backbones import load_with_info
from ..models.modeling_blip2 import Blip2ForConditionalGeneration
from .reading import enumerate_names, rename


BACK = {
    r"^qformer\.layernorm\.": "qformer.embeddings.layernorm.",
    r"^embeddings\.": "qformer.embeddings.",
    r"^query_tokens\.weight$": "query_tokens",
}


def load_instructblip_checkpoint(
    pretrained_model_name_or_path: str | os.PathLike, **kwargs
) -> Blip2ForConditionalGeneration:
    r"""
    Load a checkpoint of transformers' `InstructBlipForConditionalGeneration`, as [`Blip2ForConditionalGeneration`]
    does, and refuse one that is not complete.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`):
            A folder or an id on the Hub, such as `Salesforce/instructblip-flan-t5-xl`.
        kwargs:
            Those of [`~transformers.PreTrainedModel.from_pretrained`], such as `dtype`.

    Returns:
        [`Blip2ForConditionalGeneration`]: the model. It takes `qformer_input_ids` with each image, which a
        [`Blip2Processor`] with a `qformer_tokenizer` makes.

    Raises:
        ValueError: if the checkpoint lacks weights, or has unknown ones.
    """
    model, info = load_with_info(Blip2ForConditionalGeneration, pretrained_model_name_or_path, **kwargs)
    for kind, keys in info.items():
        if names := [name for name in keys if not name.endswith("position_ids")]:
            raise ValueError(
                f"{pretrained_model_name_or_path} is not a complete InstructBLIP: {kind.replace('_', ' ')}: "
                f"{enumerate_names(names)}. Give a complete checkpoint."
            )
    return model


def save_instructblip_checkpoint(model: Blip2ForConditionalGeneration, save_directory: str | os.PathLike, **kwargs):
    r"""
    Save a model whose Q-Former reads the question as transformers' `InstructBlipForConditionalGeneration`.

    Args:
        model ([`Blip2ForConditionalGeneration`]):
            The model, with `use_qformer_text_input=True`.
        save_directory (`str` or `os.PathLike`):
            The folder.
        kwargs:
            Those of [`~transformers.PreTrainedModel.save_pretrained`], such as `max_shard_size`.

    Raises:
        ValueError: if InstructBLIP has no place for the model's tower, or if the model's Q-Former reads no text.
    """
    config = model.config
    if not config.qformer_config.use_qformer_text_input:
        raise ValueError(
            "The Q-Former of this model reads no text: it is a BLIP-2. Save it with transformers_compatible=True."
        )
    fields = _fields(config.to_transformers())
    del fields["qformer_config"]["use_qformer_text_input"]
    theirs = InstructBlipConfig(**fields)
    state_dict = {rename(name, BACK): tensor for name, tensor in model.state_dict().items()}
    try:
        model.config = theirs
        model.save_pretrained(save_directory, state_dict=state_dict, with_code=False, **kwargs)
    finally:
        model.config = config
    theirs.architectures = ["InstructBlipForConditionalGeneration"]
    theirs.save_pretrained(save_directory)


def _fields(config: Any) -> dict[str, Any]:
    """Return what the configurations of InstructBLIP and of transformers' BLIP-2 share."""
    names = ("num_query_tokens", "image_token_index", "initializer_range", "dtype")
    fields = {name: getattr(config, name) for name in names}
    for name in ("vision_config", "qformer_config"):
        fields[name] = getattr(config, name).to_dict()
        del fields[name]["model_type"]
    return fields | {"text_config": copy.deepcopy(config.text_config)}
