"""Pictures and texts for training, one pair a row: data sets with a length, and streams."""

import copy
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets.distributed import split_dataset_by_node
from transformers.utils import logging

from ..image_loading import ImageLoadError
from .feature_cache import EMBEDS, FEATURE_COLUMNS, SHAPE, read_cached_features
from .rows import column_names, get_column, open_image, seeded_generator, select_columns, stable_hash
from .text import clean_caption


logger = logging.get_logger(__name__)


class _Pairs:
    """What a row becomes, however it is read."""

    def __init__(
        self,
        dataset: Any,
        image_column: str,
        text_column: str,
        transform: Callable | None,
        id_column: str | None,
        clean_text: bool,
        seed: int,
        train: bool,
        source: str | None,
    ):
        columns = column_names(dataset)
        self.has_features = columns is not None and EMBEDS in columns
        if self.has_features and transform is not None:
            raise ValueError(_TRANSFORM_OF_FEATURES)
        image_columns = FEATURE_COLUMNS if self.has_features else (image_column,)
        text_columns = (text_column,) if id_column is None else (text_column, id_column)
        self.dataset = select_columns(dataset, (*image_columns, *text_columns), image_column)
        self.image_column = image_column
        self.text_column = text_column
        self.transform = transform
        self.id_column = id_column
        self.clean_text = clean_text
        self.seed = seed
        self.train = train
        self.source = source
        # Shared memory: workers that outlive an epoch see the next one
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __setstate__(self, state: dict[str, Any]):
        self.__dict__ = state
        self._epoch.share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int):
        """
        Tells which epoch begins: another one, other crops, captions and views.

        Args:
            epoch (`int`):
                Its number, from 0.
        """
        self._epoch.fill_(epoch)
        if isinstance(self.dataset, datasets.IterableDataset):
            self.dataset.set_epoch(epoch)

    def _item(self, row: Mapping, number: int, epoch: int) -> dict[str, Any]:
        generator = seeded_generator(self.seed, epoch, number if self.source is None else f"{self.source}/{number}")
        item: dict[str, Any] = {}
        if EMBEDS in row:
            item["image_embeds"] = self._features(row, generator)
        else:
            image = open_image(get_column(row, self.image_column), f"row {number}")
            item["image"] = image if self.transform is None else self.transform(image, generator)
        item["text"] = self._text(row, number, generator)
        image_id = number if self.id_column is None else get_column(row, self.id_column)
        item["image_id"] = _image_id(image_id if self.source is None else f"{self.source}/{image_id}", number)
        return item

    def _features(self, row: Mapping, generator: torch.Generator) -> torch.Tensor:
        if self.transform is not None:
            raise ValueError(_TRANSFORM_OF_FEATURES)
        views = row[SHAPE][0]
        return read_cached_features(row, int(torch.randint(views, (), generator=generator)) if self.train else 0)

    def _text(self, row: Mapping, number: int, generator: torch.Generator) -> str:
        text = get_column(row, self.text_column)
        if isinstance(text, Sequence) and not isinstance(text, (str, bytes)) and len(text) > 0:
            text = text[int(torch.randint(len(text), (), generator=generator)) if self.train else 0]
        if not isinstance(text, str):
            raise ValueError(
                f"Row {number} has {text!r} in column {self.text_column!r}; a text, or a list of texts, was expected."
            )
        return clean_caption(text) if self.clean_text else text


