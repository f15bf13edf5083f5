"""
Draw what stage 1 has learned: similarities of drawings and names before and after, and where the model looks.

    python examples/recipe/figures.py --output outputs/recipe
"""

import argparse
import random
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import transformers
from features import choose_splits
from learn_stage1 import make_model
from pictures import load_pictures
from settings import FOLDER, STAGE1
from transformers import AutoTokenizer


sys.path.insert(0, str(Path(__file__).parents[1]))
from precision import device_type  # noqa: E402

from blip2_hf import Blip2ForPreTraining  # noqa: E402
from blip2_hf.attention_maps import overlay, text_heat_map  # noqa: E402
from blip2_hf.data import read_cached_features  # noqa: E402
from blip2_hf.models.losses import image_text_similarity  # noqa: E402


GROUPS = ("animal-mammal", "food-fruit", "musical-instrument", "transport-ground")
THINGS_OF_A_GROUP, MAPS = 7, 8


@torch.no_grad()
def similarities(model, embeds: torch.Tensor, texts) -> torch.Tensor:
    images = model.get_image_features(image_embeds=embeds, return_dict=True).pooler_output
    names = model.get_text_features(texts["input_ids"], texts["attention_mask"], return_dict=True).pooler_output
    return image_text_similarity(images, names).cpu()


def draw_similarities(matrices: dict[str, torch.Tensor], names: list[str], file: Path):
    figure, axes = plt.subplots(1, len(matrices), figsize=(6 * len(matrices), 7), layout="constrained")
    for axis, (title, matrix) in zip(axes, matrices.items(), strict=True):
        axis.imshow(matrix, cmap="viridis")
        right = (matrix.argmax(dim=1) == torch.arange(len(matrix))).sum()
        axis.set(
            title=f"{title}: {right} of {len(matrix)} rows highest on the diagonal", xlabel="names", ylabel="drawings"
        )
        axis.set_yticks(range(len(names)), names, fontsize=6)
        axis.set_xticks(range(len(names)), names, fontsize=6, rotation=90)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def draw_maps(model, pictures, embeds: torch.Tensor, texts, names: list[str], file: Path):
    side = model.config.vision_config.image_size
    maps = text_heat_map(model, texts["input_ids"], texts["attention_mask"], image_embeds=embeds, image_size=side)
    figure, axes = plt.subplots(2, len(names), figsize=(1.6 * len(names), 3.5), layout="constrained")
    for (above, below), picture, heat_map, name in zip(axes.T, pictures, maps, names, strict=True):
        above.imshow(picture)
        above.set_title(name, fontsize=8)
        below.imshow(overlay(picture, heat_map))
        above.axis("off")
        below.axis("off")
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--output", type=Path, default=Path("outputs/recipe"))
    parser.add_argument("--seed", type=int, default=0, help="of the model that is shown")
    options = parser.parse_args()
    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    transformers.set_seed(options.seed)
    transformers.logging.set_verbosity_error()
    saved = FOLDER / "stage1" / f"full-seed{options.seed}" / "model"
    tokenizer = AutoTokenizer.from_pretrained(saved)
    untrained = make_model(STAGE1["full"]).to(device_type()).eval()
    trained = Blip2ForPreTraining.from_pretrained(saved).to(device_type()).eval()

    rows = choose_splits(validate=False)[1]["seen"]
    chosen = [
        number
        for group in GROUPS
        for number in random.Random(0).sample(
            [i for i, kind in enumerate(rows["subcategory"]) if kind == group], THINGS_OF_A_GROUP
        )
    ]
    rows = rows.select(chosen)
    names = list(rows["name"])
    embeds = torch.stack([read_cached_features(row).float() for row in rows]).to(device_type())
    texts = tokenizer(names, padding=True, return_tensors="pt").to(device_type())
    models = {"before stage 1": untrained, "after": trained}
    matrices = {title: similarities(model, embeds, texts) for title, model in models.items()}
    draw_similarities(matrices, names, folder / "similarities.png")
    some = list(range(0, len(rows), -(-len(rows) // MAPS)))
    drawings = load_pictures()["test_seen"]
    pictures = [drawings[chosen[i]]["image"].convert("RGB") for i in some]
    some_texts = {name: values[some] for name, values in texts.items()}
    draw_maps(trained, pictures, embeds[some], some_texts, [names[i] for i in some], folder / "attention.png")


if __name__ == "__main__":
    main()
