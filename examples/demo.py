"""
Teach a small BLIP-2 to describe scenes of drawings, and let it caption, search and answer questions about new ones.

The vision tower is a frozen EfficientNet-lite2, the language model a frozen SmolLM2-135M. The Q-Former between them
learns in minutes on a CPU:

1. Scenes are made of drawings ("a fox to the left of a drum"), and the frozen tower's features of each are stored.
2. In stage 1 the Q-Former alone learns by contrast, matching and captioning (ITC, ITM, ITG).
3. In stage 2 the frozen language model reads the queries, and has to write the caption or the answer to a question.

    python examples/demo.py              # or: make demo
    python examples/demo.py --retrain    # replace the trained models of the last run
"""

import argparse
import json
import time
from pathlib import Path

import datasets
import efficientnet_lite
import torch
import transformers
from demo_report import (
    draw_sheet,
    find_scenes,
    nearest_neighbours,
    print_table,
    score_captions,
    score_retrieval,
    write_table,
)
from precision import fast_dtype
from real_assets import cache_folder, real_assets
from scene_training import (
    NEW_PARTS,
    QFORMER,
    ChosenLosses,
    LearnsFromTwins,
    caption_embeddings,
    save_as_library_class,
    set_training_attention,
    stack_features,
    start_projection,
    train,
)
from scenes import STYLES, make_scenes
from torch.utils.data import ConcatDataset
from transformers import AutoTokenizer, pipeline

# Not from transformers itself: in 5.17 that name needs torchvision
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from blip2_hf import Blip2ForConditionalGeneration, Blip2ForPreTraining, Blip2Processor
from blip2_hf.data import (
    ImageTextCollator,
    ImageTextPairs,
    LanguageModelCollator,
    VisionTower,
    cache_features,
    load_cached_features,
)
from blip2_hf.jobs.errors import tell_errors
from blip2_hf.jobs.fingerprints import fingerprint
from blip2_hf.models.frozen import cast_parameters
from blip2_hf.training import Stage1Arguments, Stage2Arguments


QUERIES, TEST = 8, 120
BATCH = 64  # scenes of a step by ITC and ITG
NEXT = """
    blip2-hf caption {folder}/scenes --model {folder}/model
    blip2-hf ask {folder}/scenes/000.png "{what}" "{how_many}" --model {folder}/model
    blip2-hf index {folder}/scenes --model {folder}/retriever
    blip2-hf search "{caption}" --index {folder}/scenes
    blip2-hf look {folder}/scenes/000.png "{caption}" --model {folder}/retriever --output look.png"""
PROMPT, QUESTION_PROMPT = "a picture of", "Question: {} Answer:"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder of the models and the sheet")
    parser.add_argument("--scenes", type=int, default=5000, help="scenes to learn from")
    parser.add_argument("--stage1-steps", type=int, default=220, help=f"steps by ITC and ITG, {BATCH} scenes each")
    parser.add_argument(
        "--matching-steps", type=int, default=90, help="steps by ITC, ITM and ITG that follow, 32 each"
    )
    parser.add_argument("--stage2-steps", type=int, default=230, help="steps of stage 2, 32 texts each")
    parser.add_argument("--retrain", action="store_true", help="train again, even if there is a trained model")
    arguments = parser.parse_args()
    if arguments.scenes < BATCH:
        # Trainer leaves out a batch that is not full, and would learn nothing without a word
        parser.error(f"--scenes {arguments.scenes}: a step of stage 1 takes {BATCH} scenes, so give {BATCH} at least.")
    return arguments


def load_features(scenes: datasets.Dataset, name: str) -> datasets.Dataset:
    """Load the frozen tower's output for each scene, and compute it first if it is not stored."""
    # Not _fingerprint of datasets, which may differ for equal rows
    contents = fingerprint(repr(row).encode() for row in scenes.with_format("arrow")[:].to_pylist())
    folder = cache_folder() / "features" / f"demo {name} {contents}"
    tower = VisionTower(efficientnet_lite.pretrained_folder())
    processor = AutoImageProcessor.from_pretrained(efficientnet_lite.pretrained_folder())
    return load_cached_features(
        cache_features(scenes, tower.to(fast_dtype(), memory_format=torch.channels_last), processor, folder)
    )


def train_stage1(features: datasets.Dataset, assets, arguments: argparse.Namespace):
    """
    Train by contrast and captioning, and then by matching too, which takes half of a step.

    Scenes with equal captions are no negatives of each other.
    """
    processor = Blip2Processor(
        AutoImageProcessor.from_pretrained(efficientnet_lite.pretrained_folder()),
        AutoTokenizer.from_pretrained(assets.text_encoder),
        num_query_tokens=QUERIES,
    )
    pairs = ImageTextPairs(features, text_column="caption", id_column="caption")
    model = ChosenLosses.from_encoders_pretrained(
        efficientnet_lite.pretrained_folder(),
        assets.text_encoder,
        num_query_tokens=QUERIES,
        **QFORMER,
    )
    set_training_attention(model)
    # They are half of the weights, and some sixty names teach them little
    model.embeddings.word_embeddings.requires_grad_(False)
    folder, collator = arguments.output / "stage1", ImageTextCollator(processor)
    for losses, steps, batch_size, (rate, new_rate) in (
        (("itc", "itg"), arguments.stage1_steps, BATCH, (3e-4, 5e-4)),
        (("itc", "itm", "itg"), arguments.matching_steps, 32, (4e-4, 8e-4)),
    ):
        model.losses = losses
        options = (folder, Stage1Arguments, steps, batch_size, rate, NEW_PARTS, new_rate, LearnsFromTwins)
        train(model, pairs, collator, *options)
    save_as_library_class(model, arguments.output / "retriever")
    processor.save_pretrained(arguments.output / "retriever")


