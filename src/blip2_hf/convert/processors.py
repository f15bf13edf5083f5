"""Processors to go with checkpoints that come from elsewhere."""

import os
from typing import Any

from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.instructblip.processing_instructblip import InstructBlipProcessor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..models.configuration_blip2 import Blip2Config
from ..models.processing_blip2 import QFORMER_TOKENIZER, Blip2Processor


def lavis_processor(config: Blip2Config, tokenizer: PreTrainedTokenizerBase) -> Blip2Processor:
    r"""
    The processor of a checkpoint of LAVIS's: pictures are scaled to a square, whatever their shape; texts are the
    language model's, or, without one, BERT's with `[DEC]`.

    Args:
        config ([`Blip2Config`]):
            The model's.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The language model's, or BERT's, to which `[DEC]` is added.

    Returns:
        [`Blip2Processor`].

    Raises:
        ValueError: if a BERT of another vocabulary is given.
    """
    image_processor = image_processor_of_size(config.vision_config.image_size)
    if config.text_config is None:
        _add_dec(tokenizer, config.qformer_config.bos_token_id)
        return Blip2Processor(image_processor, tokenizer, is_encoder_decoder=False)
    return Blip2Processor(
        image_processor,
        tokenizer,
        num_query_tokens=config.num_query_tokens,
        is_encoder_decoder=config.is_encoder_decoder,
        end_token_id=None if config.is_encoder_decoder else config.text_config.eos_token_id,
    )


def image_processor_of_size(image_size: int) -> Any:
    """What LAVIS does to a picture in evaluation: bicubic, the aspect ratio not kept, CLIP's mean and deviation."""
    return BlipImageProcessorPil(
        size={"height": image_size, "width": image_size}, image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD
    )


def _add_dec(tokenizer: PreTrainedTokenizerBase, bos_token_id: int | None):
    if tokenizer.bos_token is None:
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    if tokenizer.bos_token_id != bos_token_id:
        raise ValueError(
            f"The model begins texts with token {bos_token_id}, and this tokenizer with {tokenizer.bos_token_id} "
            f"({tokenizer.bos_token}). The tokenizer of google-bert/bert-base-uncased was expected."
        )


def load_processor(name_or_path: str | os.PathLike, config: Blip2Config) -> Blip2Processor:
    r"""
    The processor of a checkpoint of this library, of transformers' BLIP-2 or of its InstructBLIP.

    Args:
        name_or_path (`str` or `os.PathLike`):
            A folder or an id on the Hub.
        config ([`Blip2Config`]):
            Its model's: a Q-Former that reads the question has a tokenizer.

    Returns:
        [`Blip2Processor`].
    """
    processor = Blip2Processor.from_pretrained(name_or_path)
    reads_question = config.text_config is not None and config.qformer_config.use_qformer_text_input
    if reads_question and processor.qformer_tokenizer is None:
        processor.qformer_tokenizer = AutoTokenizer.from_pretrained(name_or_path, subfolder=QFORMER_TOKENIZER)
    return processor


def save_for_transformers(processor: Blip2Processor, folder: str | os.PathLike):
    r"""
    Saves a processor as transformers' own: that of BLIP-2, or of InstructBLIP where the Q-Former has a tokenizer.

    Args:
        processor ([`Blip2Processor`]):
            The processor.
        folder (`str` or `os.PathLike`):
            The folder.
    """
    if processor.qformer_tokenizer is None:
        processor.save_pretrained(folder, transformers_compatible=True)
        return
    InstructBlipProcessor(
        processor.image_processor,
        processor.tokenizer,
        processor.qformer_tokenizer,
        num_query_tokens=processor.num_query_tokens,
    ).save_pretrained(folder)
