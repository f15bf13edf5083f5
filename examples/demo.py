"""
Teach a small BLIP-2 the names of things from two drawings of each, and let it caption a third drawing in a new style.

The vision tower is a frozen DINOv2-small, the language model a frozen SmolLM2-135M. The Q-Former between them learns
in minutes on a CPU:

1. The frozen tower's features of several versions of each picture are computed once, and stored.
2. In stage 1 the Q-Former alone learns by contrast, matching and captioning (ITC, ITM, ITG).
3. In stage 2 the frozen language model reads the queries and has to write the name.

    python examples/demo.py              # or: make demo
    python examples/demo.py --retrain    # replace the trained model of the last run
    python examples/demo.py --no-stage1  # stage 2 alone, to see what stage 1 adds
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import time
from functools import partial
from pathlib import Path

import datasets
import torch
import transformers
from demo_report import draw_sheet, nearest_neighbours, print_table, score, write_table
from picture_views import RandomView
from real_assets import cache_folder, real_assets
from tqdm import tqdm
from transformers import AutoTokenizer, Trainer, TrainingArguments, pipeline

# Not from transformers itself: in 5.17 that name needs torchvision
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from blip2_hf import Blip2ForConditionalGeneration, Blip2ForPreTraining, Blip2Processor
from blip2_hf.data import (
    ImageTextCollator,
    ImageTextPairs,
    SetEpochCallback,
    VisionTower,
    cache_features,
    load_cached_features,
    with_image_size,
)
from blip2_hf.evaluation import retrieval_recall
from blip2_hf.jobs.errors import tell_errors
from blip2_hf.models.losses import image_text_similarity


DATA = Path(__file__).parent / "data" / "emoji"
TRAIN_STYLES = ("noto", "twemoji")
# Two examples show the frozen language model what to do with a picture that reads like a word
PROMPT = "dog: dog\nred apple: red apple\n<image>:"
GROUPS = ("animal", "food-fruit", "food-vegetable", "food-prepared", "drink", "transport", "musical-instrument")
LAYER, QUERIES = 9, 8
# Parts of stage 1 without pretrained weights, which learn faster than the rest
NEW_PARTS = (
    "crossattention",
    "query_tokens",
    "_projection",
    "itm_head",
    "lm_head.transform",
    "post_layernorm",
    "_query",
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder of the model and the sheet")
    parser.add_argument("--concepts", type=int, default=120, help="how many things to learn the names of")
    parser.add_argument("--views", type=int, default=6, help="versions of each picture")
    parser.add_argument("--size", type=int, default=112, help="side of the pictures, in pixels")
    parser.add_argument("--stage1-steps", type=int, default=170, help="steps of the Q-Former alone")
    parser.add_argument("--stage2-steps", type=int, default=140, help="steps through the language model")
    parser.add_argument("--no-stage1", action="store_true", help="leave out stage 1")
    parser.add_argument("--validate", action="store_true", help="learn from Noto, test on Twemoji, to choose settings")
    parser.add_argument("--hub", action="store_true", help="take the pretrained parts from the Hub")
    parser.add_argument("--retrain", action="store_true", help="train again, even if there is a trained model")
    return parser.parse_args()


def load_pictures(arguments: argparse.Namespace, tokenizer) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Load two drawings of each thing for training, and a third in another style for the test."""
    files = {split: str(DATA / f"{split}.parquet") for split in ("train", "test")}
    pictures = datasets.load_dataset("parquet", data_files=files, cache_dir=str(cache_folder() / "datasets"))
    names = [
        row["name"]
        for row in pictures["test"].remove_columns("image")
        if row["subcategory"].startswith(GROUPS) and len(tokenizer(" " + row["name"])["input_ids"]) <= 3
    ]
    chosen = set(random.Random(0).sample(sorted(set(names)), arguments.concepts))
    styles = pictures["train"]["style"]
    pictures["train"] = pictures["train"].select([i for i, style in enumerate(styles) if style in TRAIN_STYLES])
    train, test = (
        pictures[split].select([i for i, name in enumerate(pictures[split]["name"]) if name in chosen])
        for split in ("train", "test")
    )
    if arguments.validate:
        test = train.select([i for i, style in enumerate(train["style"]) if style == "twemoji"])
        train = train.select([i for i, style in enumerate(train["style"]) if style == "noto"])
    return train.select_columns(["image", "name"]), test.select_columns(["image", "name"])


def stored_features(pictures: datasets.Dataset, assets, image_processor, views: int) -> datasets.Dataset:
    """Load the frozen tower's output for some views of each picture, and compute it first if it is not stored."""
    transform = RandomView()
    what = f"{pictures._fingerprint} {assets.vision_model} {image_processor.size} {views} {transform}"
    folder = cache_folder() / "features" / hashlib.sha256(what.encode()).hexdigest()[:16]
    tower = VisionTower(assets.vision_model, vision_feature_layer=LAYER).float()
    return load_cached_features(
        cache_features(pictures, tower, image_processor, folder, views=views, transform=transform)
    )


