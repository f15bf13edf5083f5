"""
Train stage 1 on the scenes of the recipe, and evaluate it: retrieval, swapped captions, and captions by ITG.

    python examples/recipe/learn_stage1.py --variant full --seed 0
    python examples/recipe/learn_stage1.py --variant full --seed 0 --validate --set steps=200   # to choose settings

With --validate, one of the training styles is held out and tested on, and the test scenes are not used.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

import transformers
from evaluate_stage1 import evaluate
from features import choose_scenes, image_processor
from settings import FOLDER, STAGE1, Stage1
from training import learn, parse_options, save_results
from transformers import AutoTokenizer


sys.path.insert(0, str(Path(__file__).parents[1]))
import efficientnet_lite  # noqa: E402
from real_assets import real_assets  # noqa: E402
from scene_training import NEW_PARTS, ChosenLosses, LearnsFromTwins, set_training_attention  # noqa: E402

from blip2_hf import Blip2Processor  # noqa: E402
from blip2_hf.data import ImageTextCollator, ImageTextPairs  # noqa: E402
from blip2_hf.training import Blip2Trainer, Stage1Arguments  # noqa: E402


class Ablation(ChosenLosses):
    """Leaves out losses of stage 1, or the hardness of matching's negatives (0: all are equally likely)."""

    hardness = 1.0

    def _draw_negatives(self, compared, is_match):
        return super()._draw_negatives({name: logits * self.hardness for name, logits in compared.items()}, is_match)


def make_model(settings: Stage1) -> Ablation:
    model = Ablation.from_encoders_pretrained(
        efficientnet_lite.pretrained_folder(),
        real_assets().text_encoder,
        num_query_tokens=settings.num_query_tokens,
        query_initialization=settings.query_initialization,
        load_vision_tower=False,
        # In every layer instead of every second one as in the paper: the faster learning outweighs the cost
        cross_attention_frequency=1,
        # Dropout takes a tenth of the time, and did not help in so short a training
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model.hardness = 1.0 if settings.hard_negatives else 0.0
    set_training_attention(model)
    # They are half of the weights, and some sixty names teach them little
    model.embeddings.word_embeddings.requires_grad_(False)
    return model


def main():
    options = parse_options(__doc__.splitlines()[1], STAGE1)
    settings = replace(STAGE1[options.variant], **options.set)
    folder = options.output or FOLDER / ("validate" if options.validate else ".") / "stage1" / (
        f"{options.variant}-seed{options.seed}"
    )
    transformers.logging.set_verbosity_error()
    scenes, tests = choose_scenes(options.validate)
    transformers.set_seed(options.seed)
    model = make_model(settings)
    tokenizer = AutoTokenizer.from_pretrained(real_assets().text_encoder)
    processor = Blip2Processor(image_processor(), tokenizer, num_query_tokens=settings.num_query_tokens)
    pairs = ImageTextPairs(scenes, text_column="caption", id_column="caption", seed=options.seed)
    start, collator, log = time.time(), ImageTextCollator(processor), []
    without_matching = tuple(name for name in settings.losses if name != "itm")
    for phase, losses, trainer in (
        (settings.first, without_matching, Blip2Trainer),
        (settings, settings.losses, LearnsFromTwins),
    ):
        model.losses = losses
        work = folder / "checkpoints" / trainer.__name__
        log += learn(model, pairs, collator, phase, NEW_PARTS, options.seed, work, Stage1Arguments, trainer)
    seconds = time.time() - start
    results = {name: evaluate(model, processor, test, settings.losses) for name, test in tests.items()}
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    save_results(folder, results, log, seconds)


if __name__ == "__main__":
    main()
