"""
Make tables and plots of the recipe's results, for all seeds that have been run.

    python examples/recipe/report.py --output outputs/recipe
"""

import argparse
import json
import statistics
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
from settings import FOLDER, FULL, LONGER, STAGE1, STAGE2


SPLITS = {"seen": "seen concepts", "unseen": "unseen concepts"}
RANKINGS = {"ITC": "ITC", "ITM": "re-ranked by matching (ITM)", "ITC and ITM": "ITC and ITM"}


def runs(stage: str, variant: str, seed: str = "seed*") -> list[dict]:
    """Return the results of each seed."""
    files = sorted((FOLDER / stage).glob(f"{variant}-{seed}/results.json"))
    return [json.loads(file.read_text()) for file in files]


def count(records: list[dict]) -> str:
    """Count the seeds by the dtype that they were computed in, because results of two dtypes differ."""
    dtypes = Counter(record.get("computed in", {}).get("dtype", "an unknown dtype") for record in records)
    return ", ".join(f"{number} in {dtype}" for dtype, number in sorted(dtypes.items()))


def spread(values: list[float], percent: bool = True) -> str:
    """Return mean ± standard deviation over the seeds."""
    scale, form = (100, "{:.1f}") if percent else (1, "{:.2f}")
    mean = form.format(scale * statistics.mean(values))
    return mean if len(values) < 2 else f"{mean} ± {form.format(scale * statistics.stdev(values))}"


