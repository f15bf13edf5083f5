"""Folders of tiny models with their processors, for the commands."""

from pathlib import Path

import torch
from stage1 import STAGE1_QFORMER, make_stage1
from tiny import VOCAB_SIZE, make_image_processor, make_model, make_processor, make_tokenizer

from blip2_hf import Blip2Processor


def save_captioner(folder: Path, **kwargs) -> Path:
    """Write a model of stage 2. `kwargs` are those of `save_pretrained`."""
    torch.manual_seed(0)
    make_model().save_pretrained(folder, **kwargs)
    make_processor().save_pretrained(folder, **kwargs)
    return folder


def save_stage1(folder: Path) -> Path:
    """Write a model of stage 1, whose tokenizer is that of the captioner."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB_SIZE, "bos_token_id": VOCAB_SIZE - 1, "eos_token_id": 2, "pad_token_id": 1}
    make_stage1(qformer_config={**STAGE1_QFORMER, **sizes}).save_pretrained(folder)
    Blip2Processor(make_image_processor(), make_tokenizer(eos=True)).save_pretrained(folder)
    return folder
