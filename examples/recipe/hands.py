"""
Takes out of the features how a hand draws: each hand's pictures less their mean, every feature in units of its spread.

A hand that nothing is learned from shifts all features; its mean needs some of its pictures, but none of their names.
"""

from functools import partial

import datasets
import torch
from datasets import concatenate_datasets

from blip2_hf.data import read_cached_features


def without_hands(features: dict[str, datasets.Dataset], learned_from: str = "train") -> dict[str, datasets.Dataset]:
    """
    Args:
        features (`dict[str, datasets.Dataset]`):
            Rows of `load_cached_features`, with a column `style`. The mean of a hand is that of its pictures
            themselves (view 0) in all splits.
        learned_from (`str`, *optional*, defaults to `"train"`):
            The split that says what a feature's spread is.
    """
    rows = concatenate_datasets([part.select_columns(_columns(part)) for part in features.values()])
    places = torch.stack([read_cached_features(row).float().mean(dim=0) for row in rows])
    styles = rows["style"]
    means = {}
    for style in set(styles):
        means[style] = places[[i for i, other in enumerate(styles) if other == style]].mean(dim=0)
    own = features[learned_from]["style"]
    first = sum(len(part) for part in list(features.values())[: list(features).index(learned_from)])
    spread = (places[first : first + len(own)] - torch.stack([means[style] for style in own])).std(dim=0)
    # Lists, for datasets tells by them what it has computed before
    change = partial(_centre, means={style: mean.tolist() for style, mean in means.items()}, spread=spread.tolist())
    return {name: part.map(change, desc=f"Hands of {name}") for name, part in features.items()}


def _columns(rows: datasets.Dataset) -> list[str]:
    return [name for name in rows.column_names if name == "style" or name.startswith("image_embeds")]


def _centre(row: dict, means: dict[str, list[float]], spread: list[float]) -> dict:
    views = torch.stack([read_cached_features(row, view) for view in range(row["image_embeds_shape"][0])])
    centred = (views.float() - torch.tensor(means[row["style"]])) / torch.tensor(spread)
    return {"image_embeds": centred.to(views.dtype).contiguous().view(torch.uint8).numpy().tobytes()}
