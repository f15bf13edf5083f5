"""
Teach a small BLIP-2 the names of things, from two drawings of each, and let it caption a third that it has not seen.

A frozen DINOv2-small looks, a frozen SmolLM2-135M speaks, and a Q-Former between them learns in minutes on a CPU:

1. the frozen tower's features are computed once, several versions of each picture, and kept;
2. the queries are pulled towards the language model's word embeddings of the names, without running the language model
   (a stand-in for the paper's stage 1);
3. stage 2: the language model, frozen, reads the queries and has to write the name.

    python examples/demo.py            # or: make demo
    python examples/demo.py --retrain  # forget the trained model of the last run
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import time
from pathlib import Path

import datasets
import torch
import transformers
from contact_sheet import Card, Section, draw_contact_sheet
from PIL import Image, ImageEnhance, ImageOps
from real_assets import cache_folder, real_assets
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoTokenizer, Trainer, TrainingArguments, pipeline

import blip2_hf


DATA = Path(__file__).parent / "data" / "emoji"
# An example of what is wanted: without it the language model takes far longer to learn that it is to name the picture
PROMPT = "dog = dog\n<image> ="
GROUPS = ("animal", "food-fruit", "food-vegetable", "food-prepared", "drink", "transport", "musical-instrument")
TOWER = {"num_query_tokens": 4, "vision_feature_layer": 9}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder of the model and the sheet")
    parser.add_argument("--concepts", type=int, default=120, help="how many things to learn the names of")
    parser.add_argument("--views", type=int, default=6, help="versions of each picture")
    parser.add_argument("--size", type=int, default=112, help="side of the pictures, in pixels")
    parser.add_argument("--align-steps", type=int, default=250, help="steps without the language model")
    parser.add_argument("--steps", type=int, default=220, help="steps through the language model")
    parser.add_argument("--hub", action="store_true", help="take the pretrained parts from the Hub")
    parser.add_argument("--retrain", action="store_true", help="train again, although there is a trained model")
    return parser.parse_args()


def load_pictures(num_concepts: int, tokenizer) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Two drawings of each thing to learn from, a third, of another hand, to be tested on."""
    files = {split: str(DATA / f"{split}.parquet") for split in ("train", "test")}
    pictures = datasets.load_dataset("parquet", data_files=files, cache_dir=str(cache_folder() / "datasets"))
    names = [
        row["name"]
        for row in pictures["test"].remove_columns("image")
        if row["subcategory"].startswith(GROUPS) and len(tokenizer(" " + row["name"])["input_ids"]) <= 3
    ]
    chosen = set(random.Random(0).sample(sorted(set(names)), num_concepts))
    keep = {split: [i for i, name in enumerate(pictures[split]["name"]) if name in chosen] for split in files}
    return pictures["train"].select(keep["train"]), pictures["test"].select(keep["test"])


def random_view(image: Image.Image, generator: random.Random) -> Image.Image:
    """The picture, mirrored or not, turned a little, nearer or farther, in other colours."""
    white, side = (255, 255, 255), 160
    image = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    image = ImageOps.mirror(image) if generator.random() < 0.5 else image
    image = image.rotate(generator.uniform(-15, 15), Image.Resampling.BICUBIC, fillcolor=white)
    zoom = generator.uniform(0.8, 1.25)
    x, y = (side / 2 + generator.uniform(-0.1, 0.1) * side - zoom * side / 2 for _ in range(2))
    window = (zoom, 0, x, 0, zoom, y)
    image = image.transform(image.size, Image.Transform.AFFINE, window, Image.Resampling.BICUBIC, fillcolor=white)
    changes = ((ImageEnhance.Color, 0.6, 1.4), (ImageEnhance.Brightness, 0.8, 1.1), (ImageEnhance.Contrast, 0.8, 1.2))
    for change, low, high in changes:
        image = change(image).enhance(generator.uniform(low, high))
    return image


@torch.no_grad()
def tower_features(model, processor, pictures: datasets.Dataset, views: int) -> torch.Tensor:
    """`(pictures, views, features, width)` of the frozen tower: the whole picture, then crops of it."""
    generator, features = random.Random(0), []
    for row in tqdm(pictures, desc="looking at the pictures, once", unit="picture"):
        images = [row["image"]] + [random_view(row["image"], generator) for _ in range(views - 1)]
        features.append(model.get_image_embeds(processor(images=images, return_tensors="pt")["pixel_values"]))
    return torch.stack(features).to(torch.float16)


