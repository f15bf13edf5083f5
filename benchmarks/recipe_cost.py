"""
Count what the paper's recipe costs: FLOP, GPU hours and disk space, for three ways to train both stages.

    python benchmarks/recipe_cost.py                                  # ViT-g and FlanT5-XXL, as the paper's 9 days
    python benchmarks/recipe_cost.py --language-model opt-2.7b --share 0.3 --views 4

torch's counter of FLOP counts one example of each part at full size: the tower and the language model on the meta
device, and the Q-Former on the CPU, with the steps of benchmarks/stage1.py. Multiplied by the paper's steps and
batches they are the cost of the recipe. Only matrix products count. `--share` says which share of the GPU's peak in
bfloat16 is reached, all else included.
"""

import argparse

import torch
import transformers
from measure import flops
from stage1 import Step, make_model

from blip2_hf import Blip2Config, Blip2ForConditionalGeneration, Blip2VisionConfig, Blip2VisionModel


PEAK = 312e12  # of an A100 in bfloat16, FLOP a second
PAPER_HOURS = 16 * 9 * 24  # 16 A100, less than 6 and 3 days, for ViT-g and FlanT5-XXL (section 3.4)
PICTURES = 129e6
STAGE1_PAIRS, STAGE2_STEPS = 250_000 * 1680, 80_000
TOKENS = 32  # of each text: the authors pad to 32, and the longest of a large batch is hardly shorter
FEATURES = (257, 1408)
LANGUAGE_MODELS = {
    "flan-t5-xxl": transformers.T5Config(
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    ),
    "opt-2.7b": transformers.OPTConfig(
        hidden_size=2560, word_embed_proj_dim=2560, ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32
    ),
}


def count_tower() -> int:
    """Count a forward pass of a picture through EVA-CLIP ViT-g."""
    with torch.device("meta"):
        tower = Blip2VisionModel._from_config(Blip2VisionConfig(), attn_implementation="eager")
        tower.requires_grad_(False)
        return flops(lambda: tower(torch.empty(1, 3, 224, 224)))


def count_stage1(naive: bool) -> float:
    """Count forward and backward of a pair, in four passes of the Q-Former or in two."""
    pairs = 2
    arguments = argparse.Namespace(device="cpu", dtype="float32", compile=False)
    ids = torch.randint(1000, 30000, (pairs, TOKENS))
    batch = {"image_embeds": torch.randn(pairs, *FEATURES), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    step = Step(make_model("cpu", None), batch, arguments, naive)
    return flops(lambda: step.loss().backward()) / pairs


def count_stage2(width: int) -> int:
    """Count forward and backward of a picture through the Q-Former and the projection."""
    text_config = transformers.OPTConfig(hidden_size=width, word_embed_proj_dim=width, num_hidden_layers=0, ffn_dim=8)
    model = Blip2ForConditionalGeneration(Blip2Config(text_config=text_config, has_vision_tower=False)).train()
    image_embeds = torch.randn(1, *FEATURES)
    return flops(lambda: model.get_image_features(image_embeds=image_embeds).pooler_output.sum().backward())


def count_language_model(config: transformers.PretrainedConfig) -> int:
    """Count forward and backward of a text through the frozen language model, down to the image's 32 embeddings."""
    with torch.device("meta"):
        auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
        model = auto.from_config(config, attn_implementation="eager").requires_grad_(False)
        # An encoder-decoder reads half of the text, and learns to write the other half
        read, written = (TOKENS // 2, TOKENS // 2) if config.is_encoder_decoder else (TOKENS, 32 + TOKENS)
        embeds = torch.empty(1, 32 + read, model.get_input_embeddings().embedding_dim, requires_grad=True)
        labels = torch.zeros(1, written, dtype=torch.long)
        return flops(lambda: model(inputs_embeds=embeds, labels=labels).loss.backward())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--language-model", choices=LANGUAGE_MODELS, default="flan-t5-xxl", help="whose shape")
    parser.add_argument("--share", type=float, default=0.4, help="of the GPU's peak that is reached")
    parser.add_argument("--views", type=int, default=1, help="stored views of each picture")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    config = LANGUAGE_MODELS[arguments.language_model]
    stage2_pairs = STAGE2_STEPS * (1520 if config.is_encoder_decoder else 1920)
    tower, width = count_tower(), config.hidden_size
    every_step = {"tower, stage 1": tower * STAGE1_PAIRS, "tower, stage 2": tower * stage2_pairs}
    rest = {
        "Q-Former, stage 2": count_stage2(width) * stage2_pairs,
        "language model, stage 2": count_language_model(config) * stage2_pairs,
    }
    four, two = ({"Q-Former, stage 1": count_stage1(naive) * STAGE1_PAIRS} for naive in (True, False))
    stored = {"tower, once": tower * PICTURES * arguments.views}
    ways = {
        "four passes": every_step | four | rest,
        "two passes": every_step | two | rest,
        "two passes, stored features": stored | two | rest,
    }
    print(f"| 10^18 FLOP | {' | '.join(ways)} |\n|{' --- |' * (1 + len(ways))}")
    for part in every_step | stored | two | rest:
        print(f"| {part} | {' | '.join(f'{way[part] / 1e18:.0f}' if part in way else '' for way in ways.values())} |")
    totals = [sum(way.values()) for way in ways.values()]
    hours = [total / (PEAK * arguments.share * 3600) for total in totals]
    print(f"| all | {' | '.join(f'{total / 1e18:.0f}' for total in totals)} |")
    print(f"| A100 hours at {arguments.share:.0%} of the peak | {' | '.join(f'{value:,.0f}' for value in hours)} |")
    if arguments.language_model == "flan-t5-xxl":
        print(f"| share of the paper's {PAPER_HOURS:,} | {' | '.join(f'{h / PAPER_HOURS:.0%}' for h in hours)} |")
        reached = totals[0] / (PAPER_HOURS * 3600 * PEAK)
        print(f"\nThe paper's hours are {reached:.0%} of the peak, if it computes what the first column counts.")
    disk = PICTURES * arguments.views * FEATURES[0] * FEATURES[1] * 2
    print(f"Stored features in bfloat16, {arguments.views} a picture: {disk / 1e12:.0f} TB.")


if __name__ == "__main__":
    main()
