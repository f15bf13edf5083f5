"""
Make the tables of the recipe's results, of all seeds that have been run.

    python examples/recipe/report.py --output outputs/recipe
"""

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from settings import FOLDER, QUESTIONS, STAGE1, STAGE2, START


SETS = ("seen styles", "new compositions", "new style")
RETRIEVAL = {
    "ITC, image→text": "ITC image_to_text R@1",
    "re-ranked by ITM": "ITM image_to_text R@1",
    "ITC, text→image": "ITC text_to_image R@1",
    "re-ranked by ITM ": "ITM text_to_image R@1",
}
TOLD = {f"{kind}, {loss}": f"{loss} {kind} told" for kind in ("relation", "count") for loss in ("ITC", "ITM")}
CAPTIONS = {"exact": "exact", "precision": "precision", "recall": "recall"}


def runs(stage: str, variant: str) -> list[dict]:
    """Return the record of each seed."""
    return [json.loads(file.read_text()) for file in sorted((FOLDER / stage).glob(f"{variant}-seed*/results.json"))]


def spread(records: list[dict], scenes: str, key: str, percent: bool = True) -> str:
    """Return mean ± standard deviation over the seeds, or nothing if a loss was not trained."""
    values = [
        record["results"][scenes][key] * (100 if percent else 1)
        for record in records
        if key in record["results"][scenes]
    ]
    if not values:
        return ""
    digits = 1 if percent else 2
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def seeds(records: list[dict]) -> str:
    """Count the seeds by dtype, because results of two dtypes differ as much as those of two seeds."""
    dtypes = Counter(record["computed in"]["dtype"] for record in records)
    return ", ".join(f"{count} in {dtype}" for dtype, count in sorted(dtypes.items()))


def table(
    stage: str, title: str, variants: Iterable[str], columns: dict[str, tuple[str, str]], prefix: str = ""
) -> str:
    """Make a table of the variants that have been run. A column is a set of scenes and a score."""
    lines = [[title, "seeds", *columns], ["---"] * (2 + len(columns))]
    for variant in variants:
        if records := runs(stage, variant):
            cells = [spread(records, scenes, prefix + key) for scenes, key in columns.values()]
            lines.append([variant, seeds(records), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def diversity_table() -> str:
    """Make the table of how alike the queries of a scene are, after each layer, and of their effective rank."""
    layers = {f"layer {number}": f"query cosine, layer {number}" for number in range(7)}
    lines = [["cosine of two queries, after", *layers, "effective rank"], ["---"] * (2 + len(layers))]
    for variant in STAGE1:
        if records := runs("stage1", variant):
            keys = (*layers.values(), "query rank")
            lines.append([variant, *(spread(records, "seen styles", key, percent=False) for key in keys)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def choice_table() -> str:
    """Make the table of captions that are chosen among several ones."""
    records = runs("choose", "full")
    columns = of_all_sets(CAPTIONS)
    lines = [["captions chosen among five, %", *columns], ["---"] * (1 + len(columns))]
    names = (
        [key.removesuffix(": exact") for key in records[0]["results"][SETS[0]] if key.endswith(": exact")]
        if records
        else []
    )
    for name in names:
        lines.append([name, *(spread(records, scenes, f"{name}: {key}") for scenes, key in columns.values())])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def told_table() -> str:
    """Make the table of true captions that the language model finds likelier than swapped ones."""
    records, ways = runs("choose", "full"), ("sum", "mean", "relative")
    columns = {f"{kind}, {way}": f"{kind} told, {way}" for kind in ("relation", "count") for way in ways}
    lines = [["told by the language model, %", *columns], ["---"] * (1 + len(columns))]
    for scenes in SETS if records else ():
        lines.append([scenes, *(spread(records, scenes, key) for key in columns.values())])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def probe_table() -> str:
    """Make the table of the things that a linear probe of the tower's features names."""
    file = FOLDER / "probe.json"
    if not file.exists():
        return ""
    named = json.loads(file.read_text())
    cells = [f"{100 * share:.1f}" for share in named.values()]
    lines = [["things named, %", *named], ["---"] * (1 + len(named)), ["linear probe of the tower", *cells]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def of_set(scenes: str, keys: dict[str, str]) -> dict[str, tuple[str, str]]:
    return {title: (scenes, key) for title, key in keys.items()}


def of_all_sets(keys: dict[str, str]) -> dict[str, tuple[str, str]]:
    return {f"{scenes}: {title}": (scenes, key) for scenes in SETS for title, key in keys.items()}


def minutes() -> str:
    """Return how long a training took, in minutes, for each kind."""
    kinds = {
        "stage 1": ("stage1", START | STAGE1),
        "stage 2": ("stage2", STAGE2),
        "questions": ("questions", QUESTIONS),
    }
    parts = []
    for title, (stage, variants) in kinds.items():
        if taken := [
            run["seconds"] / 60 for variant in variants for run in runs(stage, variant) if run["seconds"] is not None
        ]:
            parts.append(f"{title} {min(taken):.0f} to {max(taken):.0f} minutes")
    return f"Training: {', '.join(parts)}.\n"


def tables() -> list[str]:
    kinds = sorted(
        {key for variant in QUESTIONS for run in runs("questions", variant) for key in run["results"][SETS[0]]}
    )
    # Before the second training
    stage1 = ["start", *STAGE1]
    return [
        *(table("stage1", f"retrieval, {scenes}, R@1 %", stage1, of_set(scenes, RETRIEVAL)) for scenes in SETS),
        *(table("stage1", f"told from a swapped one, {scenes}, %", stage1, of_set(scenes, TOLD)) for scenes in SETS),
        table("stage1", "captions by the Q-Former, %", stage1, of_all_sets(CAPTIONS), prefix="ITG "),
        table("stage2", "captions by the language model, %", STAGE2, of_all_sets(CAPTIONS)),
        table(
            "questions", "answers, seen styles, %", QUESTIONS, of_set(SETS[0], dict(zip(kinds, kinds, strict=True)))
        ),
        choice_table(),
        told_table(),
        diversity_table(),
        probe_table(),
        minutes(),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--output", type=Path, default=Path("outputs/recipe"))
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(tables())
    (folder / "tables.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
