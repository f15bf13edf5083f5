"""
Baselines on the frozen tower's features, without a Q-Former: the nearest training picture, a linear contrastive head.

    python examples/recipe/baselines.py
"""

import json
import sys
from pathlib import Path

import datasets
import torch
from features import choose_splits
from settings import FOLDER, SEEDS
from torch import nn
from torch.nn.functional import normalize
from training import save_json
from transformers import AutoModel, AutoTokenizer


sys.path.insert(0, str(Path(__file__).parents[1]))
from real_assets import real_assets  # noqa: E402

from blip2_hf.data import read_cached_features  # noqa: E402
from blip2_hf.evaluation.metrics import caption_metrics  # noqa: E402
from blip2_hf.models.losses import image_text_contrastive_loss  # noqa: E402


STEPS, BATCH_SIZE, LEARNING_RATE, WIDTH = 1500, 512, 1e-3, 256


def mean_features(rows: datasets.Dataset) -> torch.Tensor:
    """Return the mean over each picture's features, of shape `(pictures, views, width)`."""
    rows = rows.select_columns([column for column in rows.column_names if column.startswith("image_embeds")])
    return torch.stack(
        [
            torch.stack(
                [read_cached_features(row, view).float().mean(dim=0) for view in range(row["image_embeds_shape"][0])]
            )
            for row in rows
        ]
    )


def directions(features: torch.Tensor) -> torch.Tensor:
    """Standardise each feature, and return unit vectors: the mean shows the style of drawings, not what they show."""
    return normalize((features - features.mean(dim=0)) / features.std(dim=0), dim=-1)


def nearest_neighbours(train: torch.Tensor, train_names: list[str], test: torch.Tensor, names: list[str]):
    """Return the cosine of each picture and the nearest training picture of each name, `(pictures, names)`."""
    alike = directions(test) @ directions(train[:, 0]).T
    scores = torch.full((len(test), len(names)), -2.0)
    column = {name: i for i, name in enumerate(names)}
    index = torch.tensor([column[name] for name in train_names])
    return scores.scatter_reduce(1, index.expand(len(test), -1), alike, "amax")


def linear_head(train, train_names, test, names, text_features, seed: int):
    """Train a linear projection of pictures and names into one space by contrast, and return the test cosines."""
    torch.manual_seed(seed)
    column = {name: i for i, name in enumerate(names)}
    index = torch.tensor([column[name] for name in train_names])
    mean, spread = train.mean(dim=(0, 1)), train.std(dim=(0, 1))
    train, test = (train - mean) / spread, (test - mean) / spread
    image_head, text_head = nn.Linear(train.shape[-1], WIDTH), nn.Linear(text_features.shape[1], WIDTH)
    logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
    parameters = [*image_head.parameters(), *text_head.parameters(), logit_scale]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(train), (BATCH_SIZE,))
        views = torch.randint(train.shape[1], (BATCH_SIZE,))
        images = normalize(image_head(nn.functional.dropout(train[rows, views], 0.1)), dim=-1)
        texts = normalize(text_head(text_features[index[rows]]), dim=-1)
        logits = images @ texts.T * logit_scale.exp()
        loss = image_text_contrastive_loss(logits, logits.T, index[rows][:, None] == index[rows][None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return normalize(image_head(test), dim=-1) @ normalize(text_head(text_features), dim=-1).T


@torch.no_grad()
def sentence_features(names: list[str]) -> torch.Tensor:
    """Return MiniLM's sentence embeddings of the names: the mean over their tokens."""
    folder = real_assets().text_encoder
    batch = AutoTokenizer.from_pretrained(folder)(names, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][:, :, None]
    hidden_states = AutoModel.from_pretrained(folder)(**batch).last_hidden_state
    return (hidden_states * mask).sum(dim=1) / mask.sum(dim=1)


def score(scores: torch.Tensor, own: torch.Tensor, columns: torch.Tensor, names: list[str]) -> dict[str, float]:
    """Compute recall of some pictures among all names, of their names among all pictures, and of captions by name."""
    results = {}
    for direction, found, wanted in (
        ("image_to_text", scores[own].argsort(dim=1, descending=True, stable=True), columns[own]),
        ("text_to_image", scores.T[columns[own]].argsort(dim=1, descending=True, stable=True), own),
    ):
        for k in (1, 5, 10):
            results[f"{direction} R@{k}"] = (found[:, :k] == wanted[:, None]).any(dim=1).double().mean().item()
    captions = [names[i] for i in scores[own].argmax(dim=1).tolist()]
    wanted = [[names[i]] for i in columns[own].tolist()]
    return results | {"CIDEr-D": caption_metrics(captions, wanted)["CIDEr-D"]}


def main():
    train_rows, tests = choose_splits(validate=False)
    names = sorted({*tests["seen"]["name"], *tests["unseen"]["name"]})
    column = {name: i for i, name in enumerate(names)}
    emoji = train_rows.select([i for i, name in enumerate(train_rows["name"]) if name in column])
    train, train_names = mean_features(emoji), list(emoji["name"])
    test = torch.cat([mean_features(rows)[:, 0] for rows in tests.values()])
    columns = torch.tensor([column[name] for rows in tests.values() for name in rows["name"]])
    first, subsets = 0, {}
    for split, rows in tests.items():
        subsets[split] = torch.arange(first, first + len(rows))
        first += len(rows)

    texts = sentence_features(names)
    methods = {"nearest neighbour": [nearest_neighbours(train, train_names, test, names)]}
    methods["linear contrastive head"] = [linear_head(train, train_names, test, names, texts, seed) for seed in SEEDS]
    results = {
        name: [{split: score(scores, own, columns, names) for split, own in subsets.items()} for scores in runs]
        for name, runs in methods.items()
    }
    print(json.dumps(results, indent=1))
    save_json(FOLDER / "baselines.json", results)


if __name__ == "__main__":
    main()
