"""Processors of checkpoints from LAVIS and transformers."""

import os
from typing import Any

from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.instructblip.processing_instructblip import InstructBlipProcessor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..jobs.inference import processor_place
from ..models.configuration_blip2 import Blip2Config
from ..models.processing_blip2 import QFORMER_TOKENIZER, Blip2Processor
from ..models.video_loading import VIDEO_TOKEN


def lavis_processor(
    config: Blip2Config, tokenizer: PreTrainedTokenizerBase, bert_tokenizer: PreTrainedTokenizerBase | None = None
) -> Blip2Processor:
    """
    Make the processor of a checkpoint from LAVIS. It scales pictures of any shape to a square. `tokenizer` is the
    language model's. Without a language model it is BERT's, to which `[DEC]` is added. `bert_tokenizer` is that of a
    Q-Former that reads the question (InstructBLIP).
    """
    image_processor = image_processor_of_size(config.vision_config.image_size)
    if bert_tokenizer is not None:
        bert_tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        bert_tokenizer.truncation_side = "left"
    if config.text_config is not None:
        return Blip2Processor(
            image_processor,
            tokenizer,
            bert_tokenizer,
            num_query_tokens=config.num_query_tokens,
            is_encoder_decoder=config.is_encoder_decoder,
            end_token_id=None if config.is_encoder_decoder else config.text_config.eos_token_id,
        )
    if tokenizer.bos_token is None:
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    bos_token_id = config.qformer_config.bos_token_id
    if tokenizer.bos_token_id != bos_token_id:
        raise ValueError(
            f"The model begins texts with token {bos_token_id}, and this tokenizer with {tokenizer.bos_token_id} "
            f"({tokenizer.bos_token}). Give the tokenizer of google-bert/bert-base-uncased."
        )
    return Blip2Processor(image_processor, tokenizer, is_encoder_decoder=False)


def image_processor_of_size(image_size: int) -> Any:
    """Make the image processor of LAVIS's evaluation: bicubic, any shape to a square, CLIP's mean and deviation."""
    return BlipImageProcessorPil(
        size={"height": image_size, "width": image_size}, image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD
    )


def load_processor(name_or_path: str | os.PathLike, config: Blip2Config) -> Blip2Processor:
    """Load the processor of a checkpoint of this library, or of transformers' BLIP-2 or InstructBLIP."""
    name_or_path = processor_place(name_or_path)
    processor = Blip2Processor.from_pretrained(name_or_path)
    reads_question = config.text_config is not None and config.qformer_config.use_qformer_text_input
    if reads_question and processor.qformer_tokenizer is None:
        processor.qformer_tokenizer = AutoTokenizer.from_pretrained(name_or_path, subfolder=QFORMER_TOKENIZER)
    return processor


def save_for_transformers(processor: Blip2Processor, folder: str | os.PathLike):
    """Save a processor as that of transformers' BLIP-2, or of InstructBLIP if the Q-Former has a tokenizer."""
    if processor.qformer_tokenizer is None:
        processor.save_pretrained(folder, transformers_compatible=True)
        return
    if processor.image_token == VIDEO_TOKEN:
        raise ValueError(
            f"This processor is of an InstructBLIP-Video, whose mark of a frame is `{VIDEO_TOKEN}`. The processor of "
            "transformers' InstructBLIP would add another mark, which the model does not know. Take the checkpoint of "
            "transformers as it is."
        )
    tokenizers = processor.tokenizer, processor.qformer_tokenizer
    InstructBlipProcessor(
        processor.image_processor, *tokenizers, num_query_tokens=processor.num_query_tokens
    ).save_pretrained(folder)
