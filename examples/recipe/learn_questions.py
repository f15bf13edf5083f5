"""
Fine-tune stage 2 on questions about the scenes, and compute how many answers are right.

The question goes to the language model alone, or into the Q-Former too, as in the paper's fine-tuning (appendix).

    python examples/recipe/learn_questions.py --variant "question into the Q-Former" --seed 0
"""

import sys
from dataclasses import replace
from pathlib import Path

import datasets
import torch
import transformers
from features import choose_scenes
from settings import FOLDER, QUESTION_PROMPT, QUESTIONS
from training import learn, parse_options, save_results
from transformers import AutoTokenizer


sys.path.insert(0, str(Path(__file__).parents[1]))
from precision import fast_autocast, fast_dtype  # noqa: E402
from scene_training import set_training_attention, stack_features  # noqa: E402

from blip2_hf import Blip2ForConditionalGeneration, Blip2Processor  # noqa: E402
from blip2_hf.data import ImageTextPairs, LanguageModelCollator  # noqa: E402
from blip2_hf.models.frozen import cast_parameters  # noqa: E402
from blip2_hf.training import Stage2Arguments  # noqa: E402


ASKED = 200  # scenes of each test, which have about five questions each


def question_rows(scenes: datasets.Dataset) -> datasets.Dataset:
    """Return a row for each question, with the number of its scene in place of a picture."""
    rows = [{"image": i, **question} for i, questions in enumerate(scenes["questions"]) for question in questions]
    return datasets.Dataset.from_list(rows)


@torch.no_grad()
def score_answers(model, processor, scenes: datasets.Dataset) -> dict[str, float]:
    """Return the share of answers that are exactly right, of all and of each kind of question."""
    model.eval()
    # Sorted, because a batch takes as long as its longest answer
    rows, embeds = question_rows(scenes).sort("kind"), stack_features(scenes).to(model.device)
    right: dict[str, list[bool]] = {}
    for start in range(0, len(rows), 200):
        chunk = rows[start : start + 200]
        inputs = processor(
            text=[QUESTION_PROMPT.format(question) for question in chunk["question"]], return_tensors="pt"
        ).to(model.device)
        with fast_autocast():
            tokens = model.generate(image_embeds=embeds[chunk["image"]], **inputs, max_new_tokens=12)
        answers = processor.post_process_image_text_to_text(tokens, input_ids=inputs["input_ids"])
        for answer, truth, kind in zip(answers, chunk["answer"], chunk["kind"], strict=True):
            right.setdefault(kind, []).append(answer.strip() == truth)
    everything = [is_right for own in right.values() for is_right in own]
    return {"right": sum(everything) / len(everything)} | {
        kind: sum(own) / len(own) for kind, own in sorted(right.items())
    }


def main():
    options = parse_options(__doc__.splitlines()[1], QUESTIONS)
    settings = replace(QUESTIONS[options.variant], **options.set)
    root = FOLDER / ("validate" if options.validate else ".")
    folder = options.output or root / "questions" / f"{options.variant}-seed{options.seed}"
    before = [root / stage / f"full-seed{options.seed}" / "model" for stage in ("stage1", "stage2")]
    if missing := [part for part in before if not part.exists()]:
        sys.exit(f"This continues from {missing[0]}, which does not exist. Run that stage first, with this seed.")
    transformers.logging.set_verbosity_error()
    scenes, tests = choose_scenes(options.validate)
    transformers.set_seed(options.seed)
    model = Blip2ForConditionalGeneration.from_pretrained(before[1]).float()
    cast_parameters(model.language_model, fast_dtype())
    set_training_attention(model)
    processor = Blip2Processor.from_pretrained(before[1])
    if settings.instruct_qformer:
        model.attach_text_networks(str(before[0]))
        processor.qformer_tokenizer = AutoTokenizer.from_pretrained(before[0])
    pairs = ImageTextPairs(
        question_rows(scenes),
        text_column="answer",
        prompt=QUESTION_PROMPT,
        prompt_column="question",
        images=scenes,
        seed=options.seed,
    )
    work = folder / "checkpoints"
    collator = LanguageModelCollator(processor)
    log, seconds = learn(
        model, pairs, collator, settings, ("language_projection",), options.seed, work, Stage2Arguments
    )
    asked = {name: test.select(range(min(ASKED, len(test)))) for name, test in tests.items()}
    save_results(folder, {name: score_answers(model, processor, test) for name, test in asked.items()}, log, seconds)


if __name__ == "__main__":
    main()
