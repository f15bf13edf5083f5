"""
Choose among captions of the scenes of the recipe: by the matching of stage 1, by its contrast, or by how likely the
language model finds them.

    python examples/recipe/choose_captions.py --seed 0

Of five captions that beam search or sampling writes, one is chosen. The language model also has to tell the true
caption from the one with the swapped relation or count. It comes after learn_stage2.py.
"""

import sys
from pathlib import Path

import datasets
import torch
import transformers
from evaluate_stage1 import SWAPS, score_captions
from features import choose_scenes
from settings import CAPTION_PROMPT, FOLDER
from training import parse_options, save_results


sys.path.insert(0, str(Path(__file__).parents[1]))
from precision import fast_autocast  # noqa: E402
from scene_training import stack_features  # noqa: E402

from blip2_hf import Blip2ForConditionalGeneration, Blip2ForPreTraining, Blip2Processor  # noqa: E402
from blip2_hf.capfilt import RetrievalFilter  # noqa: E402


NUM_CAPTIONS = 5
WAYS = {
    "beams": {"num_beams": NUM_CAPTIONS, "do_sample": False},
    "sampled": {"do_sample": True, "top_p": 0.9},
}
SCENES = 200  # of each test


def write(model, processor, embeds: torch.Tensor, **generate_kwargs) -> list[list[str]]:
    """Generate several captions of each scene."""
    captions = []
    for chunk in embeds.split(50):
        prompts = processor(text=[CAPTION_PROMPT] * len(chunk), return_tensors="pt")
        tokens = model.generate(
            image_embeds=chunk, **prompts, max_new_tokens=16, num_return_sequences=NUM_CAPTIONS, **generate_kwargs
        )
        texts = processor.post_process_image_text_to_text(
            tokens, input_ids=prompts["input_ids"].repeat_interleave(NUM_CAPTIONS, dim=0)
        )
        captions += [texts[start : start + NUM_CAPTIONS] for start in range(0, len(texts), NUM_CAPTIONS)]
    return captions


def score(model, processor, embeds: torch.Tensor, texts: list[list[str]]) -> dict[str, list[list[float]]]:
    """Compute how likely the language model finds the texts of each scene, in three ways."""
    scores: dict[str, list] = {"sum": [], "mean": [], "relative": []}
    for start in range(0, len(texts), 50):
        own = texts[start : start + 50]
        inputs = processor(text=[CAPTION_PROMPT] * len(own), candidates=own, return_tensors="pt")
        features = model.get_image_features(image_embeds=embeds[start : start + 50]).pooler_output
        likelihood = model.score_texts(**inputs, image_features=features)
        scores["sum"] += likelihood.tolist()
        scores["mean"] += (likelihood / inputs["candidate_labels"].ne(-100).sum(dim=-1)).tolist()
        scores["relative"] += model.score_texts(**inputs, image_features=features, normalization="relative").tolist()
    return scores


def choose(captions: list[list[str]], scores: list[list[float]]) -> list[str]:
    """Return the caption of each scene that has the highest score, the first of equal ones."""
    return [texts[own.index(max(own))] for texts, own in zip(captions, scores, strict=True)]


@torch.no_grad()
def evaluate(stage1, stage1_processor, model, processor, scenes: datasets.Dataset) -> dict[str, float]:
    """Score the captions that are chosen in each way, and the choice between true and swapped captions."""
    embeds, results = stack_features(scenes), {}
    for way, generate_kwargs in WAYS.items():
        captions = write(model, processor, embeds, **generate_kwargs)
        chosen = {"first": [texts[0] for texts in captions]}
        for name in ("itm", "itc", "sum"):
            matching = RetrievalFilter(stage1, stage1_processor, score=name)
            chosen[f"stage 1, {name}"] = choose(captions, matching(list(embeds), captions))
        for name, scores in score(model, processor, embeds, captions).items():
            chosen[f"language model, {name}"] = choose(captions, scores)
        for name, texts in chosen.items():
            found = score_captions(texts, scenes)
            results |= {f"{way}, {name}: {what}": found[what] for what in ("exact", "precision", "recall")}
    for kind, wanted in SWAPS.items():
        rows = [row for row, own in enumerate(scenes["kind"]) if own in wanted]
        pairs = [[own["captions"][0], own["swapped"][0]] for own in scenes.select(rows)]
        for name, scores in (score(model, processor, embeds[rows], pairs) if rows else {}).items():
            results[f"{kind} told, {name}"] = sum(true > swapped for true, swapped in scores) / len(scores)
    return results


def main():
    options = parse_options(__doc__.splitlines()[1], ["full"])
    root = FOLDER / ("validate" if options.validate else ".")
    parts = {stage: root / stage / f"full-seed{options.seed}" / "model" for stage in ("stage1", "stage2")}
    if missing := [str(folder) for folder in parts.values() if not folder.exists()]:
        sys.exit(f"{missing[0]} does not exist. Run learn_stage1.py and learn_stage2.py first, with this seed.")
    transformers.set_seed(options.seed)
    _, tests = choose_scenes(options.validate)
    tests = {name: test.select(range(min(SCENES, len(test)))) for name, test in tests.items()}
    models = (
        Blip2ForPreTraining.from_pretrained(parts["stage1"]),
        Blip2ForConditionalGeneration.from_pretrained(parts["stage2"]),
    )
    processors = [Blip2Processor.from_pretrained(folder) for folder in parts.values()]
    with fast_autocast():
        results = {
            name: evaluate(models[0].eval(), processors[0], models[1].eval(), processors[1], test)
            for name, test in tests.items()
        }
    save_results(options.output or root / "choose" / f"full-seed{options.seed}", results, [], None)


if __name__ == "__main__":
    main()
