"""What the authors' code computed with random weights (tests/fixtures/lavis): files, configurations and models."""

import json
from pathlib import Path

import paths
import torch
import transformers
from safetensors.torch import load_file
from tiny import make_image_processor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from blip2_hf import Blip2Config, Blip2Processor
from blip2_hf.convert import load_lavis_checkpoint


FIXTURES = paths.FIXTURES / "lavis"
STAGE1 = FIXTURES / "stage1" / "case0"
ITM = FIXTURES / "itm" / "case0"
OPT = FIXTURES / "stage2_opt" / "case0_noprompt"
T5 = FIXTURES / "stage2_t5" / "case0"
CASES = {"stage1": STAGE1, "opt": OPT, "t5": T5}
# Which ends a text
NEWLINE = 202


def tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def read(folder, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def lavis_config(folder: Path, **kwargs) -> Blip2Config:
    case = json.loads((folder / "config.json").read_text())
    vit, bert = case["vit"], case["bert"]
    language_models = {"opt": transformers.OPTConfig, "t5": transformers.T5Config}
    fields = {
        "vision_config": {
            "hidden_size": vit["width"],
            "intermediate_size": int(vit["width"] * vit["mlp_ratio"]),
            "num_hidden_layers": vit["depth"],
            "num_attention_heads": vit["heads"],
            "patch_size": vit["patch"],
            "image_size": case["image_size"],
        },
        "qformer_config": {
            **bert,
            "vocab_size": bert["vocab_size"] + 1,
            "bos_token_id": bert["vocab_size"],
            "eos_token_id": 3,
            "cross_attention_frequency": case.get("cross_attention_freq", 2),
            "use_qformer_text_input": "embed_dim" in case,
        },
        "text_config": next((make(**case[name]) for name, make in language_models.items() if name in case), None),
        "num_query_tokens": case["num_query_token"],
        "image_text_hidden_size": case.get("embed_dim", 256),
    }
    return Blip2Config(**(fields | kwargs))


def load(folder: Path, **kwargs):
    return load_lavis_checkpoint(folder / "state_dict.safetensors", lavis_config(folder), **kwargs)


def opt_processor() -> Blip2Processor:
    """OPT's tokenizer begins each text with </s>; BLIP-2 ends it with a newline."""
    folder = FIXTURES / "tokenizers" / "opt"
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    names = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    return Blip2Processor(
        make_image_processor(), tokenizer, num_query_tokens=8, is_encoder_decoder=False, end_token_id=NEWLINE
    )
