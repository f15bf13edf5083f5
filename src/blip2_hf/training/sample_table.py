"""A table of what a model says about some held-out pictures, made at each evaluation."""

import os
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerCallback

from ..data.pairs import ImageTextPairs
from ..evaluation.generated_text import GeneratedTextMetrics
from ..jobs.errors import printable


SAMPLES_NAME = "samples.md"
_SHOWN = 8  # pictures
_LONGEST_TEXT = 120  # characters of a text in the table


class SampleTable(TrainerCallback):
    r"""
    Prints a table of eight held-out pictures at each evaluation, with a reference of each and what the model says, and
    appends it to `samples.md` in the output folder. The texts are those that the metrics were computed of.

    Args:
        pairs ([`~data.ImageTextPairs`]):
            What is evaluated.
        metrics ([`~evaluation.GeneratedTextMetrics`]):
            Its metrics.
    """

    def __init__(self, pairs: ImageTextPairs, metrics: GeneratedTextMetrics):
        self.metrics = metrics
        self.asks = pairs.prompt_column is not None
        self.rows = pairs.different_pictures(_SHOWN)
        self.items = [{name: pairs[row].get(name) for name in ("row", "prompt")} for row in self.rows]

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.global_step == 0:
            # Of a run that is overwritten
            (Path(args.output_dir) / SAMPLES_NAME).unlink(missing_ok=True)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if not state.is_world_process_zero or len(self.metrics.predictions) <= max(self.rows, default=0):
            return
        table = self.describe(f"Step {state.global_step:,}{_score(args.metric_for_best_model, metrics or {})}")
        print(f"\n{table}", flush=True)
        path = Path(args.output_dir) / SAMPLES_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{table}\n\n")

    def describe(self, heading: str) -> str:
        """
        Return the table.

        Args:
            heading (`str`):
                The line above it.

        Returns:
            `str`: a table in Markdown, with the questions if the pairs have a `prompt_column`.
        """
        names = ["picture", *(["question"] if self.asks else []), "reference", "model"]
        lines = [f"## {heading}", "", _line(names), _line(["---"] * len(names))]
        for row, item in zip(self.rows, self.items, strict=True):
            cells = {"picture": _shown(item["row"].file) or item["row"], "question": item["prompt"]}
            cells["reference"] = " / ".join(self.metrics.references_as_written[row][:2])
            cells["model"] = self.metrics.predictions[row]
            lines.append(_line([cells[name] for name in names]))
        return "\n".join(lines)


def _shown(file: str | None) -> str | None:
    """Return the name of a file from the folder of work, if it lies inside of that."""
    folder = f"{os.getcwd()}{os.sep}"
    return None if file is None else file.removeprefix(folder)


def _score(name: str | None, metrics: dict[str, Any]) -> str:
    value = metrics.get(f"eval_{name}")
    return "" if value is None else f", {name} {value:.3f}"


def _line(cells: list[Any]) -> str:
    texts = [" ".join(printable(str(cell)).split()).replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(x if len(x) <= _LONGEST_TEXT else f'{x[:_LONGEST_TEXT]}...' for x in texts)} |"


__all__ = ["SAMPLES_NAME", "SampleTable"]
