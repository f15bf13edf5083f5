"""Approximate search with faiss: clusters of vectors propose pictures, which are then compared in full."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..jobs.atomic_files import atomic_file
from ..jobs.state_files import read_whole
from .store import UNREADABLE, Store


logger = logging.get_logger(__name__)

APPROXIMATE_FROM = 100_000  # pictures; reading all features for a query then takes more than a second

_CANDIDATES = 100  # pictures, at least, that are proposed
_MOST_CLUSTERS = 1024  # each vector is compared with all of them; with ever more, work would outgrow the index
_LAG = 100  # new pictures are one of so many before they are added, which reads and writes the whole index


def import_faiss() -> Any:
    """Return the module `faiss`, or raise an error that says how to install it."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError('approximate search needs faiss: pip install "blip2-hf[search]".') from error
    return faiss


def _import_or_warn(consequence: str) -> Any:
    try:
        return import_faiss()
    except ImportError as error:
        logger.warning(f"{consequence}: {error}")
        return None


class ApproximateIndex:
    """An index of vectors in faiss, which proposes pictures to compare with."""

    def __init__(self, store: Store):
        self.store = store

    def update(self, wanted: bool | None, show_progress: bool):
        """Add the pictures that it does not have, if they are many. If most are new, or many are gone, begin anew."""
        path, covered = self.store.approximate_file()
        count = len(self.store.rows)
        if not count or wanted is False or (wanted is None and path is None and count < APPROXIMATE_FROM):
            return
        if (faiss := _import_or_warn(f"Searches will compare with all {count:,} pictures")) is None:
            return
        if path is None or self._fits_no_more(faiss, path, covered):
            index, covered = self._train(faiss), 0
        elif (self.store.rows[:, 0] >= covered).sum() <= count // _LAG:
            return
        else:
            index = _read_index(faiss, path)
        self._add(index, self.store.rows[self.store.rows[:, 0] >= covered], show_progress)
        target = self.store.new_approximate_file(self.store.next_id())
        with atomic_file(target) as file:
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
        if path not in (None, target):
            path.unlink()

    def _fits_no_more(self, faiss: Any, path: Path, covered: int) -> bool:
        """Tell whether the pictures have changed so much that the clusters do not fit."""
        kept = int((self.store.rows[:, 0] < covered).sum())
        stored = _map_index(faiss, path).ntotal // self.store.description["num_query_tokens"]
        return stored - kept > kept // 4 or len(self.store.rows) > 2 * stored

    def _add(self, index: Any, new: np.ndarray, show_progress: bool):
        shards = np.split(new, np.unique(new[:, 1], return_index=True)[1][1:])
        for part in logging.tqdm(shards, desc="Approximate index", unit="shard", disable=not show_progress):
            ids, (shard, *_), rows = part.T
            vectors = self._vectors(shard, rows)
            index.add_with_ids(vectors, np.repeat(ids, len(vectors) // len(ids)))

    def _train(self, faiss: Any) -> Any:
        """Make clusters of vectors (IVF), each value in 8 bits, because candidates are compared in full afterwards."""
        num_queries, dim = self.store.description["num_query_tokens"], self.store.description["image_text_hidden_size"]
        total = len(self.store.rows) * num_queries
        clusters = min(max(1, int(total**0.5)), _MOST_CLUSTERS)
        index = faiss.index_factory(dim, f"IVF{clusters},SQ8", faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid, index.cp.max_points_per_centroid, index.cp.niter = 1, 64, 10
        generator, share = np.random.default_rng(0), min(1.0, 64 * clusters / total)
        sample = []
        for i, shard in enumerate(self.store.shards):
            vectors = self._vectors(i, shard.alive())
            sample.append(vectors[generator.permutation(len(vectors))[: max(1, round(share * len(vectors)))]])
        index.train(np.concatenate(sample))
        return index

    def _vectors(self, shard: int, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        features = self.store.read("features", shard, rows)
        return features.reshape(-1, features.shape[-1]).astype(np.float32)

    def propose(self, queries: torch.Tensor, count: int) -> np.ndarray | None:
        """
        Return the rows of candidates: those found, and those newer than the approximate index. Return `None` if there
        is no approximate index, or if it finds fewer than are wanted.
        """
        path, covered = self.store.approximate_file()
        if path is None:
            return None
        if (faiss := _import_or_warn("The approximate index is not used")) is None:
            return None
        index = _map_index(faiss, path)
        parameters = faiss.SearchParametersIVF(nprobe=min(index.nlist, max(32, index.nlist // 8)))
        # Another process may have added pictures that this one has not read
        is_gone = np.ones(max(covered, self.store.next_id()), bool)
        is_gone[self.store.rows[:, 0]] = False
        gone = np.flatnonzero(is_gone[:covered])
        if len(gone):
            selector = faiss.IDSelectorBatch(gone)
            parameters.sel = faiss.IDSelectorNot(selector)
        # As many vectors as these pictures have together: no fewer pictures are then found in clusters that have them
        vectors = max(4 * count, _CANDIDATES) * self.store.description["num_query_tokens"]
        _, ids = index.search(queries.float().cpu().numpy(), min(vectors, index.ntotal), params=parameters)
        is_candidate = np.isin(self.store.rows[:, 0], ids) | (self.store.rows[:, 0] >= covered)
        candidates = np.flatnonzero(is_candidate)
        return None if len(candidates) < min(count, len(is_candidate)) else candidates


def _map_index(faiss: Any, path: Path) -> Any:
    """Map the index into memory: a query reads an eighth of it."""
    return _read_index(faiss, path, faiss.IO_FLAG_MMAP)


def _read_index(faiss: Any, path: Path, *flags: int) -> Any:
    return read_whole(path, lambda path: faiss.read_index(str(path), *flags), UNREADABLE)