class ImageTextPairs(_Pairs, torch.utils.data.Dataset):
    r"""
    Pictures, or the features of them that were stored, with their texts. All that is drawn at random, which crop,
    which of several texts, which stored view, follows from `seed`, the epoch and the row: a run that is resumed, with
    however many workers, sees what it would have seen.

    An item holds `image` (`PIL.Image.Image`, mode RGB) or `image_embeds` (`torch.Tensor` of shape `(features, width)`,
    in the type that was stored; its memory is not to be written to), `text` (`str`) and `image_id` (`int`).

    `Trainer` and accelerate tell the epoch to a data set only in one process, in a run that was not resumed: add
    [`SetEpochCallback`] to the `Trainer`, or call `set_epoch` in a loop of your own.

    Args:
        dataset (`datasets.Dataset` or sequence of `dict`):
            The rows. With a column `image_embeds`, as [`load_cached_features`] gives, pictures are not read.
        image_column (`str`, *optional*, defaults to `"image"`):
            Column of the pictures: anything that [`~image_loading.load_image`] takes.
        text_column (`str`, *optional*, defaults to `"caption"`):
            Column of the texts: a string, or a list of strings, of which one is drawn. `json.caption` is the field
            `caption` of the column `json`.
        transform (`Callable`, *optional*):
            `transform(image, generator)` on each picture, such as [`RandomResizedCropAndFlip`].
        id_column (`str`, *optional*):
            Column that tells which rows show the same picture: integers, or strings, of which a hash is taken. `None`:
            the number of the row, which rows of another data set have too (see `source`).
        clean_text (`bool`, *optional*, defaults to `True`):
            Whether texts go through [`clean_caption`].
        seed (`int`, *optional*, defaults to 0):
            Seed of all that is drawn.
        train (`bool`, *optional*, defaults to `True`):
            Whether one of several texts, and any one of the stored views, is drawn. `False`, for evaluation, takes
            the first text and view 0, the picture itself.
        source (`str`, *optional*):
            Name of the data set, where several are joined: images of one are then told from those of another.

    Raises:
        ValueError: if a column is missing or holds something else.
        ImageLoadError: if a picture can't be read; the message names its row.

    Example:

    ```python
    >>> pairs = ImageTextPairs(load_dataset("parquet", data_files="pictures.parquet", split="train"))
    >>> pairs[0]
    {'image': <PIL.Image.Image image mode=RGB size=640x480>, 'text': 'a dog on the grass', 'image_id': 0}
    ```"""

    def __init__(
        self,
        dataset: datasets.Dataset | Sequence[Mapping],
        image_column: str = "image",
        text_column: str = "caption",
        transform: Callable | None = None,
        id_column: str | None = None,
        clean_text: bool = True,
        seed: int = 0,
        train: bool = True,
        source: str | None = None,
    ):
        if isinstance(dataset, datasets.IterableDataset):
            raise ValueError("A datasets.IterableDataset has no length and no rows by number: use ImageTextStream.")
        super().__init__(dataset, image_column, text_column, transform, id_column, clean_text, seed, train, source)
        if self.has_features:
            self.dataset = self.dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"There is no row {number}: the data set has {len(self)}.")
        number %= len(self)
        row = self.dataset[number]
        if self.has_features:
            # Features stay in the file that is mapped into memory
            row = {n: _stored_bytes(row[n]) if n == EMBEDS else row[n][0].as_py() for n in row.column_names}
        return self._item(row, number, self.epoch)