def cached_features(model, processor, pictures, views: int, size: int) -> torch.Tensor:
    what = json.dumps([pictures._fingerprint, views, size, TOWER, model.vision_model.config.to_dict()], default=str)
    file = cache_folder() / "features" / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.safetensors"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"features": tower_features(model, processor, pictures, views)}, f"{file}.part")
        os.replace(f"{file}.part", file)
    return load_file(file)["features"]


class Features(torch.utils.data.Dataset):
    """The stored features of one random view of each picture, with its name."""

    def __init__(self, features: torch.Tensor, names: list[str]):
        self.features, self.names = features, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        view = random.randrange(self.features.shape[1])
        return {"image_embeds": self.features[index, view].float(), "name": self.names[index]}


class NamingTrainer(Trainer):
    """
    Contrasts each of an image's projected queries with the word embeddings of all names; and, once the batch has text,
    lets the language model write the name.
    """

    def set_names(self, names: list[str], tokenizer):
        embeddings = self.model.get_input_embeddings().weight.detach()
        words = torch.stack([embeddings[tokenizer(" " + name)["input_ids"]].mean(0) for name in names])
        self.words = normalize(words - words.mean(0), dim=-1)
        return self

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        image_embeds, targets = inputs.pop("image_embeds"), inputs.pop("targets")
        features = model.get_image_features(image_embeds=image_embeds).pooler_output
        similarity = (normalize(features, dim=-1) @ self.words.T).transpose(1, 2)
        targets = targets[:, None].expand(-1, features.shape[1])
        loss = cross_entropy(similarity / 0.07, targets, label_smoothing=0.1)
        return loss + model(image_features=features, **inputs).loss if inputs else loss


def training_arguments(folder: Path, steps: int, batch_size: int) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        logging_steps=25,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )


def train(model, processor, dataset: Features, arguments: argparse.Namespace):
    names = sorted(set(dataset.names))

    def collate(rows):
        embeds = torch.stack([row["image_embeds"] for row in rows])
        return {"image_embeds": embeds, "targets": torch.tensor([names.index(row["name"]) for row in rows])}

    def collate_with_text(rows):
        text = processor(text=[PROMPT] * len(rows), text_target=[row["name"] for row in rows], return_tensors="pt")
        return {**collate(rows), **text}

    def run(name: str, steps: int, batch_size: int, rates: tuple[float, float], collator):
        settings = training_arguments(arguments.output / name, steps, batch_size)
        projection = set(model.language_projection.parameters())
        rest = [p for p in model.parameters() if p.requires_grad and p not in projection]
        groups = [{"params": list(projection), "lr": rates[0]}, {"params": rest, "lr": rates[1]}]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.05)
        trainer = NamingTrainer(
            model, settings, train_dataset=dataset, data_collator=collator, optimizers=(optimizer, None)
        )
        trainer.set_names(names, processor.tokenizer).train()

    print(f"\nPulling the queries towards the names, without the language model: {arguments.align_steps} steps")
    run("align", arguments.align_steps, 48, (1e-3, 3e-4), collate)
    match_scale(model, torch.stack([dataset[i]["image_embeds"] for i in range(16)]))
    print(f"\nStage 2: the frozen language model reads the queries and writes the name: {arguments.steps} steps")
    run("stage2", arguments.steps, 16, (1e-3, 1e-4), collate_with_text)


@torch.no_grad()
def match_scale(model, image_embeds: torch.Tensor):
    """Gives the projected queries the spread of word embeddings, which the contrast of directions says nothing of."""
    spread = model.get_image_features(image_embeds=image_embeds).pooler_output.std()
    factor = model.get_input_embeddings().weight.std() / spread
    for parameter in model.language_projection.parameters():
        parameter.mul_(factor)


def nearest_neighbours(train_features, train_names: list[str], test_features) -> list[str]:
    """The name of the training picture that the frozen tower finds most alike (both sets centred): no learning."""
    train_means, test_means = (features[:, 0].float().mean(dim=1) for features in (train_features, test_features))
    train_means, test_means = (normalize(means - means.mean(dim=0), dim=-1) for means in (train_means, test_means))
    return [train_names[i] for i in (test_means @ train_means.T).argmax(dim=1).tolist()]


