"""An index is brought up to date: what is new or has changed is computed, what is gone is dropped."""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils import logging

from ..jobs.batch_size import BatchSize
from ..jobs.errors import printable
from ..jobs.output import format_size
from ..jobs.picture_files import find_picture_files
from ..jobs.picture_inputs import PictureInputs, load_ahead
from ..models.modeling_image_text import Blip2ImageTextPreTrainedModel
from .store import LATEST, Store


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
    return {name: [status.st_size, min(status.st_mtime_ns, LATEST)] for name, status in found.items()}


@dataclass
class Updater:
    """Computes the features of pictures of a folder, and stores them. Options are those of [`SearchIndex.build`]."""

    store: Store
    folder: Path
    model: Blip2ImageTextPreTrainedModel
    image_processor: Any
    batch_size: BatchSize
    rows_per_shard: int
    num_workers: int
    show_progress: bool

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
        broken, is_space_checked = self.store.read_broken(), False
        told = len(broken)
        rows: list[str] = []
        parts: list[dict[str, np.ndarray]] = []
        inputs = PictureInputs([self.folder / path for path in paths], self.image_processor)

        def add(is_last: bool = False):
            nonlocal told
            # The list is written whole, and so not each time that a long one has grown a little
            if is_last or len(broken) > told + told // 8:
                self.store.write_broken(broken)
                told = len(broken)
            if rows:
                self.store.add(rows, [stats[path] for path in rows], parts)

        with logging.tqdm(total=len(paths), desc="Pictures", unit="picture", disable=not self.show_progress) as bar:
            for batch in load_ahead(inputs, self.num_workers, batch_size=self.batch_size.size):
                broken |= {paths[i]: (*stats[paths[i]], reason) for i, reason in batch.errors.items()}
                pixel_values = [] if batch.pixel_values is None else batch.pixel_values
                items = list(zip(batch.readable, pixel_values, strict=True))
                for some, part in self.batch_size.run(partial(self._features, paths), items):
                    if not is_space_checked:
                        self._check_space(part, len(paths))
                        is_space_checked = True
                    rows += [paths[i] for i, _ in some]
                    parts.append(part)
                if len(rows) >= self.rows_per_shard:
                    add()
                    rows, parts = [], []
                bar.update(len(batch.numbers))
        add(is_last=True)

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
                raise ValueError(
                    f"The {name} of {paths[items[0][0]]}, or of one of {len(items) - 1} pictures after it, are not "
                    "finite in float16. Let the model compute in bfloat16 or float32 (dtype, --dtype), or leave out "
                    "the tower's output (store_embeds, --store-embeds)."
                )
        return {name: array.cpu().numpy() for name, array in arrays.items()}

    def _check_space(self, part: dict[str, np.ndarray], count: int):
        size = sum(array[0].nbytes for array in part.values())
        free = shutil.disk_usage(self.store.directory).free
        self._tell(
            f"{count:,} pictures are to be computed: {format_size(size)} each, {format_size(size * count)} in all; "
            f"{format_size(free)} are free in {self.store.directory}."
        )
        if size * count > free:
            raise OSError(
                f"{self.store.directory} has {format_size(free)} of free space, but the index needs "
                f"{format_size(size * count)} more. Free some, or leave out the tower's output (store_embeds)."
            )

    def _tell(self, text: str):
        if self.show_progress:
            tqdm.write(printable(text), file=sys.stderr)
