"""An index is brought up to date: what is new or has changed is computed, what is gone is dropped."""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils import logging

from ..jobs.errors import printable
from ..models.modeling_retrieval import Blip2ImageTextPreTrainedModel
from .pictures import PictureInputs, collate
from .store import Store


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
        self.batch_size = batch_size
        self.rows_per_shard = rows_per_shard
        self.num_workers = num_workers
        self.show_progress = show_progress

    def update(self, found: dict[str, list[int]]):
        """Makes the index that of the pictures that were found, with their sizes and mtimes."""
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

    def _compute(self, stats: dict[str, list[int]]):
        """Computes pictures and adds them, shard by shard."""
        if not stats:
            return
        paths = list(stats)
        broken, rows, parts, is_checked = self.store.read_broken(), [], [], False
        with logging.tqdm(total=len(paths), desc="Pictures", unit="picture", disable=not self.show_progress) as bar:
            for readable, pixel_values, unreadable in self._load(paths):
                broken |= {paths[i]: (*stats[paths[i]], reason) for i, reason in unreadable}
                if pixel_values is not None:
                    part = self._features([paths[i] for i in readable], pixel_values)
                    if not is_checked:
                        self._check_space(part, len(paths))
                        is_checked = True
                    rows += [paths[i] for i in readable]
                    parts.append(part)
                if len(rows) >= self.rows_per_shard:
                    self.store.write_broken(broken)
                    self.store.add(rows, [stats[path] for path in rows], parts)
                    rows, parts = [], []
                bar.update(len(readable) + len(unreadable))
        self.store.write_broken(broken)
        if rows:
            self.store.add(rows, [stats[path] for path in rows], parts)

    def _load(self, paths: list[str]) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(
            PictureInputs(self.folder, paths, self.image_processor),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=collate,
            generator=torch.Generator(),  # the global one is left alone
        )

    @torch.inference_mode()
    def _features(self, paths: list[str], pixel_values: torch.Tensor) -> dict[str, np.ndarray]:
        """What is stored of pictures, in float16."""
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
                    f"The {name} of {paths[0]} or one of the {len(paths) - 1} pictures after it are not finite in "
                    f"float16. {advice}"
                )
        return {name: array.cpu().numpy() for name, array in arrays.items()}

    def _check_space(self, part: dict[str, np.ndarray], count: int):
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
