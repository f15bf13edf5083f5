"""An index is brought up to date: what is new or has changed is computed, what is gone is dropped."""

import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils import logging

from ..jobs.batch_size import BatchSize
from ..jobs.errors import printable
from ..jobs.picture_files import find_picture_files
from ..jobs.picture_inputs import PictureInputs, load_ahead
from ..models.modeling_retrieval import Blip2ImageTextPreTrainedModel
from .store import Store


def find_pictures(folder: str | os.PathLike, directory: str | os.PathLike | None = None) -> dict[str, list[int]]:
    r"""
    Find the pictures of a folder and of the folders in it, by the endings of their names. Names that begin with a dot
    are passed over, links to folders are not followed.

    Args:
        folder (`str` or `os.PathLike`):
            The folder.
        directory (`str` or `os.PathLike`, *optional*):
            A folder that is left out: that of the index.

    Returns:
        `dict[str, list[int]]`: size in bytes and time of the last change in nanoseconds, by the path inside `folder`.

    Raises:
        ValueError: if there are none.
    """
    found = find_picture_files(folder, directory)
    if not found:
        raise ValueError(f"{folder} has no pictures: no file has an ending such as .jpg or .png.")
    return {name: [status.st_size, status.st_mtime_ns] for name, status in found.items()}


class Updater:
    """
    Computes the features of pictures of a folder, and stores them.

    Args:
        store ([`Store`]):
            Where they go.
        folder (`Path`):
            The pictures.
        model, image_processor:
            What computes them.
        batch_size, rows_per_shard, num_workers, show_progress:
            Those of [`SearchIndex.build`].
    """

    def __init__(
        self,
        store: Store,
        folder: Path,
        model: Blip2ImageTextPreTrainedModel,
        image_processor: Any,
        batch_size: int,
        rows_per_shard: int,
        num_workers: int,
        show_progress: bool,
    ):
        self.store = store
        self.folder = folder
        self.model = model
        self.image_processor = image_processor
        self.batch_size = BatchSize(batch_size)
        self.rows_per_shard = rows_per_shard
        self.num_workers = num_workers
        self.show_progress = show_progress
        self.is_space_checked = False

    def update(self, found: dict[str, list[int]]):
        """Make the index that of the pictures that were found, with their sizes and mtimes."""
        self.store.remove_leftovers()
        known, broken = self.store.stats(), self.store.read_broken()
        seen = known | {path: list(entry[:2]) for path, entry in broken.items()}
        still_broken = {path: entry for path, entry in broken.items() if found.get(path) == seen[path]}
        new = [path for path in found if path not in seen]
        changed = [path for path in found if path in seen and found[path] != seen[path]]
        gone = [path for path in known if path not in found]
        kept = len(found) - len(new) - len(changed) - len(still_broken)
        self._tell(
            f"{self.folder}: {len(found):,} pictures, of which {len(new):,} new, {len(changed):,} changed, "
            f"{kept:,} kept, {len(still_broken):,} broken as before; {len(gone):,} gone."
        )
        self.store.write_broken(still_broken)
        self.store.drop({*gone, *changed})
        self._compute({path: found[path] for path in sorted([*new, *changed])})
        self.store.gather_small_shards(self.rows_per_shard)
        self.store.check_is_there()

    def _compute(self, stats: dict[str, list[int]]):
        """Compute pictures and add them, shard by shard."""
        if not stats:
            return
        paths = list(stats)
        broken, rows, parts = self.store.read_broken(), [], []
        inputs = PictureInputs([self.folder / path for path in paths], self.image_processor)
        with logging.tqdm(total=len(paths), desc="Pictures", unit="picture", disable=not self.show_progress) as bar:
            for batch in load_ahead(inputs, self.num_workers, batch_size=self.batch_size.size):
                broken |= {paths[i]: (*stats[paths[i]], reason) for i, reason in batch.errors.items()}
                items = (
                    [] if batch.pixel_values is None else list(zip(batch.readable, batch.pixel_values, strict=True))
                )
                for some, part in self.batch_size.run(partial(self._features, paths), items):
                    if not self.is_space_checked:
                        self._check_space(part, len(paths))
                    rows += [paths[i] for i, _ in some]
                    parts.append(part)
                if len(rows) >= self.rows_per_shard:
                    self._add(rows, parts, stats, broken)
                    rows, parts = [], []
                bar.update(len(batch.numbers))
        self._add(rows, parts, stats, broken)

    def _add(self, rows: list[str], parts: list[dict[str, np.ndarray]], stats: dict[str, list[int]], broken: dict):
        self.store.write_broken(broken)
        if rows:
            self.store.add(rows, [stats[path] for path in rows], parts)

    @torch.inference_mode()
    def _features(self, paths: list[str], items: Sequence[tuple[int, torch.Tensor]]) -> dict[str, np.ndarray]:
        """Return what is stored of some of the pictures, in float16."""
        pixel_values = torch.stack([pixel_values for _, pixel_values in items])
        image_embeds = self.model.get_image_embeds(pixel_values.to(self.model.device))
        arrays = {"features": self.model.get_image_features(image_embeds=image_embeds).pooler_output}
        if self.store.has_embeds:
            arrays["embeds"] = image_embeds
        arrays = {name: array.to(torch.float16) for name, array in arrays.items()}
        for name, array in arrays.items():
            if not array.isfinite().all():
                advice = (
                    "Let the model compute in bfloat16 or float32 (dtype, --dtype)."
                    if name == "features"
                    else "Build the index without store_embeds (--store-embeds)."
                )
                raise ValueError(
                    f"The {name} of {paths[items[0][0]]}, or of one of {len(items) - 1} pictures after it, are not "
                    f"finite in float16. {advice}"
                )
        return {name: array.cpu().numpy() for name, array in arrays.items()}

    def _check_space(self, part: dict[str, np.ndarray], count: int):
        self.is_space_checked = True
        size = sum(array[0].nbytes for array in part.values())
        free = shutil.disk_usage(self.store.directory).free
        self._tell(
            f"{count:,} pictures are to be computed: {size / 1e3:,.3g} kB each, {size * count / 1e9:.3g} GB in all; "
            f"{free / 1e9:.3g} GB are free in {self.store.directory}."
        )
        if size * count > free:
            raise OSError(
                f"{self.store.directory} has {free / 1e9:.3g} GB of free space, the index needs "
                f"{size * count / 1e9:.3g} GB more. Free some, put the index on another disk, or leave out the "
                "tower's output (store_embeds)."
            )

    def _tell(self, text: str):
        if self.show_progress:
            tqdm.write(printable(text), file=sys.stderr)
