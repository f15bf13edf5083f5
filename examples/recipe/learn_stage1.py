"""
Train stage 1 on the scenes of the recipe, and evaluate it: retrieval, swapped captions, and captions by ITG.

    python examples/recipe/learn_stage1.py --variant start --seed 0    # by contrast and captioning
    python examples/recipe/learn_stage1.py --variant full --seed 0     # goes on from it, by matching too
    python examples/recipe/learn_stage1.py --variant start --validate --set steps=200   # to choose settings

With --validate, one of the training styles is held out and tested on, and the test scenes are not used.
"""

import sys
from dataclasses import replace
from pathlib import Path

import transformers
from evaluate_stage1 import evaluate
from features import choose_scenes, image_processor
from settings import FOLDER, STAGE1, START, Stage1
from training import learn, parse_options, save_results
from transformers import AutoTokenizer


sys.path.insert(0, str(Path(__file__).parents[1]))
import efficientnet_lite  # noqa: E402
from real_assets import real_assets  # noqa: E402
from scene_training import (  # noqa: E402
    NEW_PARTS,
    QFORMER,
    ChosenLosses,
    LearnsFromTwins,
    save_as_library_class,
    set_training_attention,
)

from blip2_hf import Blip2Processor  # noqa: E402
from blip2_hf.data import ImageTextCollator, ImageTextPairs  # noqa: E402
from blip2_hf.training import Blip2Trainer, Stage1Arguments  # noqa: E402


class Ablation(ChosenLosses):
    """Leaves out losses of stage 1, or the hardness of matching's negatives (0: all are equally likely)."""

    hardness = 1.0

    def _draw_negatives(self, compared, is_match):
        return super()._draw_negatives({name: logits * self.hardness for name, logits in compared.items()}, is_match)


def make_model(settings: Stage1, start: Path | None = None) -> Ablation:
    """Load the model of `start`. Without it, start from the pretrained parts."""
    if start is not None:
        model = Ablation.from_pretrained(start)
    else:
        model = Ablation.from_encoders_pretrained(
            efficientnet_lite.pretrained_folder(),
            real_assets().text_encoder,
            num_query_tokens=settings.num_query_tokens,
            query_initialization=settings.query_initialization,
            **QFORMER,
        )
    model.losses, model.hardness = settings.losses, 1.0 if settings.hard_negatives else 0.0
    set_training_attention(model)
    # They are half of the weights, and some sixty names teach them little
    model.embeddings.word_embeddings.requires_grad_(False)
    return model


def main():
    variants = START | STAGE1
    options = parse_options(__doc__.splitlines()[1], variants)
    settings = replace(variants[options.variant], **options.set)
    root = FOLDER / ("validate" if options.validate else ".") / "stage1"
    folder = options.output or root / f"{options.variant}-seed{options.seed}"
    start = settings.start and root / f"{settings.start}-seed{options.seed}" / "model"
    if settings.start and {"num_query_tokens", "query_initialization"} & options.set.keys():
        sys.exit(f"The queries of {options.variant!r} are those of {settings.start!r}. Set them there.")
    if start and not start.exists():
        sys.exit(f"This continues from {start}, which does not exist. Run --variant {settings.start!r} first.")
    transformers.logging.set_verbosity_error()
    scenes, tests = choose_scenes(options.validate)
    transformers.set_seed(options.seed)
    model = make_model(settings, start)
    tokenizer = AutoTokenizer.from_pretrained(real_assets().text_encoder)
    processor = Blip2Processor(image_processor(), tokenizer, num_query_tokens=model.config.num_query_tokens)
    pairs = ImageTextPairs(scenes, text_column="caption", id_column="caption", seed=options.seed)
    log, seconds = learn(
        model,
        pairs,
        ImageTextCollator(processor),
        settings,
        NEW_PARTS,
        options.seed,
        folder / "checkpoints",
        Stage1Arguments,
        LearnsFromTwins if start else Blip2Trainer,
    )
    trained = save_as_library_class(model, folder / "model").to(model.device)
    processor.save_pretrained(folder / "model")
    results = {name: evaluate(trained, processor, test, settings.losses) for name, test in tests.items()}
    save_results(folder, results, log, seconds)


if __name__ == "__main__":
    main()
