"""
CapFilt on pictures with shuffled names: how many it finds, and what a training on the cleaned data gives.

    python examples/recipe/capfilt.py --seed 0

As in BLIP, captioner and filter learn from data that can be trusted: the drawings in two styles. A third of the
drawings in the other styles have each other's names. The Q-Former writes captions of them (ITG), and ranks these and
the given name (ITC). If another one is first, the drawing is dropped, or gets that caption as its name.
What contrast then learns from all styles is compared with what it learns from the two styles alone, from the shuffled
names, and from the original names (learn_stage1.py). A stopped run continues from what it has finished.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import datasets
import torch
import transformers
from evaluate_stage1 import evaluate
from features import choose_splits, image_processor
from learn_stage1 import Lesson, make_model, real_assets
from precision import computed_in, device_type, fast_autocast
from settings import FOLDER, STAGE1
from training import fingerprint, save_json, save_tensors
from transformers import AutoTokenizer

from blip2_hf import Blip2Processor
from blip2_hf.capfilt import ModelCaptioner, RetrievalFilter, capfilt_dataset
from blip2_hf.data import clean_caption


SHARE, PROPOSALS = 1 / 3, 5
TRUSTED = ("noto", "twemoji")
# A name could also be dropped only if a caption's cosine is higher by more than this
MARGINS = (0.0, 0.05, 0.1, 0.2)


def shuffle_some(names: list[str], generator: random.Random) -> list[str]:
    """Exchange a third of the names, none with an equal one."""
    chosen = generator.sample(range(len(names)), round(SHARE * len(names)))
    captions = list(names)
    # In alphabetical order, the name half a list away is another one
    by_name = sorted(chosen, key=lambda row: (names[row], row))
    half = len(by_name) // 2
    for row, other in zip(by_name, by_name[half:] + by_name[:half], strict=True):
        captions[row] = names[other]
    return captions


def detection(corrupted: list[bool], dropped: list[bool]) -> dict[str, float]:
    """Compute precision and recall of the dropped names."""
    found = sum(c and d for c, d in zip(corrupted, dropped, strict=True))
    return {"precision": found / max(1, sum(dropped)), "recall": found / sum(corrupted)}


def detection_by_style(corrupted: list[bool], dropped: list[bool], styles: list[str]) -> dict[str, dict[str, float]]:
    """Compute [`detection`] for each style."""
    rows = {style: [row for row, own in enumerate(styles) if own == style] for style in sorted(set(styles))}
    return {style: detection([corrupted[i] for i in own], [dropped[i] for i in own]) for style, own in rows.items()}


def margin(candidates: list[dict]) -> float:
    """Return by how much the score of the best new caption exceeds that of the given name."""
    proposed, original = (
        max((candidate["score"] for candidate in candidates if candidate["is_original"] == is_original), default=-2.0)
        for is_original in (False, True)
    )
    return proposed - original


def clean(model, processor, rows: datasets.Dataset, folder: Path, seed: int) -> tuple[list[str], list[float]]:
    """Return the caption that ranks first of each row, and the [`margin`] of each row."""
    model.eval()
    captioner = ModelCaptioner(model, processor, num_captions=PROPOSALS, max_new_tokens=10)
    with fast_autocast():
        capfilt_dataset(
            rows,
            captioner,
            RetrievalFilter(model, processor, score="itc"),
            folder,
            text_column="caption",
            keep=1,
            batch_size=64,
            seed=seed,
        )
    files = sorted(str(file) for file in (folder / "data").glob("*.parquet"))
    result = datasets.Dataset.from_parquet(files, columns=["kept_captions", "candidates", "capfilt_row"])
    assert result["capfilt_row"] == list(range(len(rows)))
    ranked = list(result["candidates"])
    return [clean_caption(candidates[0]["text"]) for candidates in ranked], [margin(own) for own in ranked]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    transformers.logging.set_verbosity_error()
    settings, folder = STAGE1["full"], FOLDER / "capfilt" / f"seed{seed}"
    rows, tests = choose_splits(validate=False)
    tokenizer = AutoTokenizer.from_pretrained(real_assets().text_encoder)
    processor = Blip2Processor(image_processor(), tokenizer, num_query_tokens=settings.num_query_tokens)

    key, file = fingerprint(settings, rows), folder / "fingerprint.json"
    if folder.exists() and not (file.exists() and json.loads(file.read_text()) == key):
        sys.exit(f"{folder} was made with other settings, pictures or dtypes. Delete it to start again.")
    save_json(file, key)
    names = [clean_caption(name) for name in rows["name"]]
    trusted = [row for row, style in enumerate(rows["style"]) if style in TRUSTED]
    others = [row for row, style in enumerate(rows["style"]) if style not in TRUSTED]

    def contrast_on(chosen: list[int], captions: list[str], name: str):
        """Train a model by contrast on some rows, and return it with its lesson."""
        transformers.set_seed(seed)
        model = make_model(settings)
        captioned = rows.select(chosen).add_column("caption", captions)
        lesson = Lesson(captioned, processor, settings, seed, folder / name, "caption")
        lesson.contrast(model)
        return model, lesson

    def learned_from(captions: dict[int, str], name: str) -> dict:
        """Evaluate what contrast learns from the trusted styles and from the rows that have a caption here."""
        file = folder / f"{name}.json"
        if file.exists():
            return json.loads(file.read_text())
        texts = [names[row] for row in trusted] + list(captions.values())
        model, _ = contrast_on(trusted + list(captions), texts, name)
        right = sum(caption == names[row] for row, caption in captions.items()) / len(captions)
        result = {"drawings": len(captions), "right": right} | evaluate(model, processor, tests, contrast_only=True)
        save_json(file, result)
        return result

    def learned_from_trusted():
        """Return a model that has learned from the trusted styles by all losses, and its results after contrast."""
        file = folder / "trusted.pt"
        if file.exists():
            # Not trained again: other weights would not fit what an earlier run has cleaned
            saved = torch.load(file, map_location="cpu", weights_only=True)
            model = make_model(settings)
            model.load_state_dict(saved["model"])
            return model.to(device_type()), saved["alone"]
        model, lesson = contrast_on(trusted, [names[row] for row in trusted], "trusted")
        alone = evaluate(model, processor, tests, contrast_only=True)
        lesson.all_losses(model)
        save_tensors(file, {"model": model.state_dict(), "alone": alone})
        return model, alone

    original = [names[row] for row in others]
    captions = shuffle_some(original, random.Random(seed))
    model, alone = learned_from_trusted()
    to_clean = rows.select(others).add_column("caption", captions)
    cleaned, margins = clean(model, processor, to_clean, folder / "filtered", seed)
    dropped = [own > 0 for own in margins]
    corrupted = [caption != name for caption, name in zip(captions, original, strict=True)]
    kept = {row: name for row, name, is_dropped in zip(others, captions, dropped, strict=True) if not is_dropped}
    results = {
        "detection": detection(corrupted, dropped),
        "detection by style": detection_by_style(corrupted, dropped, list(to_clean["style"])),
        "detection by margin": {str(most): detection(corrupted, [own > most for own in margins]) for most in MARGINS},
        "alone": alone,
        "shuffled": learned_from(dict(zip(others, captions, strict=True)), "shuffled"),
        "kept": learned_from(kept, "kept"),
        "cleaned": learned_from(dict(zip(others, cleaned, strict=True)), "cleaned"),
        "computed in": computed_in(),
    }
    print(json.dumps(results, indent=1))
    save_json(FOLDER / "capfilt" / f"seed{seed}.json", results)


if __name__ == "__main__":
    main()
