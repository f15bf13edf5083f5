"""
Train stage 2 on the pictures of the recipe, after a stage 1 or without one, and score its captions.

A frozen language model reads the queries and writes the name.

    python examples/recipe/learn_stage2.py --variant full --seed 0
    python examples/recipe/learn_stage2.py --variant "no stage 1" --seed 0
"""

import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import torch
import transformers
from evaluate_stage1 import score
from features import choose_splits, image_processor
from settings import FOLDER, STAGE2, Stage2
from training import learn, parse_options, save_json
from transformers import AutoTokenizer


sys.path.insert(0, str(Path(__file__).parents[1]))
import two_towers  # noqa: E402
from demo import PROMPT, collate_names, start_projection  # noqa: E402
from precision import computed_in, fast_autocast, fast_dtype  # noqa: E402
from real_assets import real_assets  # noqa: E402

from blip2_hf import Blip2ForConditionalGeneration, Blip2ForPreTraining, Blip2Processor  # noqa: E402
from blip2_hf.data import ImageTextPairs, read_cached_features  # noqa: E402
from blip2_hf.models._compat import CACHE_NAME  # noqa: E402
from blip2_hf.models.frozen import cast_parameters  # noqa: E402
from blip2_hf.training import Blip2Trainer, Stage2Arguments  # noqa: E402


def with_first_queries(folder: Path, number: int) -> Blip2ForPreTraining:
    """Load a stage 1 with some of its queries. After its training all queries are about equal."""
    model = Blip2ForPreTraining.from_pretrained(folder)
    model.query_tokens.weight = torch.nn.Parameter(model.query_tokens.weight[:, :number].clone())
    model.config.num_query_tokens = number
    return model


def make_model(settings: Stage2, seed: int, rows: datasets.Dataset, tokenizer) -> Blip2ForConditionalGeneration:
    """Make a model whose projection starts from the names of `rows`, as in the demo."""
    assets = real_assets()
    if settings.stage1 is not None:
        folder = FOLDER / "stage1" / f"{settings.stage1}-seed{seed}" / "model"
        if not folder.exists():
            sys.exit(
                f"Stage 2 continues from {folder}, which does not exist. Run learn_stage1.py first, with this seed."
            )
        parts = {"stage1": with_first_queries(folder, settings.num_query_tokens)}
    else:
        parts = {
            "text_encoder": assets.text_encoder,
            "num_query_tokens": settings.num_query_tokens,
            "cross_attention_frequency": 1,
            # As in stage 1
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
    model = Blip2ForConditionalGeneration.from_pretrained_parts(
        **parts, vision_model=two_towers.pretrained_folder(), language_model=assets.language_model
    ).float()
    start_projection(model, rows, tokenizer)
    cast_parameters(model.language_model, fast_dtype())
    # Because the fused kernels' backward in bfloat16 is slow on a CPU
    model.set_attn_implementation("eager")
    return model


class SharesPrompt(Blip2Trainer):
    """Runs the words before the picture, which all rows share, through the language model once a step."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        # Padding is behind the names, so the picture has the same place in each row
        input_ids = inputs["input_ids"]
        length = int((input_ids[0] == model.config.image_token_index).int().argmax())
        with torch.no_grad(), self.accelerator.autocast():
            shared = model.language_model(input_ids[:1, :length], use_cache=True)[CACHE_NAME]
        shared.batch_repeat_interleave(len(input_ids))
        rest = {name: inputs[name][:, length:] for name in ("input_ids", "labels")}
        return super().compute_loss(model, inputs | rest | {CACHE_NAME: shared}, return_outputs, **kwargs)


def train(model, rows: datasets.Dataset, processor, settings: Stage2, seed: int, folder: Path) -> list[dict]:
    """Train the model, and return the log."""
    pairs = ImageTextPairs(rows, text_column="name", clean_text=False, seed=seed)
    collator = partial(collate_names, processor=processor, mixed=0.0)
    parts = (model, pairs, collator, settings, ("language_projection",))
    return learn(*parts, seed, folder, SharesPrompt, Stage2Arguments, max_grad_norm=1.0).state.log_history


@torch.no_grad()
def write(model, processor, rows: datasets.Dataset, batch_size: int = 64) -> list[str]:
    """Generate by beam search, as the paper does, and return the first line of each caption."""
    model.eval()
    rows = rows.select_columns([column for column in rows.column_names if column.startswith("image_embeds")])
    captions = []
    for start in range(0, len(rows), batch_size):
        chunk = rows.select(range(start, min(start + batch_size, len(rows))))
        embeds = torch.stack([read_cached_features(row) for row in chunk]).to(model.device, torch.float32)
        prompts = processor(text=[PROMPT] * len(embeds), return_tensors="pt").to(model.device)
        with fast_autocast():
            tokens = model.generate(image_embeds=embeds, **prompts, max_new_tokens=10, do_sample=False, num_beams=5)
        captions += processor.batch_decode(tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return [caption.strip().split("\n")[0].strip() for caption in captions]


def main():
    options = parse_options(__doc__.splitlines()[1], STAGE2)
    settings = replace(STAGE2[options.variant], **options.set)
    if settings.stage1 and options.validate:
        sys.exit(
            f"{options.variant!r} continues from a stage 1 that has learned from all styles. No style is left to test "
            "it on: leave out --validate."
        )
    folder = options.output or FOLDER / "stage2" / f"{options.variant}-seed{options.seed}"
    transformers.logging.set_verbosity_error()
    start = time.time()
    train_rows, tests = choose_splits(options.validate)
    # After the features, because computing them uses random numbers
    transformers.set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(real_assets().language_model)
    model = make_model(settings, options.seed, train_rows, tokenizer)
    processor = Blip2Processor(image_processor(), tokenizer, num_query_tokens=model.config.num_query_tokens)
    log = train(model, train_rows, processor, settings, options.seed, folder)
    trained = time.time()
    captions = {split: write(model, processor, rows) for split, rows in tests.items()}
    results = {split: score(captions[split], list(rows["name"])) for split, rows in tests.items()}
    print(json.dumps(results, indent=1))
    print(list(zip(captions["seen"], tests["seen"]["name"], strict=True))[:20])
    print(f"{trained - start:.0f} s training, {time.time() - trained:.0f} s evaluating")
    if not options.validate:
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        record = {"results": results, "captions": captions, "log": log, "seconds": trained - start}
        save_json(folder / "results.json", record | {"computed in": computed_in()})


if __name__ == "__main__":
    main()
