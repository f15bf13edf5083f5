"""
Train stage 2 on the scenes of the recipe, after a stage 1 or without one, and score its captions.

A frozen language model reads the queries and writes the caption.

    python examples/recipe/learn_stage2.py --variant full --seed 0
    python examples/recipe/learn_stage2.py --variant "no stage 1" --seed 0
"""

import sys
from dataclasses import replace
from pathlib import Path

import datasets
import torch
import transformers
from evaluate_stage1 import score_captions
from features import choose_scenes, image_processor
from settings import CAPTION_PROMPT, FOLDER, STAGE2, Stage2
from training import learn, parse_options, save_results
from transformers import AutoTokenizer


sys.path.insert(0, str(Path(__file__).parents[1]))
import efficientnet_lite  # noqa: E402
from precision import fast_autocast, fast_dtype  # noqa: E402
from real_assets import real_assets  # noqa: E402
from scene_training import (  # noqa: E402
    QFORMER,
    caption_embeddings,
    set_training_attention,
    stack_features,
    start_projection,
)

from blip2_hf import Blip2ForConditionalGeneration, Blip2ForPreTraining, Blip2Processor  # noqa: E402
from blip2_hf.data import ImageTextPairs, LanguageModelCollator  # noqa: E402
from blip2_hf.models.frozen import cast_parameters  # noqa: E402
from blip2_hf.training import Stage2Arguments  # noqa: E402


def make_model(settings: Stage2, stage1: Path) -> Blip2ForConditionalGeneration:
    if settings.stage1 is not None:
        parts = {"stage1": Blip2ForPreTraining.from_pretrained(stage1)}
    else:
        parts = {
            "vision_model": efficientnet_lite.pretrained_folder(),
            "text_encoder": real_assets().text_encoder,
            "num_query_tokens": 16,
            **QFORMER,
        }
    model = Blip2ForConditionalGeneration.from_pretrained_parts(
        **parts, language_model=real_assets().language_model
    ).float()
    cast_parameters(model.language_model, fast_dtype())
    set_training_attention(model)
    return model


@torch.no_grad()
def write(model, processor, scenes: datasets.Dataset) -> list[str]:
    """Generate a caption for each scene, greedily."""
    model.eval()
    captions = []
    for embeds in stack_features(scenes).split(100):
        prompts = processor(text=[CAPTION_PROMPT] * len(embeds), return_tensors="pt").to(model.device)
        with fast_autocast():
            tokens = model.generate(image_embeds=embeds.to(model.device), **prompts, max_new_tokens=16)
        captions += processor.post_process_image_text_to_text(tokens, input_ids=prompts["input_ids"])
    return captions


def main():
    options = parse_options(__doc__.splitlines()[1], STAGE2)
    settings = replace(STAGE2[options.variant], **options.set)
    root = FOLDER / ("validate" if options.validate else ".")
    folder = options.output or root / "stage2" / f"{options.variant}-seed{options.seed}"
    stage1 = root / "stage1" / f"{settings.stage1}-seed{options.seed}" / "model"
    if settings.stage1 and not stage1.exists():
        sys.exit(f"Stage 2 continues from {stage1}, which does not exist. Run learn_stage1.py first, with this seed.")
    transformers.logging.set_verbosity_error()
    scenes, tests = choose_scenes(options.validate)
    transformers.set_seed(options.seed)
    model = make_model(settings, stage1)
    tokenizer = AutoTokenizer.from_pretrained(real_assets().language_model)
    few = scenes.select(range(min(1500, len(scenes))))
    start_projection(model, stack_features(few), caption_embeddings(model, tokenizer, few["caption"]))
    processor = Blip2Processor(
        image_processor(), tokenizer, num_query_tokens=model.config.num_query_tokens, prompt=CAPTION_PROMPT
    )
    pairs = ImageTextPairs(scenes, text_column="caption", prompt=CAPTION_PROMPT, clean_text=False, seed=options.seed)
    work = folder / "checkpoints"
    collator = LanguageModelCollator(processor)
    log, seconds = learn(
        model, pairs, collator, settings, ("language_projection",), options.seed, work, Stage2Arguments
    )
    captions = {name: write(model, processor, test) for name, test in tests.items()}
    results = {name: score_captions(captions[name], test) for name, test in tests.items()}
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    save_results(folder, results, log, seconds, captions=captions)


if __name__ == "__main__":
    main()