def train(model, pairs, collator, folder: Path, steps: int, batch_size: int, groups: list[dict]):
    settings = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        dataloader_drop_last=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.05)
    Trainer(
        model,
        settings,
        train_dataset=pairs,
        data_collator=collator,
        optimizers=(optimizer, None),
        callbacks=[SetEpochCallback()],
    ).train()


def train_stage1(model, features: datasets.Dataset, collator, arguments: argparse.Namespace):
    """Train by contrast, matching and captioning. Two drawings of one thing are no negatives of each other."""
    new, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (new if any(part in name for part in NEW_PARTS) else rest).append(parameter)
    groups = [{"params": new, "lr": 1e-3}, {"params": rest, "lr": 5e-4}]
    pairs = ImageTextPairs(features, text_column="name", id_column="name")
    train(model, pairs, collator, arguments.output / "stage1", arguments.stage1_steps, 32, groups)


@torch.no_grad()
def evaluate_stage1(model, test_features: datasets.Dataset, processor, collator) -> dict[str, dict[str, float]]:
    """Evaluate retrieval among the names by ITC, re-ranking by ITM, and the Q-Former's own captions (ITG)."""
    model.eval()
    pairs = ImageTextPairs(test_features, text_column="name", id_column="name", train=False)
    batch = collator(list(pairs))
    embeds, ids, mask = batch["image_embeds"], batch["input_ids"], batch["attention_mask"]
    outputs = model(image_embeds=embeds, input_ids=ids, attention_mask=mask, return_loss=False)
    similarity = image_text_similarity(outputs.image_features, outputs.text_features)
    truth = torch.eye(len(ids), dtype=torch.bool)
    tokens = model.generate(image_embeds=embeds, max_new_tokens=8, do_sample=False)
    # Names as the tokenizer spells them, without capitals and with spaces around hyphens
    captions, names = (processor.tokenizer.batch_decode(x, skip_special_tokens=True) for x in (tokens, ids))
    return {
        "ITC": retrieval_recall(similarity, truth, k=(1,)),
        "ITC, re-ranked by ITM": {"image_to_text_r1": reranked_recall(model, batch, similarity)},
        "captions by ITG": score(captions, names),
    }


def reranked_recall(model, batch: dict[str, torch.Tensor], similarity: torch.Tensor, candidates: int = 5) -> float:
    """Compute the share of images whose own text is the first candidate by ITM's logit of "match" plus the cosine."""
    cosines, texts = similarity.topk(candidates, dim=1)
    scores = []
    for index in texts.unbind(dim=1):
        pairs = {name: batch[name][index] for name in ("input_ids", "attention_mask")}
        logits = model(image_embeds=batch["image_embeds"], **pairs).itm_logits
        # The given pairs come first, then those with the negatives that the model draws
        scores.append(logits[: len(texts), 1])
    best = (torch.stack(scores, dim=1) + cosines).argmax(dim=1, keepdim=True)
    return (texts.gather(1, best)[:, 0] == torch.arange(len(texts))).double().mean().item()


@torch.no_grad()
def start_projection(model, features: datasets.Dataset, tokenizer):
    """
    Initialise the projection, which stage 1 does not have, by least squares.

    It maps the queries of each training picture to the mean word embedding of its name, and is scaled to the standard
    deviation of word embeddings. This takes a second, and does not run the language model.
    """
    model.eval()
    pairs = ImageTextPairs(features, text_column="name", clean_text=False)
    embeds = torch.stack([pair["image_embeds"] for pair in pairs])
    queries = model.get_image_features(image_embeds=embeds).qformer_outputs.last_hidden_state
    words = model.get_input_embeddings().weight
    targets = torch.stack([words[tokenizer(" " + name)["input_ids"]].mean(dim=0) for name in features["name"]])
    middle, target_middle = queries.mean(dim=(0, 1)), targets.mean(dim=0)
    queries = (queries - middle).flatten(0, 1)
    targets = (targets - target_middle).repeat_interleave(model.config.num_query_tokens, dim=0)
    ridge = 0.1 * len(queries) * queries.var() * torch.eye(queries.shape[1])
    weight = torch.linalg.solve(queries.T @ queries + ridge, queries.T @ targets)
    weight *= targets.std() / (queries @ weight).std()
    model.language_projection.weight.copy_(weight.T)
    model.language_projection.bias.copy_(target_middle - middle @ weight)


def collate_names(rows: list[dict], processor, mixed: float = 0.5) -> dict[str, torch.Tensor]:
    """Collate prompts, names and features, and mix up to `mixed` of another picture's features into each picture's."""
    text = processor(text=[PROMPT] * len(rows), text_target=[row["text"] for row in rows], return_tensors="pt")
    embeds = torch.stack([row["image_embeds"] for row in rows]).float()
    # Because queries of new pictures lie between those of the training pictures
    own = 1 - mixed * torch.rand(len(rows), 1, 1)
    return {"image_embeds": own * embeds + (1 - own) * embeds.roll(1, dims=0), **text}


