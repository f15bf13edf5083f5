"""Models to train, and their processors: made of parts, or loaded to go on from."""

import os

import torch
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.tokenization_auto import AutoTokenizer

from ..data.image_size import with_image_size
from ..jobs.inference import quantization
from ..jobs.model_checks import MATCHING, WRITING, check_checkpoint, load_processor
from ..models.backbones import load_whole
from ..models.frozen import cast_parameters
from ..models.modeling_blip2 import Blip2ForConditionalGeneration
from ..models.modeling_pretraining import Blip2ForPreTraining
from ..models.processing_blip2 import Blip2Processor


# All but the language model without its head
_NOT_QUANTIZED = ["vision_model", "query_tokens", "embeddings", "qformer", "language_projection", "lm_head"]


def load_writer(
    name: str | os.PathLike,
    image_size: int | None = None,
    language_model_dtype: str = "bfloat16",
    max_new_tokens: int = 30,
    bits: int | None = None,
    attn_implementation: str | None = None,
) -> tuple[Blip2ForConditionalGeneration, Blip2Processor]:
    r"""
    Load a model of stage 2 to fine-tune it, in float32 except for its language model.

    Args:
        name (`str` or `os.PathLike`):
            Folder or id on the Hub.
        image_size (`int`, *optional*):
            Side of the pictures, in pixels. Defaults to that of the checkpoint.
        language_model_dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Dtype of the language model or, with `bits`, that in which it computes.
        max_new_tokens (`int`, *optional*, defaults to 30):
            The most tokens that it generates.
        bits (`int`, *optional*):
            8 or 4: the linear layers of the language model are quantised by bitsandbytes. Only adapters can be saved.
        attn_implementation (`str`, *optional*):
            Such as `"sdpa"` or `"eager"`.

    Returns:
        `tuple[Blip2ForConditionalGeneration, Blip2Processor]`.

    Raises:
        OSError: if there is no such model.
        ValueError: if it is of another class, lacks weights, or has no processor.
    """
    processor = _load_processor(name, WRITING, image_size)
    dtype = getattr(torch, language_model_dtype)
    kwargs = {} if bits is None else {"quantization_config": quantization(bits, dtype, kept=_NOT_QUANTIZED)}
    model = load_whole(
        Blip2ForConditionalGeneration,
        name,
        "A Blip2ForConditionalGeneration",
        dtype=torch.float32,
        attn_implementation=attn_implementation,
        **kwargs,
    )
    if bits is None:
        cast_parameters(model.language_model, dtype)
    _limit_generation(model, max_new_tokens)
    return model, processor


def load_stage1(name: str | os.PathLike, image_size: int | None = None) -> tuple[Blip2ForPreTraining, Blip2Processor]:
    r"""
    Load a model of stage 1, with its tower, to train it further.

    Args:
        name (`str` or `os.PathLike`):
            Folder or id on the Hub.
        image_size (`int`, *optional*):
            Side of the pictures, in pixels. Defaults to that of the checkpoint.

    Returns:
        `tuple[Blip2ForPreTraining, Blip2Processor]`.

    Raises:
        OSError: if there is no such model.
        ValueError: if it is of another class, lacks weights, or has no processor.
    """
    processor = _load_processor(name, MATCHING, image_size)
    model = load_whole(Blip2ForPreTraining, name, "A Blip2ForPreTraining", dtype=torch.float32)
    return model, processor


def make_stage1(
    vision_model: str, text_encoder: str, image_size: int, **kwargs
) -> tuple[Blip2ForPreTraining, Blip2Processor]:
    r"""
    Make a model of stage 1 of a tower and a BERT, and its processor.

    Args:
        vision_model, text_encoder (`str`):
            Folders or ids on the Hub.
        image_size (`int`):
            Side of the pictures, in pixels.
        kwargs:
            Arguments of [`Blip2ForPreTraining.from_encoders_pretrained`].

    Returns:
        `tuple[Blip2ForPreTraining, Blip2Processor]`.
    """
    model = Blip2ForPreTraining.from_encoders_pretrained(vision_model, text_encoder, **kwargs)
    tokenizer = AutoTokenizer.from_pretrained(text_encoder)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    image_processor = AutoImageProcessor.from_pretrained(vision_model)
    return model, Blip2Processor(with_image_size(image_processor, image_size), tokenizer)


def make_stage2(
    stage1: str,
    language_model: str,
    image_size: int | None,
    vision_model: str | None = None,
    language_model_dtype: str = "bfloat16",
    max_new_tokens: int = 32,
) -> tuple[Blip2ForConditionalGeneration, Blip2Processor]:
    r"""
    Join a language model to a trained Q-Former, and make the processor.

    Args:
        stage1, language_model (`str`):
            Folders or ids on the Hub, as in [`Blip2ForConditionalGeneration.from_pretrained_parts`].
        image_size (`int`, *optional*):
            Side of the pictures, in pixels. Defaults to that of `stage1`, or of `vision_model`.
        vision_model (`str`, *optional*):
            The tower, if `stage1` has none.
        language_model_dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Dtype of the language model.
        max_new_tokens (`int`, *optional*, defaults to 32):
            The most tokens that it generates.

    Returns:
        `tuple[Blip2ForConditionalGeneration, Blip2Processor]`.
    """
    model = Blip2ForConditionalGeneration.from_pretrained_parts(
        stage1,
        language_model,
        vision_model=vision_model,
        language_model_kwargs={"dtype": getattr(torch, language_model_dtype)},
    )
    _limit_generation(model, max_new_tokens)
    image_processor = AutoImageProcessor.from_pretrained(vision_model or stage1)
    processor = Blip2Processor(
        with_image_size(image_processor, image_size),
        AutoTokenizer.from_pretrained(language_model),
        num_query_tokens=model.config.num_query_tokens,
        is_encoder_decoder=model.config.is_encoder_decoder,
    )
    return model, processor


def _load_processor(name: str | os.PathLike, need: str, image_size: int | None) -> Blip2Processor:
    """Load the processor of a model, once the model is known to be of the class that is needed."""
    check_checkpoint(name, need)
    processor = load_processor(name)
    processor.image_processor = with_image_size(processor.image_processor, image_size)
    return processor


def _limit_generation(model: Blip2ForConditionalGeneration, max_new_tokens: int):
    # One limit, because transformers warns of two at each batch
    model.generation_config.max_length = None
    model.generation_config.max_new_tokens = max_new_tokens


__all__ = ["load_stage1", "load_writer", "make_stage1", "make_stage2"]