def table(title: str, columns: list[str], rows: dict[str, list[str]]) -> str:
    lines = [[title, *columns], ["---"] * (len(columns) + 1), *([name, *cells] for name, cells in rows.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def retrieval_rows(results: list[dict], split: str, ranking: str) -> list[str]:
    prefix = f"{ranking} " if ranking else ""
    keys = [f"{prefix}{way} R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    return [spread([result[split][key] for result in results]) for key in keys]


def read_baselines() -> dict[str, list[dict]]:
    file = FOLDER / "baselines.json"
    return json.loads(file.read_text()) if file.exists() else {}


def retrieval_table(split: str) -> str:
    rows = {name: retrieval_rows(results, split, "") for name, results in read_baselines().items()}
    if records := runs("stage1", "full"):
        full, seeds = [record["results"] for record in records], f"(seeds: {count(records)})"
        after_contrast = [result["contrast"] for result in full]
        rows[f"Q-Former after contrast alone {seeds}"] = retrieval_rows(after_contrast, split, "ITC")
        for ranking, title in RANKINGS.items():
            rows[f"Q-Former after all losses, {title} {seeds}"] = retrieval_rows(full, split, ranking)
    for variant in (LONGER, "ITC for longer", "all losses for longer"):
        records = runs("stage1", variant)
        results = [record["results"] for record in records]
        rankings = RANKINGS if "itm" in STAGE1[variant].losses else {"ITC": "ITC"}
        for ranking, title in rankings.items() if results else ():
            rows[f"and then {variant}, {title} (seeds: {count(records)})"] = retrieval_rows(results, split, ranking)
    columns = [f"{way} R@{k}" for way in ("picture→name", "name→picture") for k in (1, 5, 10)]
    return table(f"{SPLITS[split]}, %", columns, rows)


def caption_table() -> str:
    def cells(exact: dict[str, list[float]], cider: dict[str, list[float]]) -> list[str]:
        return [cell for split in SPLITS for cell in (spread(exact[split]), spread(cider[split], percent=False))]

    rows = {}
    if neighbour := read_baselines().get("nearest neighbour"):
        rows["the nearest neighbour's name"] = cells(
            {split: [run[split]["image_to_text R@1"] for run in neighbour] for split in SPLITS},
            {split: [run[split]["CIDEr-D"] for run in neighbour] for split in SPLITS},
        )
    for variant in STAGE2:
        records = runs("stage2", variant)
        results = [record["results"] for record in records]
        if results:
            scores = (
                {split: [run[split][key] for run in results] for split in SPLITS} for key in ("exact", "CIDEr-D")
            )
            name = {"full": "stage 1, then stage 2"}.get(variant, f"stage 2, {variant}")
            rows[f"{name} (seeds: {count(records)})"] = cells(*scores)
    for title, variant in (("", "full"), (", after ITC and ITG for longer", LONGER)):
        records = runs("stage1", variant)
        results = [record["results"] for record in records]
        if results:
            scores = (
                {split: [run[split][f"ITG {key}"] for run in results] for split in SPLITS}
                for key in ("exact", "CIDEr-D")
            )
            rows[f"the Q-Former's own (ITG){title} (seeds: {count(records)})"] = cells(*scores)
    columns = [f"{kind}, {split}" for split in SPLITS for kind in ("exact, %", "CIDEr-D")]
    return table("captions", columns, rows)


def ablation_table() -> str:
    rankings = {"ITC": "ITC", "ITM": "re-ranked", "ITC and ITM": "both"}
    keys = [f"{ranking} {way} R@1" for ranking in rankings for way in ("image_to_text", "text_to_image")]
    rows = {}
    for variant in STAGE1:
        records = runs("stage1", variant)
        results = [record["results"] for record in records]
        if results:
            # Cells of losses that were not trained stay empty
            left_out = [name.upper() for name in ("itm", "itg") if name not in STAGE1[variant].losses]
            rows[variant] = [count(records)] + [
                "" if any(name in key for name in left_out) else spread([run["seen"][key] for run in results])
                for key in (*keys, "ITG exact")
            ]
    columns = [f"{way} R@1, {title}" for title in rankings.values() for way in ("picture→name", "name→picture")]
    columns = ["seeds", *columns, "captions by ITG, exact"]
    return table("stage 1, seen concepts, %", columns, rows)


def loss_table() -> str:
    """Make the table of the last logged value of each trained loss."""
    rows = {}
    for variant, settings in STAGE1.items():
        records = runs("stage1", variant)
        logs = [record["log"] for record in records]
        if logs:
            rows[variant] = [count(records)] + [
                spread([[e[f"loss_{name}"] for e in log if f"loss_{name}" in e][-1] for log in logs], percent=False)
                if name == "itc" or name in settings.losses
                else ""
                for name in ("itc", "itm", "itg")
            ]
    return table("stage 1, loss at the end", ["seeds", "ITC", "ITM", "ITG"], rows)


def capfilt_table() -> str:
    files = sorted((FOLDER / "capfilt").glob("seed*.json"))
    results = [json.loads(file.read_text()) for file in files]
    if not results:
        return "CapFilt has not been run.\n"
    kinds = {
        "a third shuffled": "shuffled",
        "those whose name ranks first": "kept",
        "all, named by what ranks first": "cleaned",
    }
    keys = ("ITC image_to_text R@1", "ITC text_to_image R@1")

    def cells(of_kind: list[dict]) -> list[str]:
        return [spread([run["seen"][key] for run in of_kind]) for key in keys]

    rows = {}
    if alone := [result["alone"] for result in results if "alone" in result]:
        rows[f"the two styles alone (seeds: {len(alone)})"] = ["0", "", *cells(alone)]
    for title, kind in kinds.items():
        of_kind = [result[kind] for result in results]
        drawings = round(statistics.mean(run["drawings"] for run in of_kind))
        rows[title] = [str(drawings), spread([run["right"] for run in of_kind]), *cells(of_kind)]
    # Those of the same seeds
    full = [record for file in files for record in runs("stage1", "full", file.stem)]
    if originals := [record["results"]["contrast"] for record in full]:
        drawings = str(results[0]["shuffled"]["drawings"])
        rows[f"all, as they were (seeds: {count(full)})"] = [drawings, "100", *cells(originals)]
    detections = {"all": [result["detection"] for result in results]}
    for result in results:
        for style, own in result.get("detection by style", {}).items():
            detections.setdefault(style, []).append(own)
        for least, own in result.get("detection by margin", {}).items():
            detections.setdefault(f"beaten by more than {least}", []).append(own)
    found = {
        f"{which} (seeds: {len(own)})": [spread([values[key] for values in own]) for key in ("precision", "recall")]
        for which, own in detections.items()
    }
    columns = ["drawings", "right, %", "picture→name R@1, %", "name→picture R@1, %"]
    return "\n".join(
        [
            table(f"names of three styles (seeds: {count(results)})", columns, rows),
            table("finding shuffled names, %", ["precision", "recall"], found),
        ]
    )


def plot_logs(stage: str, variants: list[str], names: list[str], file: Path):
    """Plot a panel for each quantity, a line for each variant, and a shade from the lowest to the highest seed."""
    colors = plt.get_cmap("tab20").colors
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for number, variant in enumerate(variants):
            if name.removeprefix("loss_") in FULL.losses and name.removeprefix("loss_") not in STAGE1[variant].losses:
                continue
            logs = [[(e["step"], e[name]) for e in run["log"] if name in e] for run in runs(stage, variant)]
            if not logs or not logs[0]:
                continue
            steps, *values = [step for step, _ in logs[0]], *([value for _, value in log] for log in logs)
            means = [statistics.mean(column) for column in zip(*values, strict=True)]
            axis.plot(steps, means, label=variant, color=colors[number])
            bounds = ([pick(column) for column in zip(*values, strict=True)] for pick in (min, max))
            axis.fill_between(steps, *bounds, alpha=0.2, color=colors[number], linewidth=0)
        axis.set(title=name.replace("_", " "), xlabel="step")
    if axes[0][0].lines:
        axes[0][0].legend(fontsize=8)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--output", type=Path, default=Path("outputs/recipe"))
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    tables = [retrieval_table(split) for split in SPLITS]
    tables += [caption_table(), ablation_table(), loss_table(), capfilt_table()]
    (folder / "tables.md").write_text("\n".join(tables))
    print("\n".join(tables))
    losses = ["loss_itc", "loss_itm", "loss_itg", "temperature", "learning_rate"]
    plot_logs("stage1", list(STAGE1), losses, folder / "stage1.png")
    plot_logs("stage2", list(STAGE2), ["loss"], folder / "stage2.png")


if __name__ == "__main__":
    main()
