"""
Train and test a small BLIP-2 on questions about pictures of one coloured shape (easy-VQA, MIT licence).

A Q-Former learns to join a frozen DINOv2-small and a frozen SmolLM2-135M. Data, features, training and test are one
command:

    python examples/easy_vqa.py          # about half an hour on two CPU cores

The training is `finetune_vqa.py`, and its command is printed. What exists already is not made again.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import torch
from precision import fast_dtype, training_attention
from real_assets import cache_folder, download, real_assets, unpack
from transformers import AutoTokenizer

# Not from transformers itself: in 5.17 that name needs torchvision
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from blip2_hf import Blip2ForConditionalGeneration, Blip2Processor
from blip2_hf.data import VisionTower, cache_features, with_image_size
from blip2_hf.jobs.errors import tell_errors


LAYER, SIZE = 9, 112
FILES = {"train": "train-balanced.parquet", "validation": "validation.parquet", "test": "test.parquet"}
SHAPES = ("circle", "triangle", "rectangle")


def type_of(question: str, answer: str) -> str:
    """Return the type of a question: shape, colour, or yes/no about one of these."""
    if answer in ("yes", "no"):
        return "yes/no, shape" if any(shape in question for shape in SHAPES) else "yes/no, colour"
    return "shape" if answer in SHAPES else "colour"


def balance_yes_and_no(rows: list[dict]) -> list[dict]:
    """
    Leave out questions until each type has as many with "yes" as with "no".

    "No" is right for seven of eight questions about a colour. A model that learns this first has little reason to
    learn the comparison.
    """
    chosen = random.Random(0).sample(rows, len(rows))
    kept = []
    for kind in dict.fromkeys(row["type"] for row in rows):
        of_kind = [row for row in chosen if row["type"] == kind]
        if kind.startswith("yes/no"):
            yes, no = ([row for row in of_kind if row["answer"] == answer] for answer in ("yes", "no"))
            of_kind = [*yes, *no][: 2 * len(yes)]
        kept += of_kind
    return random.Random(1).sample(kept, len(kept))


def make_data(folder: Path):
    """Write questions and pictures of the package's own splits. A fortieth of the training pictures is held out."""
    with tempfile.TemporaryDirectory() as work:
        source = unpack(download("easy_vqa", Path(work)), Path(work) / "wheel") / "easy_vqa" / "data"
        for split in ("train", "test"):
            questions = json.loads((source / split / "questions.json").read_text())
            files = (source / split / "images" / f"{i}.png" for i in range(max(q[2] for q in questions) + 1))
            pictures = [{"image": {"bytes": file.read_bytes(), "path": None}} for file in files]
            features = datasets.Features({"image": datasets.Image()})
            datasets.Dataset.from_list(pictures, features=features).to_parquet(folder / f"images-{split}.parquet")
            rows = [
                {"image": image, "question": question, "answer": answer, "type": type_of(question, answer)}
                for question, answer, image in questions
            ]
            for part in ("train", "validation") if split == "train" else ("test",):
                chosen = [row for row in rows if part == "test" or (row["image"] % 40 == 0) == (part == "validation")]
                if part == "train":
                    chosen = balance_yes_and_no(chosen)
                datasets.Dataset.from_list(chosen).to_parquet(folder / FILES[part])


def make_features(folder: Path, assets, image_processor):
    tower = VisionTower(assets.vision_model, vision_feature_layer=LAYER).float()
    for split in ("train", "test"):
        pictures = datasets.load_dataset("parquet", data_files=str(folder / f"images-{split}.parquet"), split="train")
        cache_features(pictures, tower, image_processor, folder / f"features-{split}")


def make_model(folder: Path, assets, image_processor):
    """Join the pretrained parts, and save the untrained model."""
    tokenizer = AutoTokenizer.from_pretrained(assets.language_model)
    text_tokenizer = AutoTokenizer.from_pretrained(assets.text_encoder)
    processor = Blip2Processor(image_processor, tokenizer, text_tokenizer, num_query_tokens=4)
    model = Blip2ForConditionalGeneration.from_pretrained_parts(
        vision_model=assets.vision_model,
        text_encoder=assets.text_encoder,
        language_model=assets.language_model,
        vision_feature_layer=LAYER,
        num_query_tokens=4,
        instruction_aware=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--output", type=Path, default=Path("outputs/easy_vqa"), help="folder of the trained model")
    parser.add_argument("--hub", action="store_true", help="take the pretrained parts from the Hub")
    parser.add_argument("options", nargs="*", help="for finetune_vqa.py, after --, such as -- --max_steps 100")
    arguments = parser.parse_args()
    folder = cache_folder() / "easy_vqa"
    folder.mkdir(parents=True, exist_ok=True)
    assets = real_assets(hub=arguments.hub)
    image_processor = with_image_size(AutoImageProcessor.from_pretrained(assets.vision_model), SIZE)
    if not all((folder / file).exists() for file in FILES.values()):
        make_data(folder)
    make_features(folder, assets, image_processor)
    if not (folder / "model" / "processor_config.json").exists():
        torch.manual_seed(0)
        make_model(folder / "model", assets, image_processor)
    dtype = fast_dtype()
    settings = {
        "model": folder / "model",
        "data": folder / FILES["train"],
        "images": folder / "features-train",
        "validation": folder / FILES["validation"],
        "validation_images": folder / "features-train",
        "test": folder / FILES["test"],
        "test_images": folder / "features-test",
        "group_by": "type",
        "preset": "stage2",
        "image_size": SIZE,
        "attn_implementation": training_attention(),
        "bf16": dtype == torch.bfloat16,
        "language_model_dtype": str(dtype).removeprefix("torch."),
        "use_cpu": not torch.cuda.is_available(),
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 128,
        "max_steps": 1300,
        "eval_strategy": "steps",
        "eval_steps": 650,
        "save_strategy": "steps",
        "save_steps": 650,
        "learning_rate": 7e-4,
        "warmup_steps": 100,
        "adam_beta2": 0.98,
        "max_grad_norm": 1.0,
        "max_new_tokens": 4,
        "logging_steps": 50,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "output_dir": arguments.output,
    }
    script = Path(__file__).with_name("finetune_vqa.py")
    pairs = (str(x) for name, value in settings.items() for x in (f"--{name}", value))
    command = [sys.executable, str(script), *pairs, *arguments.options]
    print(" ".join(command), flush=True)
    sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    with tell_errors("easy_vqa.py"):
        main()