def train_stage2(model, features: datasets.Dataset, processor, arguments: argparse.Namespace):
    start_projection(model, features, processor.tokenizer)
    projection = list(model.language_projection.parameters())
    chosen = set(projection)
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in chosen]
    groups = [{"params": projection, "lr": 1e-3}, {"params": rest, "lr": 1e-4}]
    pairs = ImageTextPairs(features, text_column="name", clean_text=False)
    collate = partial(collate_names, processor=processor)
    train(model, pairs, collate, arguments.output / "stage2", arguments.stage2_steps, 16, groups)


def trained_model(arguments: argparse.Namespace, folder: Path, assets, processor, train_features, test_features):
    """Train and save a model, unless the last run did so with the same settings. Return the results of stage 1."""
    settings = {k: str(v) for k, v in vars(arguments).items() if k not in ("output", "retrain")}
    last = json.loads((folder / "demo.json").read_text()) if (folder / "demo.json").exists() else {}
    if last.get("settings") == settings and not arguments.retrain:
        print(f"\nThe model of the last run is used ({folder}). --retrain trains another.")
        return last["rows"]
    model = Blip2ForPreTraining.from_encoders_pretrained(
        assets.vision_model,
        assets.text_encoder,
        vision_feature_layer=LAYER,
        num_query_tokens=QUERIES,
        load_vision_tower=False,
        # In every layer instead of every second one as in the paper: the faster learning outweighs the cost
        cross_attention_frequency=1,
        # Dropout takes a tenth of the time, and did not help in so short a training
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    # They are half of the weights, and a hundred names teach them little
    model.embeddings.word_embeddings.requires_grad_(False)
    qformer_processor = Blip2Processor(
        processor.image_processor, AutoTokenizer.from_pretrained(assets.text_encoder), num_query_tokens=QUERIES
    )
    collator = ImageTextCollator(qformer_processor)
    evaluate = partial(evaluate_stage1, model, test_features, qformer_processor, collator)
    rows = {"before training: ITC": evaluate()["ITC"]}
    if not arguments.no_stage1:
        print(f"\nStage 1: contrast, matching and captioning by the Q-Former: {arguments.stage1_steps} steps")
        train_stage1(model, train_features, collator, arguments)
        rows |= {f"stage 1: {name}": values for name, values in evaluate().items()}
        print_table(rows, len(test_features))
    print(f"\nStage 2: the frozen language model reads the queries and writes: {arguments.stage2_steps} steps")
    model = Blip2ForConditionalGeneration.from_pretrained_parts(
        stage1=model, language_model=assets.language_model, vision_model=assets.vision_model
    ).float()
    train_stage2(model, train_features, processor, arguments)
    saved = folder.with_name(folder.name + ".part")
    shutil.rmtree(saved, ignore_errors=True)
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    (saved / "demo.json").write_text(json.dumps({"settings": settings, "rows": rows}))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(saved, folder)
    return rows


def main():
    start, arguments = time.time(), parse_arguments()
    transformers.set_seed(0)
    # MiniLM has no head for masked words, so the report of missing weights says nothing
    transformers.logging.set_verbosity_error()
    print("The pretrained parts:")
    assets = real_assets(hub=arguments.hub)
    tokenizer = AutoTokenizer.from_pretrained(assets.language_model)
    image_processor = with_image_size(AutoImageProcessor.from_pretrained(assets.vision_model), arguments.size)
    processor = Blip2Processor(image_processor, tokenizer, num_query_tokens=QUERIES, prompt=PROMPT)
    pictures, test = load_pictures(arguments, tokenizer)
    print(f"{len(pictures)} training pictures of {arguments.concepts} things, and {len(test)} test pictures")
    train_features = stored_features(pictures, assets, image_processor, arguments.views)
    test_features = stored_features(test, assets, image_processor, 1)

    folder = arguments.output / "model"
    rows = trained_model(arguments, folder, assets, processor, train_features, test_features)
    captioner = pipeline("image-to-text", model=str(folder))
    print("\nCaptioning the test pictures:")
    images = (row["image"] for row in tqdm(test, unit="picture"))
    outputs = captioner(images, max_new_tokens=8, batch_size=16)
    # A name is one line
    captions = [output[0]["generated_text"].split("\n")[0].strip() for output in outputs]
    print(f"\n{'caption':28} truth")
    for caption, truth in list(zip(captions, test["name"], strict=True))[:16]:
        print(f"{caption:28} {truth}{'' if caption == truth else '   <-'}")
    neighbours = nearest_neighbours(train_features, test_features)
    rows["stage 2 without stage 1: captions" if arguments.no_stage1 else "stage 2: captions"] = score(
        captions, test["name"]
    )
    rows["nearest neighbour in the frozen tower"] = score(neighbours, test["name"])
    rows["one name for all"] = score([test[0]["name"]] * len(test), test["name"])
    print_table(rows, len(test))
    write_table(rows, len(test), arguments.output / "table.md")
    draw_sheet(test, captions, arguments.output / "captions.png")
    print(f"\nThe table and the pictures: {arguments.output}/table.md, {arguments.output}/captions.png")
    print(f"{time.time() - start:.0f} seconds in all")


if __name__ == "__main__":
    with tell_errors("demo.py"):
        main()
