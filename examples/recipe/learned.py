"""
Evaluate the models on drawings that they were trained on, in one of the training styles.

This tells what they have not learned from what they lose on a new style. It also shows how alike the queries of a
picture are, and, on the test style, how captions depend on the length of a name.

    python examples/recipe/learned.py --seed 0
"""

import argparse
import json
import sys
from pathlib import Path

import datasets
import torch
import transformers
from evaluate_stage1 import evaluate, score
from features import choose_splits
from learn_stage2 import write
from settings import FOLDER, LONGER, STAGE1, STAGE2


sys.path.insert(0, str(Path(__file__).parents[1]))
from precision import device_type  # noqa: E402

from blip2_hf import Blip2ForConditionalGeneration, Blip2ForPreTraining, Blip2Processor  # noqa: E402
from blip2_hf.data import read_cached_features  # noqa: E402


LONG = 4  # tokens


def show(title: str, scores: dict[str, float]):
    print(*(f"{f'{title}: {name}':55} {value:.3f}" for name, value in scores.items()), sep="\n", flush=True)


@torch.no_grad()
def likeness(model, rows: datasets.Dataset) -> float:
    """Compute the mean cosine of two queries of a picture, in the space of contrast."""
    embeds = torch.stack([read_cached_features(row).float() for row in rows]).to(model.device)
    features = model.get_image_features(image_embeds=embeds, return_dict=True).pooler_output
    cosines = features @ features.transpose(1, 2)
    different = ~torch.eye(cosines.shape[1], dtype=torch.bool)
    return cosines[:, different].mean().item()


def by_length(captions: list[str], names: list[str], tokenizer) -> dict[str, float]:
    """Compute the share of exactly right captions by the number of tokens of the name, the longest together."""
    lengths = [min(len(tokenizer(" " + name)["input_ids"]), LONG) for name in names]
    parts = {length: [row for row, own in enumerate(lengths) if own == length] for length in sorted(set(lengths))}
    return {
        f"exact, {len(rows)} names of {length} token{'s' * (length > 1)}{' or more' * (length == LONG)}": score(
            [captions[row] for row in rows], [names[row] for row in rows]
        )["exact"]
        for length, rows in parts.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    transformers.logging.set_verbosity_error()
    test_names = list(choose_splits(validate=False)[1]["seen"]["name"])
    # The drawings that --validate tests on; the models here were trained on them
    _, tests = choose_splits(validate=True)
    for variant in ("full", LONGER, "all losses for longer"):
        folder = FOLDER / "stage1" / f"{variant}-seed{seed}" / "model"
        if not folder.exists():
            continue
        model = Blip2ForPreTraining.from_pretrained(folder).to(device_type())
        processor = Blip2Processor.from_pretrained(folder)
        of_all = evaluate(model, processor, tests)["seen"]
        has_matching = "itm" in STAGE1[variant].losses
        keys = [key for key in of_all if has_matching or not key.startswith(("ITM", "ITC and ITM"))]
        show(variant, {key: of_all[key] for key in keys} | {"cosine of two queries": likeness(model, tests["seen"])})
    folder = FOLDER / "stage2" / f"full-seed{seed}" / "model"
    model = Blip2ForConditionalGeneration.from_pretrained(folder).to(device_type())
    processor = Blip2Processor.from_pretrained(folder)
    for variant in STAGE2:
        file = FOLDER / "stage2" / f"{variant}-seed{seed}" / "results.json"
        if file.exists():
            captions = json.loads(file.read_text())["captions"]["seen"]
            show(f"stage 2, {variant}, test style", by_length(captions, test_names, processor.tokenizer))
    show("stage 2, full", score(write(model, processor, tests["seen"]), list(tests["seen"]["name"])))


if __name__ == "__main__":
    main()
