"""What an evaluation leaves behind: results.json, table.md and the predictions."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers

from .. import __version__
from ..jobs.atomic_files import remove_leftovers, write_text
from ..jobs.output import check_still_there
from ..jobs.state_files import read_json
from .samples import OVERALL


_NAMED = 10  # samples without references that the results name


def write_report(
    output: str | os.PathLike,
    task: str,
    model: Any,
    settings: dict[str, Any],
    predictions: Any,
    scores: dict[str, dict[str, float]],
    num_samples: dict[str, int],
    num_scored: dict[str, int],
    without_references: list[int | str],
    run: dict[str, Any],
):
    """
    Write `predictions.json`, as the benchmark's authors want them if they say so, `table.md` and, when all else is
    there, `results.json`. `scores` are those of each group, and of all samples as `overall`; empty if there are no
    references. `run` says how the predictions were made, as far as they do not depend on it.
    """
    folder = Path(output)
    versions = {
        "blip2_hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
    }
    results = {
        "task": task,
        "scores": scores.get(OVERALL, {}),
        "scores_by_group": {group: values for group, values in scores.items() if group != OVERALL},
        "num_samples": num_samples,
        "num_scored": num_scored,
        "without_references": without_references[:_NAMED],
        "settings": {"model": model.config.name_or_path, **settings},
        "run": {"device": str(model.device), **run, "versions": versions},
    }
    remove_leftovers(folder)
    write_text(folder / "predictions.json", _to_json(predictions))
    write_text(folder / "table.md", make_table(results))
    write_text(folder / "results.json", _to_json(results))


def read_results(output: str | os.PathLike) -> dict[str, Any]:
    """Return what results.json holds, and see that all that was written is there."""
    folder = Path(output)
    names = ("parts/settings.json", "predictions.json", "table.md", "results.json")
    check_still_there([folder / name for name in names], folder)
    return read_json(folder / "results.json", "Run the same command again, which writes it anew.")


def _to_json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def make_table(results: dict[str, Any]) -> str:
    """
    Return the scores of results.json as a table in Markdown, times 100 as papers have them, with a line for each
    group, and what is not scored.
    """
    title, settings = results["task"], results["settings"]
    if "protocol" in settings:
        title += f" (protocol {settings['protocol']}{', lemmatized' if settings['lemmatize'] else ''})"
    scores, num_scored = results["scores"], results["num_scored"]
    if not scores:
        return f"{title}: there are no references, and so no scores.\n"
    lines = [f"| {title} | samples | {' | '.join(scores)} |", f"|---|{'---:|' * (len(scores) + 1)}"]
    for group, values in {**results["scores_by_group"], OVERALL: scores}.items():
        cells = [f"{100 * values[name]:.2f}" for name in scores]
        lines.append(f"| {group} | {num_scored[group]} | {' | '.join(cells)} |")
    total, names = results["num_samples"][OVERALL], list(map(str, results["without_references"]))
    if count := total - num_scored[OVERALL]:
        names += ["..."] if count > len(names) else []
        lines += ["", f"Not scored, because they have no references: {count} of {total} samples ({', '.join(names)})."]
    return "\n".join(lines) + "\n"


__all__ = ["make_table", "read_results", "write_report"]
