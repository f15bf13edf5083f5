"""The report of the demo: scores, a table, and a sheet of pictures."""

from pathlib import Path

import datasets
import torch
from contact_sheet import Card, Section, draw_contact_sheet
from torch.nn.functional import normalize

from blip2_hf.data import ImageTextPairs


COLUMNS = {
    "exact": "exact",
    "shares a word": "shares a word",
    "image_to_text_r1": "image->name R@1",
    "text_to_image_r1": "name->image R@1",
}


def score(captions: list[str], truths: list[str]) -> dict[str, float]:
    """Compute the share of captions that are the name, and of those that share a word with it."""
    pairs = list(zip(captions, truths, strict=True))
    return {
        "exact": sum(caption == truth for caption, truth in pairs) / len(pairs),
        "shares a word": sum(bool(set(c.split()) & set(t.split())) for c, t in pairs) / len(pairs),
    }


def nearest_neighbours(train_features: datasets.Dataset, test_features: datasets.Dataset) -> list[str]:
    """Return the name of the nearest training picture in the frozen tower's features, both sets centred."""

    def directions(features: datasets.Dataset) -> torch.Tensor:
        pairs = ImageTextPairs(features, text_column="name", train=False)
        means = torch.stack([pair["image_embeds"].float().mean(dim=0) for pair in pairs])
        return normalize(means - means.mean(dim=0), dim=-1)

    nearest = (directions(test_features) @ directions(train_features).T).argmax(dim=1)
    names = train_features["name"]
    return [names[i] for i in nearest.tolist()]


def print_table(rows: dict[str, dict[str, float]], count: int):
    print("\n" + "   ".join([f"{f'{count} drawings in a style not seen in training':44}", *COLUMNS.values()]))
    for name, values in rows.items():
        cells = [f"{values[key]:.1%}" if key in values else "-" for key in COLUMNS]
        print("   ".join([f"{name:44}", *(f"{c:>{len(t)}}" for c, t in zip(cells, COLUMNS.values(), strict=True))]))


def write_table(rows: dict[str, dict[str, float]], count: int, file: Path):
    """Write the same table in Markdown."""
    lines = [[f"{count} drawings in a style not seen in training", *COLUMNS.values()], ["---"] * (1 + len(COLUMNS))]
    lines += [[name, *(f"{v[key]:.1%}" if key in v else "" for key in COLUMNS)] for name, v in rows.items()]
    file.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


def draw_sheet(test: datasets.Dataset, captions: list[str], file: Path):
    cards = [Card(row["image"], text, row["name"]) for row, text in zip(test, captions, strict=True)]
    right = sum(card.right for card in cards)
    note = f"{right} of {len(cards)} named exactly; the first {min(40, len(cards))} are here"
    section = Section("Drawings in a style not seen in training", note, cards[:40])
    draw_contact_sheet("What is it?", "DINOv2-small, a Q-Former trained in minutes, SmolLM2-135M", [section]).save(
        file
    )