def score(captions: list[str], truths: list[str]) -> dict[str, float]:
    """Share of captions that are the name, and that share a word with it."""
    pairs = list(zip(captions, truths, strict=True))
    return {
        "exact": sum(caption == truth for caption, truth in pairs) / len(pairs),
        "shares a word": sum(bool(set(c.split()) & set(t.split())) for c, t in pairs) / len(pairs),
    }


def trained_model(arguments: argparse.Namespace, folder: Path, assets, processor, pictures) -> None:
    """Trains and saves a model, unless the last run has saved one with the same settings."""
    settings = {k: str(v) for k, v in vars(arguments).items() if k not in ("output", "retrain")}
    last = json.loads((folder / "demo.json").read_text()) if (folder / "demo.json").exists() else None
    if last == settings and not arguments.retrain:
        print(f"\nThe model of the last run is there ({folder}); --retrain trains another.")
        return
    model = blip2_hf.Blip2ForConditionalGeneration.from_pretrained_parts(**assets._asdict(), **TOWER).float()
    features = cached_features(model, processor, pictures, arguments.views, arguments.size)
    train(model, processor, Features(features, pictures["name"]), arguments)
    saved = folder.with_name(folder.name + ".part")
    shutil.rmtree(saved, ignore_errors=True)
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    (saved / "demo.json").write_text(json.dumps(settings))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(saved, folder)


def report(
    arguments: argparse.Namespace, test: datasets.Dataset, captions: list[str], baselines: dict[str, list[str]]
):
    print(f"\n{'caption':28} truth")
    for caption, truth in list(zip(captions, test["name"], strict=True))[:16]:
        print(f"{caption:28} {truth}{'' if caption == truth else '   <-'}")
    print(f"\n{len(test)} drawings of a hand not seen in training   exact   shares a word")
    for name, texts in {"BLIP-2 of this demo": captions, **baselines}.items():
        values = score(texts, test["name"])
        print(f"{name:44} {values['exact']:8.1%} {values['shares a word']:12.1%}")
    cards = [Card(row["image"], text, row["name"]) for row, text in zip(test, captions, strict=True)]
    right = sum(card.right for card in cards)
    note = f"{right} of {len(cards)} named exactly; the first {min(40, len(cards))} are here"
    section = Section("Drawings of a hand that it has not seen", note, cards[:40])
    sheet = draw_contact_sheet("What is it?", "DINOv2-small, a Q-Former trained in minutes, SmolLM2-135M", [section])
    sheet.save(arguments.output / "captions.png")
    print(f"\nThe sheet: {arguments.output / 'captions.png'}")


def main():
    start, arguments = time.time(), parse_arguments()
    transformers.set_seed(0)
    print("The pretrained parts:")
    assets = real_assets(hub=arguments.hub)
    tokenizer = AutoTokenizer.from_pretrained(assets.language_model)
    square = {"height": arguments.size, "width": arguments.size}
    image_processor = AutoImageProcessor.from_pretrained(assets.vision_model, size=square, do_center_crop=False)
    processor = blip2_hf.Blip2Processor(image_processor, tokenizer, num_query_tokens=TOWER["num_query_tokens"])
    pictures, test = load_pictures(arguments.concepts, tokenizer)
    print(f"{len(pictures)} pictures of {arguments.concepts} things to learn from, {len(test)} to be tested on")

    folder = arguments.output / "model"
    trained_model(arguments, folder, assets, processor, pictures)
    captioner = pipeline("image-to-text", model=str(folder))
    print("\nCaptioning the pictures that it has not seen:")
    images = (row["image"] for row in tqdm(test, unit="picture"))
    outputs = captioner(images, prompt=PROMPT, max_new_tokens=8, batch_size=16)
    # A name is one line
    captions = [output[0]["generated_text"].split("\n")[0].strip() for output in outputs]

    model = captioner.model
    train_features = cached_features(model, processor, pictures, arguments.views, arguments.size)
    test_features = cached_features(model, processor, test, 1, arguments.size)
    neighbours = nearest_neighbours(train_features, pictures["name"], test_features)
    report(
        arguments,
        test,
        captions,
        {"nearest neighbour in the frozen tower": neighbours, "one name for all": [test["name"][0]] * len(test)},
    )
    print(f"{time.time() - start:.0f} seconds in all")


if __name__ == "__main__":
    main()
