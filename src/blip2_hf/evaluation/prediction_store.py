"""Predictions on the disk as they come: an interrupted evaluation goes on, in any number of processes."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState


class PredictionStore:
    r"""
    A folder with settings.json, which says what makes the predictions, and a file of lines for each process. All
    processes of a run open it together. As long as there are no predictions, the settings may change.

    Args:
        folder (`str` or `os.PathLike`):
            The folder.
        settings (`Mapping`):
            What the predictions depend on.
        state ([`~accelerate.PartialState`]):
            The processes.
        results (`Sequence[str]`, *optional*, defaults to `("part-*.jsonl",)`):
            Patterns of the files that the settings have made.

    Raises:
        ValueError: if the folder holds predictions that other settings made.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        settings: Mapping[str, Any],
        state: PartialState,
        results: Sequence[str] = ("part-*.jsonl",),
    ):
        self.folder = Path(folder)
        self.state = state
        self.settings = json.loads(json.dumps(settings))
        self.path = self.folder / f"part-{state.process_index:05d}.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(self.path)
        self._check_settings(results)
        state.wait_for_everyone()

    def _check_settings(self, results: Sequence[str]):
        path = self.folder / "settings.json"
        if self.state.is_main_process:
            has_begun = any(file.stat().st_size for pattern in results for file in self.folder.glob(pattern))
            if not (has_begun and path.exists()):
                write_json(path, self.settings)
        self.state.wait_for_everyone()
        found = json.loads(path.read_text(encoding="utf-8"))
        names = [name for name in self.settings | found if found.get(name) != self.settings.get(name)]
        if names:
            details = "; ".join(f"{name}: {found.get(name)} there, {self.settings.get(name)} now" for name in names)
            raise ValueError(
                f"{self.folder} holds predictions that were made otherwise ({details}). Give the same settings to go "
                "on with them, or another folder."
            )

    def read(self) -> dict[int, Any]:
        """All predictions that are there, by number; no process writes before all have read."""
        found: dict[int, Any] = {}
        for path in sorted(self.folder.glob("part-*.jsonl")):
            content = path.read_bytes()
            for line in content[: content.rfind(b"\n") + 1].splitlines():
                found.update([json.loads(line)])
        self.state.wait_for_everyone()
        return found

    def write(self, predictions: Mapping[int, Any]):
        """Adds predictions, by number, to the file of this process."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps([number, value]) + "\n" for number, value in predictions.items())


def write_json(path: Path, content: Any):
    """Writes a file that is never there in part."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str):
    """Writes a file that is never there in part."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _cut_torn_line(path: Path):
    """Takes away what a run that was killed has left of a line."""
    if path.exists():
        content = path.read_bytes()
        with open(path, "r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


__all__ = ["PredictionStore"]
