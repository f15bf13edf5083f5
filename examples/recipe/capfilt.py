"""
CapFilt on pictures whose names were shuffled on purpose: which are found, and what training on the cleaned data gives.

    python examples/recipe/capfilt.py --seed 0

As in BLIP, captioner and filter learn from data that can be trusted: the drawings of two styles. Of the other styles a
third have each other's names. The Q-Former writes captions of them (ITG) and ranks these with the names that are there
(ITC); the best one stays, or the drawing goes where that is another name than it had. What contrast then learns of all
styles is compared with what it learns of the two styles alone, of the shuffled names, and of the original ones
(learn_stage1.py). A run that was stopped goes on from what it has finished.
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
from training import made_of, save_json, save_tensors
from transformers import AutoTokenizer

from blip2_hf import Blip2Processor
from blip2_hf.capfilt import ModelCaptioner, RetrievalFilter, capfilt_dataset
from blip2_hf.data import clean_caption


SHARE, PROPOSALS = 1 / 3, 5
TRUSTED = ("noto", "twemoji")
# A name could also be dropped only where a caption beats it by more than this, in the cosine
MARGINS = (0.0, 0.05, 0.1, 0.2)


def shuffled(names: list[str], generator: random.Random) -> list[str]:
    """A third of the names change places, none with an equal one."""
    chosen = generator.sample(range(len(names)), round(SHARE * len(names)))
    captions = list(names)
    # In the order of names, half the list further on, there is another name
    by_name = sorted(chosen, key=lambda row: (names[row], row))
    half = len(by_name) // 2
    for row, other in zip(by_name, by_name[half:] + by_name[:half], strict=True):
        captions[row] = names[other]
    return captions


def detection(corrupted: list[bool], dropped: list[bool]) -> dict[str, float]:
    found = sum(c and d for c, d in zip(corrupted, dropped, strict=True))
    return {"precision": found / max(1, sum(dropped)), "recall": found / sum(corrupted)}


def detection_by_style(corrupted: list[bool], dropped: list[bool], styles: list[str]) -> dict[str, dict[str, float]]:
    rows = {style: [row for row, own in enumerate(styles) if own == style] for style in sorted(set(styles))}
    return {style: detection([corrupted[i] for i in own], [dropped[i] for i in own]) for style, own in rows.items()}


def margin(candidates: list[dict]) -> float:
    """By how much the best caption that was proposed beats the one that was there."""
    proposed, original = (
        max((candidate["score"] for candidate in candidates if candidate["is_original"] == is_original), default=-2.0)
        for is_original in (False, True)
    )
    return proposed - original


def clean(model, processor, rows: datasets.Dataset, folder: Path, seed: int) -> tuple[list[str], list[float]]:
    """The caption that is kept of each row, and by how much the best new one beats the one that was there."""
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

    key = made_of(settings, rows)
    begun = folder / "made_of.json"
    if folder.exists() and not (begun.exists() and json.loads(begun.read_text()) == key):
        sys.exit(f"{folder} holds parts that were made of other settings, pictures or types. Delete it to begin anew.")
    save_json(begun, key)
    names = [clean_caption(name) for name in rows["name"]]
    trusted = [row for row, style in enumerate(rows["style"]) if style in TRUSTED]
    others = [row for row, style in enumerate(rows["style"]) if style not in TRUSTED]

    def lesson_of(chosen: list[int], captions: list[str], name: str):
        """Of those rows, and a model after contrast."""
        transformers.set_seed(seed)
        model = make_model(settings)
        captioned = rows.select(chosen).add_column("caption", captions)
        lesson = Lesson(captioned, processor, settings, seed, folder / name, "caption")
        lesson.contrast(model)
        return model, lesson

    def learned_from(captions: dict[int, str], name: str) -> dict:
        """What contrast learns of the trusted styles and of the rows that have a caption here."""
        file = folder / f"{name}.json"
        if file.exists():
            return json.loads(file.read_text())
        texts = [names[row] for row in trusted] + list(captions.values())
        model, _ = lesson_of(trusted + list(captions), texts, name)
        right = sum(caption == names[row] for row, caption in captions.items()) / len(captions)
        result = {"drawings": len(captions), "right": right} | evaluate(model, processor, tests, contrast_only=True)
        save_json(file, result)
        return result

    def learned_from_trusted():
        """A model after all losses, and what it was worth after contrast."""
        file = folder / "trusted.pt"
        if file.exists():
            # Trained again it may end a little elsewhere, and what an earlier run has cleaned would be refused
            saved = torch.load(file, map_location="cpu", weights_only=True)
            model = make_model(settings)
            model.load_state_dict(saved["model"])
            return model.to(device_type()), saved["alone"]
        model, lesson = lesson_of(trusted, [names[row] for row in trusted], "trusted")
        alone = evaluate(model, processor, tests, contrast_only=True)
        lesson.all_losses(model)
        save_tensors(file, {"model": model.state_dict(), "alone": alone})
        return model, alone

    original = [names[row] for row in others]
    captions = shuffled(original, random.Random(seed))
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
