"""The report of the demo: scores, a table, and a sheet of pictures."""

from pathlib import Path

import datasets
import torch
from contact_sheet import Card, Section, draw_contact_sheet
from precision import fast_autocast
from scene_training import stack_features
from scenes import exact, object_scores
from torch.nn.functional import normalize

from blip2_hf.evaluation import TwoStageRetrieval


COLUMNS = ("exactly right", "precision", "recall", "image->text R@1", "text->image R@1")
SHOWN = 16  # captions on the sheet
FOUND = 8  # texts on the sheet


def score_captions(captions: list[str], scenes: datasets.Dataset) -> dict[str, float]:
    """Compute the share of captions that are exactly right, and precision and recall of the things that they name."""
    return {"exactly right": exact(captions, scenes)} | object_scores(captions, scenes)


@torch.no_grad()
def score_retrieval(model, tokenizer, scenes: datasets.Dataset) -> dict[str, dict[str, float]]:
    """Score stage 1: retrieval among all scenes by ITC, re-ranked by ITM, and the Q-Former's own captions (ITG)."""
    embeds, texts = stack_features(scenes), [captions[0] for captions in scenes["captions"]]
    rows = {}
    with fast_autocast():
        for name, candidates in (("ITC", 0), ("ITC, re-ranked by ITM", 10)):
            ranked = TwoStageRetrieval(model, tokenizer, k=candidates, show_progress=False)(embeds, texts)
            first = {way: getattr(ranked, way).index[:, 0].tolist() for way in ("image_to_text", "text_to_image")}
            rows[f"stage 1: {name}"] = {
                column: sum(texts[found] == own for found, own in zip(first[way], texts, strict=True)) / len(texts)
                for way, column in zip(first, COLUMNS[3:], strict=True)
            }
        tokens = model.generate(image_embeds=embeds, max_new_tokens=16, do_sample=False)
    captions = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return rows | {"stage 1: captions by the Q-Former (ITG)": score_captions(captions, scenes)}


def nearest_neighbours(train_features: datasets.Dataset, test_features: datasets.Dataset) -> list[str]:
    """Return the caption of the nearest training scene in the frozen tower's features, both sets centred."""

    def directions(features: datasets.Dataset) -> torch.Tensor:
        places = stack_features(features).flatten(1)
        return normalize(places - places.mean(dim=0), dim=-1)

    nearest = (directions(test_features) @ directions(train_features).T).argmax(dim=1)
    captions = train_features["captions"]
    return [captions[i][0] for i in nearest.tolist()]


def print_table(rows: dict[str, dict[str, float]]):
    print("\n" + "   ".join([f"{'new scenes':42}", *COLUMNS]))
    for name, values in rows.items():
        cells = [f"{values[key]:.1%}" if key in values else "-" for key in COLUMNS]
        print("   ".join([f"{name:42}", *(f"{c:>{len(t)}}" for c, t in zip(cells, COLUMNS, strict=True))]))


def write_table(rows: dict[str, dict[str, float]], file: Path):
    """Write the same table in Markdown."""
    lines = [["new scenes", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    lines += [[name, *(f"{v[key]:.1%}" if key in v else "" for key in COLUMNS)] for name, v in rows.items()]
    file.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


@torch.no_grad()
def find_scenes(model, tokenizer, scenes: datasets.Dataset) -> list[int]:
    """Return the number of the scene that contrast finds first for the first caption of each scene."""
    retrieval = TwoStageRetrieval(model, tokenizer, k=0, show_progress=False)
    texts = [captions[0] for captions in scenes["captions"]]
    return retrieval(stack_features(scenes), texts).text_to_image.index[:, 0].tolist()


def draw_sheet(scenes: datasets.Dataset, captions: list[str], found: list[int], file: Path):
    """
    Draw the first scenes with their captions, and then what texts about the next ones find. If a caption or a picture
    is wrong, what is in the picture stands beside it.
    """
    written = [
        Card(row["image"], caption, caption if caption in row["captions"] else row["captions"][0])
        for row, caption in zip(scenes, captions, strict=True)
    ]
    searched = {}  # by text, because two scenes may have the same
    for first, row in zip(scenes.select(found), scenes, strict=True):
        text = row["captions"][0]
        searched[text] = Card(first["image"], text, text if text in first["captions"] else first["captions"][0])
    cards = list(searched.values())
    right = [sum(card.right for card in row) for row in (written, cards)]
    sections = [
        Section(
            "Described",
            f"{right[0]} of {len(written)} captions are exactly right; the first {SHOWN} are here",
            written[:SHOWN],
        ),
        Section(
            "Found by a text",
            f"for {right[1]} of {len(cards)} texts the first picture is right; {FOUND} of them are here",
            cards[SHOWN : SHOWN + FOUND],
        ),
    ]
    subtitle = "Scenes that it has not seen. EfficientNet-lite2, a Q-Former trained in minutes, SmolLM2-135M"
    draw_contact_sheet("What is in the picture?", subtitle, sections).save(file)
