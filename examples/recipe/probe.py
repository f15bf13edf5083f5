"""
Measure what the frozen tower tells of the things in a scene: a linear probe of its features, by ridge regression.

    python examples/recipe/probe.py

It tells how well the frozen features carry over to a style that was not seen. The features of a scene are the mean and
the maximum of each channel over all places. In a scene of n different things the probe names the n most likely ones.
"""

import sys
from pathlib import Path

import datasets
import torch
from features import choose_scenes
from settings import FOLDER
from training import save_json


sys.path.insert(0, str(Path(__file__).parents[1]))
from scene_training import stack_features  # noqa: E402
from scenes import THINGS  # noqa: E402


RIDGE = 0.01


def pool(scenes: datasets.Dataset) -> torch.Tensor:
    places = stack_features(scenes).double()
    return torch.cat([places.mean(dim=1), places.amax(dim=1)], dim=1)


def things_of(scenes: datasets.Dataset) -> torch.Tensor:
    """Return which things are in which scene, of shape `(scenes, things)`, one or zero."""
    return torch.tensor([[float(thing in objects) for thing in THINGS] for objects in scenes["objects"]]).double()


def named(scores: torch.Tensor, there: torch.Tensor) -> float:
    """Return the share of the things in all scenes that are among the most likely ones of their scene."""
    right = [own[row.topk(int(own.sum())).indices].sum() for row, own in zip(scores, there, strict=True)]
    return (sum(right) / there.sum()).item()


def probe(scenes: datasets.Dataset, tests: dict[str, datasets.Dataset]) -> dict[str, float]:
    """Fit the probe to scenes, and return how many things it names in others."""
    features, there = pool(scenes), things_of(scenes)
    mean, deviation = features.mean(dim=0), features.std(dim=0)
    features = (features - mean) / deviation
    ridge = RIDGE * len(features) * torch.eye(features.shape[1]).double()
    weight = torch.linalg.solve(features.T @ features + ridge, features.T @ (there - there.mean(dim=0)))
    return {name: named((pool(test) - mean) / deviation @ weight, things_of(test)) for name, test in tests.items()}


def main():
    results = probe(*choose_scenes(validate=False))
    # With one of the training styles held out
    results |= {f"validate {name}": share for name, share in probe(*choose_scenes(validate=True)).items()}
    print(results)
    save_json(FOLDER / "probe.json", results)


if __name__ == "__main__":
    main()
