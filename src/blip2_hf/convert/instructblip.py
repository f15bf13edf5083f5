"""transformers' checkpoints of InstructBLIP (arXiv 2305.06500), a BLIP-2 whose Q-Former reads the question."""

import copy
import os
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.instructblip.configuration_instructblip import InstructBlipConfig

from ..models.configuration_blip2 import Blip2Config, TransformersBlip2Config
from ..models.modeling_blip2 import Blip2ForConditionalGeneration
from .reading import enumerate_names, rename


# In InstructBLIP the embeddings belong to the Q-Former; the first pattern that matches is taken
RENAMINGS = {
    r"^qformer\.embeddings\.layernorm\.": "qformer.layernorm.",
    r"^qformer\.embeddings\.(word|position)_embeddings\.": r"embeddings.\1_embeddings.",
}
BACK = {
    r"^qformer\.layernorm\.": "qformer.embeddings.layernorm.",
    r"^embeddings\.": "qformer.embeddings.",
    r"^query_tokens\.weight$": "query_tokens",
}


def load_instructblip_checkpoint(
    pretrained_model_name_or_path: str | os.PathLike, **kwargs
) -> Blip2ForConditionalGeneration:
    r"""
    Load a checkpoint of transformers' `InstructBlipForConditionalGeneration`. Its weights are those of a BLIP-2 whose
    Q-Former reads the question, under other names.

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
    config = InstructBlipConfig.from_pretrained(pretrained_model_name_or_path)
    loaded: Any = Blip2ForConditionalGeneration.from_pretrained(
        pretrained_model_name_or_path,
        config=_from_instructblip(config),
        key_mapping=RENAMINGS,
        output_loading_info=True,
        **kwargs,
    )
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = [str(name) for name in info[kind] if not str(name).endswith("position_ids")]
        if names:
            raise ValueError(
                f"{pretrained_model_name_or_path} is not a complete InstructBLIP: {kind.replace('_', ' ')}: "
                f"{enumerate_names(sorted(names))}. Give a complete checkpoint."
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
    theirs = _to_instructblip(config)
    state_dict = {rename(name, BACK): tensor for name, tensor in model.state_dict().items()}
    try:
        model.config = theirs
        model.save_pretrained(save_directory, state_dict=state_dict, with_code=False, **kwargs)
    finally:
        model.config = config
    theirs.architectures = ["InstructBlipForConditionalGeneration"]
    theirs.save_pretrained(save_directory)


def _from_instructblip(config: InstructBlipConfig) -> Blip2Config:
    # InstructBLIP's sizes have the same names as those of transformers' BLIP-2
    return Blip2Config.from_transformers(
        TransformersBlip2Config(
            vision_config=_fields(config.vision_config),
            qformer_config=_fields(config.qformer_config) | {"use_qformer_text_input": True},
            text_config=copy.deepcopy(config.text_config),
            num_query_tokens=config.num_query_tokens,
            image_token_index=config.image_token_index,
            initializer_range=config.initializer_range,
            dtype=config.dtype,
        )
    )


def _to_instructblip(config: Blip2Config) -> InstructBlipConfig:
    blip2 = config.to_transformers()
    qformer = _fields(blip2.qformer_config)
    del qformer["use_qformer_text_input"]
    return InstructBlipConfig(
        vision_config=_fields(blip2.vision_config),
        qformer_config=qformer,
        text_config=copy.deepcopy(blip2.text_config),
        num_query_tokens=blip2.num_query_tokens,
        image_token_index=blip2.image_token_index,
        initializer_range=blip2.initializer_range,
        dtype=blip2.dtype,
    )


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name != "model_type"}
