"""
Remove the style from the features: subtract the mean of each style's pictures, and divide by the standard deviation.

An unseen style shifts all features. Its mean needs some of its pictures, but none of their names.
"""

from functools import partial

import datasets
import torch

from blip2_hf.data import read_cached_features


def remove_styles(features: dict[str, datasets.Dataset], learned_from: str = "train") -> dict[str, datasets.Dataset]:
    """
    Subtract each style's mean, and scale each feature.

    Args:
        features (`dict[str, datasets.Dataset]`):
            Rows of `load_cached_features`, with a column `style`. The mean of a style is that of its unchanged
            pictures (view 0) in all splits.
        learned_from (`str`, *optional*, defaults to `"train"`):
            The split whose standard deviation is taken.

    Returns:
        `dict[str, datasets.Dataset]`: the same rows, with `(feature - mean of the style) / standard deviation`, in the
        same dtype.
    """
    places = {split: _mean_places(rows) for split, rows in features.items()}
    styles = {split: rows["style"] for split, rows in features.items()}
    by_style: dict[str, list[torch.Tensor]] = {}
    for split in features:
        for style, picture in zip(styles[split], places[split], strict=True):
            by_style.setdefault(style, []).append(picture)
    means = {style: torch.stack(pictures).mean(dim=0) for style, pictures in by_style.items()}
    own_means = torch.stack([means[style] for style in styles[learned_from]])
    spread = (places[learned_from] - own_means).std(dim=0)
    # Lists, because datasets hashes them to find what it has computed before
    change = partial(_centre, means={style: mean.tolist() for style, mean in means.items()}, spread=spread.tolist())
    return {split: rows.map(change, desc=f"Styles of {split}") for split, rows in features.items()}


def _mean_places(rows: datasets.Dataset) -> torch.Tensor:
    """Return the mean over each picture's features, of shape `(pictures, width)`."""
    rows = rows.select_columns([name for name in rows.column_names if name.startswith("image_embeds")])
    return torch.stack([read_cached_features(row).float().mean(dim=0) for row in rows])


def _centre(row: dict, means: dict[str, list[float]], spread: list[float]) -> dict:
    views = torch.stack([read_cached_features(row, view) for view in range(row["image_embeds_shape"][0])])
    centred = (views.float() - torch.tensor(means[row["style"]])) / torch.tensor(spread)
    return {"image_embeds": centred.to(views.dtype).contiguous().view(torch.uint8).numpy().tobytes()}