class ImageTextStream(_Pairs, torch.utils.data.IterableDataset):
    r"""
    The items of [`ImageTextPairs`], from rows that come one after the other: a `datasets.IterableDataset`, so any data
    set of the Hub with `streaming=True`, and WebDataset's tar files
    (`load_dataset("webdataset", data_files="shards/*.tar", split="train", streaming=True)`, with `image_column="jpg"`
    and `text_column="txt"` or `"json.caption"`).

    With workers of a `DataLoader`, each reads its share: of the shards of a `datasets.IterableDataset`, of the rows of
    anything else. The order of the rows, and with `datasets` what is drawn for each, follows from their number too: a
    run is to be resumed with as many. [`~training.Blip2Trainer`] shares out a stream that repeats among processes; for
    another, and in `Trainer`, set `accelerator_config={"dispatch_batches": False}`: each process then reads all rows,
    and keeps its share.

    `Trainer` takes a stream for one epoch, of which a resumed run skips what was seen: give it a stream that repeats.

    Args:
        dataset (`datasets.IterableDataset` or iterable of `dict`):
            The rows. It is iterated over once an epoch.
        image_column, text_column, transform, id_column, clean_text, seed, train, source:
            As in [`ImageTextPairs`]. Without `id_column`, `image_id` is the running number of the row, which no other
            worker or process uses.
        skip_broken (`bool`, *optional*, defaults to `False`):
            Whether rows whose picture can't be read are left out, with a warning that counts them.
        repeat (`bool`, *optional*, defaults to `False`):
            Whether the rows begin again, as those of the next epoch, without end.
        rank (`int`, *optional*, defaults to 0), world_size (`int`, *optional*, defaults to 1):
            Number of this process, and of all, in a loop of your own: each process then reads its share.

    Raises:
        ValueError: if the rows can be read but once, or a column is missing or holds something else.
        ImageLoadError: if a picture can't be read; the message has the running number of its row.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset | Iterable[Mapping],
        image_column: str = "image",
        text_column: str = "caption",
        transform: Callable | None = None,
        id_column: str | None = None,
        clean_text: bool = True,
        seed: int = 0,
        train: bool = True,
        source: str | None = None,
        skip_broken: bool = False,
        repeat: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ):
        if isinstance(dataset, Iterator):
            raise ValueError(
                f"A {type(dataset).__name__} can be read but once. Give a list, or an object whose __iter__ begins "
                "again, or datasets.IterableDataset.from_generator."
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} of world_size={world_size}: 0 to {world_size - 1} was expected.")
        if isinstance(dataset, datasets.IterableDataset) and world_size > 1:
            dataset = split_dataset_by_node(dataset, rank, world_size)
        super().__init__(dataset, image_column, text_column, transform, id_column, clean_text, seed, train, source)
        self.skip_broken = skip_broken
        self.repeat = repeat
        self.rank = rank
        self.world_size = world_size

    def shared_out(self, rank: int, world_size: int) -> "ImageTextStream":
        """
        The share of one process.

        Args:
            rank (`int`):
                Number of the process.
            world_size (`int`):
                Number of processes.

        Returns:
            [`ImageTextStream`]: a copy, whose rows are those of no other process.
        """
        share = copy.copy(self)
        share.rank, share.world_size = rank, world_size
        if isinstance(self.dataset, datasets.IterableDataset):
            share.dataset = split_dataset_by_node(self.dataset, rank, world_size)
        return share

    def __iter__(self) -> Iterator[dict[str, Any]]:
        first = self.epoch
        for epoch in itertools.count(first) if self.repeat else [first]:
            if epoch > first and isinstance(self.dataset, datasets.IterableDataset):
                self.dataset.set_epoch(epoch)
            is_empty = True
            for item in self._items(epoch):
                is_empty = False
                yield item
            if is_empty:
                return

    def _items(self, epoch: int) -> Iterator[dict[str, Any]]:
        skipped = 0
        for number, row in self._numbered_rows():
            try:
                item = self._item(row, number, epoch)
            except ImageLoadError as error:
                if not self.skip_broken:
                    raise
                skipped += 1
                logger.warning(f"Left out {skipped} so far; the last one: {error}")
            else:
                yield item

    def _numbered_rows(self) -> Iterator[tuple[int, Mapping]]:
        """The rows of this worker of this process, with numbers that no other one uses."""
        worker = torch.utils.data.get_worker_info()
        worker_id, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        share, num_shares = worker_id * self.world_size + self.rank, num_workers * self.world_size
        if isinstance(self.dataset, datasets.IterableDataset):
            # Has been split between processes, and splits itself between workers
            for count, row in enumerate(self.dataset):
                yield count * num_shares + share, row
        else:
            for number, row in enumerate(self.dataset):
                if number % num_shares == share:
                    yield number, row


_TRANSFORM_OF_FEATURES = (
    "The rows have features in place of pictures, which a transform can't change. Give none; cache_features stores "
    "several views of each picture."
)


def _stored_bytes(column: pa.ChunkedArray) -> pa.Buffer:
    """The bytes of a column of one row, where they lie: a scalar of Arrow would be a copy."""
    array = column.chunk(0)
    _, offsets, data = array.buffers()
    kind = np.dtype(np.int64 if pa.types.is_large_binary(array.type) else np.int32)
    start, stop = np.frombuffer(offsets, kind, count=2, offset=array.offset * kind.itemsize).tolist()
    return data.slice(start, stop - start)


def _image_id(value: Any, number: int) -> int:
    if isinstance(value, str):
        return stable_hash(value)
    try:
        value = operator.index(value)
    except TypeError:
        raise ValueError(f"Row {number} has the id {value!r}; an integer or a string was expected.") from None
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"Row {number} has the id {value}, which does not fit into 64 bits. Give it as a string.")
    return value
