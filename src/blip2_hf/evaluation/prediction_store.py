"""Predictions on the disk as they come: an interrupted evaluation goes on, in any number of processes."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..jobs.atomic_files import remove_leftovers, write_json
from ..jobs.fingerprints import check_settings_file
from ..jobs.output import of_first, raise_lost
from ..jobs.state_files import appended_lines, read_json_lines


class PredictionStore:
    """
    A folder with settings.json, which says what makes the predictions, and a file of lines for each process. All
    processes of a run open it together, and no other run does. As long as no file that matches one of the patterns
    `results` has anything in it, the settings may change; then other settings are an error.
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
        self.folder.mkdir(parents=True, exist_ok=True)

        def check():
            remove_leftovers(self.folder)
            path = self.folder / "settings.json"
            if not any(file.stat().st_size for pattern in results for file in self.folder.glob(pattern)):
                write_json(path, settings)
            advice = "Give the same settings to go on with the predictions in it, or another folder."
            check_settings_file(path, settings, self.folder, advice)

        of_first(check, state)

    def read(self) -> dict[int, Any]:
        """Return all predictions that are there, by number; no process writes before all have read."""
        return of_first(self._read, self.state)

    def _read(self) -> dict[int, Any]:
        found: dict[int, Any] = {}
        for path in sorted(self.folder.glob("part-*.jsonl")):
            advice = "Delete the file: what it holds is predicted again."
            found.update(read_json_lines(path, advice, "[number, prediction]", _is_prediction))
        return found

    def read_all(self, count: int) -> list[Any]:
        """Return the predictions of samples 0 to `count` - 1, all of which were written."""
        found = self.read()
        if missing := sum(number not in found for number in range(count)):
            raise_lost(self.folder, f"{missing:,} of {count:,} predictions are not there any more")
        return [found[number] for number in range(count)]

    def open(self) -> AbstractContextManager[Callable[[list], None]]:
        """Open the file of this process for `add([number, prediction])`."""
        return appended_lines(self.folder / f"part-{self.state.process_index:05d}.jsonl")


def _is_prediction(line: Any) -> bool:
    return isinstance(line, list) and len(line) == 2 and type(line[0]) is int


__all__ = ["PredictionStore"]