def train_stage2(features: datasets.Dataset, assets, arguments: argparse.Namespace):
    """Train through the frozen language model, on captions and on questions with their answers."""
    model = Blip2ForConditionalGeneration.from_pretrained_parts(
        stage1=arguments.output / "retriever", language_model=assets.language_model
    )
    model.float()
    cast_parameters(model.language_model, fast_dtype())
    set_training_attention(model)
    tokenizer = AutoTokenizer.from_pretrained(assets.language_model)
    few = features.select(range(min(1500, len(features))))
    start_projection(model, stack_features(few), caption_embeddings(model, tokenizer, few["caption"]))
    processor = Blip2Processor(
        AutoImageProcessor.from_pretrained(efficientnet_lite.pretrained_folder()),
        tokenizer,
        num_query_tokens=QUERIES,
        prompt=PROMPT,
    )
    # Of each third scene, one of all kinds in turn, because captions are harder and need most of the steps
    asked = [(row, several[row // 3 % len(several)]) for row, several in enumerate(features["questions"])][::3]
    questions = datasets.Dataset.from_list([{"image": row, **question} for row, question in asked])
    captions = {"text_column": "caption", "prompt": PROMPT, "clean_text": False, "source": "captions"}
    answers = {"text_column": "answer", "prompt": QUESTION_PROMPT, "prompt_column": "question", "images": features}
    answers["source"] = "questions"
    pairs = ConcatDataset([ImageTextPairs(features, **captions), ImageTextPairs(questions, **answers)])
    folder, steps, new_parts = arguments.output / "stage2", arguments.stage2_steps, ("language_projection",)
    collator = LanguageModelCollator(processor)
    train(model, pairs, collator, folder, Stage2Arguments, steps, 32, 4e-4, new_parts, 2e-3)
    model.save_pretrained(arguments.output / "model")
    processor.save_pretrained(arguments.output / "model")


def save_scenes(scenes: datasets.Dataset, folder: Path) -> Path:
    """Write the pictures as files, for commands to read."""
    (folder / "scenes").mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(scenes["image"]):
        image.save(folder / "scenes" / f"{number:03}.png")
    return folder / "scenes"


def train_models(features: datasets.Dataset, assets, arguments: argparse.Namespace):
    """Train and save both models, unless a run with the same settings has done so."""
    settings = {name: value for name, value in vars(arguments).items() if name not in ("output", "retrain")}
    record = arguments.output / "demo.json"
    done = json.loads(record.read_text()) if record.exists() and not arguments.retrain else {}
    done = done if done.get("settings") == settings else {"settings": settings, "stages": 0}
    if done["stages"] < 1:
        steps = f"{arguments.stage1_steps} steps, and {arguments.matching_steps} with matching"
        print(f"\nStage 1: contrast and captioning by the Q-Former: {steps}")
        train_stage1(features, assets, arguments)
        record.write_text(json.dumps(done | {"stages": 1}))
    if done["stages"] < 2:
        print(f"\nStage 2: the frozen language model reads the queries and writes: {arguments.stage2_steps} steps")
        train_stage2(features, assets, arguments)
        record.write_text(json.dumps(done | {"stages": 2}))
    else:
        print(f"\nThe models of the last run are used ({arguments.output}). --retrain trains others.")


def main():
    start, arguments = time.time(), parse_arguments()
    transformers.set_seed(0)
    # MiniLM has no head for masked words, so the report of missing weights says nothing
    transformers.logging.set_verbosity_error()
    print("The pretrained parts:")
    assets = real_assets()
    # Without the twins of the test scenes, so that the sheet shows more things
    test = make_scenes(STYLES, 2 * TEST, "test").select(range(0, 2 * TEST, 2))
    scenes = make_scenes(STYLES, arguments.scenes, "train")
    print(f"{len(scenes)} scenes to learn from, and {len(test)} new ones")
    features, test_features = load_features(scenes, "train"), load_features(test, "test")
    train_models(features, assets, arguments)

    captioner = pipeline("image-to-text", model=str(arguments.output / "model"))
    captions = [found[0]["generated_text"] for found in captioner(list(test["image"]), batch_size=20)]
    retriever = Blip2ForPreTraining.from_pretrained(arguments.output / "retriever")
    tokenizer = AutoTokenizer.from_pretrained(arguments.output / "retriever")
    rows = score_retrieval(retriever, tokenizer, test_features)
    rows["stage 2: captions by the language model"] = score_captions(captions, test)
    rows["nearest neighbour in the frozen tower"] = score_captions(nearest_neighbours(features, test_features), test)
    print_table(rows)
    write_table(rows, arguments.output / "table.md")
    found = find_scenes(retriever, tokenizer, test_features)
    draw_sheet(test, captions, found, arguments.output / "captions.png")
    print(f"\nThe table and the sheet: {arguments.output}/table.md, {arguments.output}/captions.png")
    print(f"{time.time() - start:.0f} seconds in all. Next, with the scenes in {save_scenes(test, arguments.output)}:")
    first = test[0]
    # Of several questions of a kind the first, which is about a thing that is there
    asked = {question["kind"].replace(" ", "_"): question["question"] for question in reversed(first["questions"])}
    print(NEXT.format(folder=arguments.output, caption=first["caption"], **asked))


if __name__ == "__main__":
    with tell_errors("demo.py"):
        main()
