"""A callback that tells a dataset which epoch it is."""

from collections.abc import Iterator

from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers.trainer_callback import TrainerCallback

from .pairs import ImageTextPairs


class SetEpochCallback(TrainerCallback):
    """
    Calls `set_epoch` of the [`ImageTextPairs`] that a `Trainer` trains on, also inside a `ConcatDataset` or `Subset`.
    accelerate only does so if no sampler takes the call: not in several processes, and not in the first epoch after a
    resumption.
    """

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        sources = [] if train_dataloader is None else [p.source for p in _pairs_inside(train_dataloader.dataset)]
        if len(set(sources)) < len(sources):
            raise ValueError(
                f"{len(sources)} ImageTextPairs are joined, but their image ids can't be told apart: give each a "
                "name, ImageTextPairs(..., source=...)."
            )

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if train_dataloader is not None:
            for pairs in _pairs_inside(train_dataloader.dataset):
                pairs.set_epoch(int(state.epoch or 0))


def _pairs_inside(dataset: Dataset) -> Iterator[ImageTextPairs]:
    if isinstance(dataset, ImageTextPairs):
        yield dataset
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _pairs_inside(part)
    elif isinstance(dataset, Subset):
        yield from _pairs_inside(dataset.dataset)
