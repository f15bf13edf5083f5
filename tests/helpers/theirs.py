"""transformers' own BLIP-2, tiny, and the language models of the published checkpoints at their full size."""

import torch
import transformers
from tiny import LANGUAGE_MODELS, NUM_QUERIES, QFORMER, VISION, VOCAB_SIZE, make_pixel_values, randomize


IMAGE = VOCAB_SIZE - 1


def make_theirs(name: str) -> transformers.Blip2ForConditionalGeneration:
    text_config = LANGUAGE_MODELS[name]()
    text_config.bos_token_id = 0
    config = transformers.Blip2Config(
        vision_config={**VISION, "initializer_range": 0.02},
        qformer_config={k: v for k, v in QFORMER.items() if k != "bos_token_id"},
        text_config=text_config,
        num_query_tokens=NUM_QUERIES,
        image_token_index=IMAGE,
    )
    return randomize(transformers.Blip2ForConditionalGeneration(config)).eval()


def inputs():
    ids = torch.tensor([[IMAGE] * NUM_QUERIES + [0, 5, 6, 7], [IMAGE] * NUM_QUERIES + [0, 8, 9, 10]])
    return {"pixel_values": make_pixel_values(), "input_ids": ids}


def full_size_text_config(name: str):
    if name.startswith("opt"):
        layers, width, heads = {"opt-2.7b": (32, 2560, 32), "opt-6.7b": (32, 4096, 32)}[name]
        return transformers.OPTConfig(
            vocab_size=50272,
            hidden_size=width,
            word_embed_proj_dim=width,
            num_hidden_layers=layers,
            ffn_dim=4 * width,
            num_attention_heads=heads,
        )
    width, heads, d_ff = {"flan-t5-xl": (2048, 32, 5120), "flan-t5-xxl": (4096, 64, 10240)}[name]
    return transformers.T5Config(
        vocab_size=32128,
        d_model=width,
        d_kv=64,
        num_heads=heads,
        num_layers=24,
        d_ff=d_ff,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
