"""Pictures and videos for a model, in batches: what can't be read stops nothing."""

import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from threading import Thread
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..models.image_loading import ImageLoadError, load_image_for
from ..models.video_loading import is_video, sample_frames


_BATCHES_AHEAD = 2

# Number of a picture, and the model's input for it or why it can't be read
PictureInput = tuple[int, torch.Tensor | str]


class PictureInputs(Dataset):
    """
    The model's input for each picture, or why it can't be read. A picture is anything that
    [`~image_loading.load_image`] takes; `pictures[i]` may raise an [`~image_loading.ImageLoadError`]. With
    `name="image"`, an error calls a picture `image 3 of 8`. A path is always told. With `num_frames`, a video (a
    file with the ending of one, or a list of pictures) is as many of its frames.
    """

    def __init__(
        self,
        pictures: Sequence | Dataset,
        image_processor: Any,
        name: str | None = None,
        num_frames: int | None = None,
    ):
        self.pictures = pictures
        self.image_processor = image_processor
        self.name = name
        self.num_frames = num_frames

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, number: int) -> PictureInput:
        name = None if self.name is None else f"{self.name} {number + 1} of {len(self)}"
        return number, prepare(lambda: self.open_picture(number), self.image_processor, name, self.num_frames)

    def open_picture(self, number: int) -> Any:
        """Return a picture, or what `load_image` makes one of."""
        return self.pictures[number]


class PictureStream(IterableDataset):
    """The same of pictures that come one after the other."""

    def __init__(
        self, pictures: Iterable, image_processor: Any, name: str | None = None, num_frames: int | None = None
    ):
        self.pictures = pictures
        self.image_processor = image_processor
        self.name = name
        self.num_frames = num_frames

    def __iter__(self) -> Iterator[PictureInput]:
        for number, picture in enumerate(self.pictures):
            name = None if self.name is None else f"{self.name} {number + 1}"
            yield number, prepare(lambda picture=picture: picture, self.image_processor, name, self.num_frames)


def prepare(
    open_picture: Callable[[], Any], image_processor: Any, name: str | None = None, num_frames: int | None = None
) -> torch.Tensor | str:
    """
    Return the model's input for a picture, of shape `(1, channels, height, width)`, or for the frames of a video, or
    why it can't be read.
    """
    try:
        picture = open_picture()
        is_row = num_frames is not None and is_video(picture)
        frames = sample_frames(picture, num_frames, name) if is_row else [picture]
        frames = [load_image_for(image_processor, frame, name) for frame in frames]
    except ImageLoadError as error:
        return str(error)
    return image_processor(images=frames, return_tensors="pt")["pixel_values"]


@dataclass
class PictureBatch:
    """
    Some pictures: their numbers, why some of them can't be read, by their number, and the model's input for the
    others, in their order, of shape `(num_images, channels, height, width)`; `None` if there are none. `counts` has
    the number of images of each of them: frames, or views.
    """

    numbers: list[int]
    errors: dict[int, str]
    # An array comes through a pipe: a container has often less shared memory than a batch of tensors needs
    arrays: np.ndarray | None
    counts: list[int]

    @property
    def readable(self) -> list[int]:
        """Return the numbers of the pictures that can be read."""
        return [number for number in self.numbers if number not in self.errors]

    @property
    def pixel_values(self) -> torch.Tensor | None:
        """Return `arrays` as a tensor."""
        return None if self.arrays is None else torch.from_numpy(self.arrays)

    @property
    def pictures(self) -> list[torch.Tensor]:
        """Return the input for each that can be read: three dimensions for a picture, four for a row of frames."""
        rows = [] if self.pixel_values is None else self.pixel_values.split(self.counts)
        return [row[0] if len(row) == 1 else row for row in rows]


def collate_pictures(items: Sequence[PictureInput]) -> PictureBatch:
    """
    Make a batch of pictures: of each its number, and its input of shape `(views, channels, height, width)` or why it
    can't be read.
    """
    readable = [value for _, value in items if isinstance(value, torch.Tensor)]
    shapes = {tuple(value.shape[1:]) for value in readable}
    if len(shapes) > 1:
        raise ValueError(
            f"The image processor made pictures of several sizes, {sorted(shapes)}, of the pictures {items[0][0]} to "
            f"{items[-1][0]}. Let it make them of one size, or take them one at a time with batch_size=1."
        )
    errors = {number: value for number, value in items if isinstance(value, str)}
    arrays = torch.cat(readable).numpy() if readable else None
    return PictureBatch([number for number, _ in items], errors, arrays, [len(value) for value in readable])


def load_ahead(dataset: Dataset, num_workers: int, **kwargs) -> Iterator:
    """
    Yield what `collate_fn` makes of the batches of a dataset, the next of which are made while the model computes.
    `num_workers` processes read the dataset; 0 takes a thread of this one, as does a dataset that is no sequence.
    `kwargs` are those of `DataLoader`, such as `batch_size` or `batch_sampler`.
    """
    num_workers = 0 if isinstance(dataset, IterableDataset) else num_workers
    loader = DataLoader(
        dataset,
        num_workers=num_workers,
        worker_init_fn=partial(begin_worker, Image.MAX_IMAGE_PIXELS),
        generator=torch.Generator(),  # the global one is left alone
        **{"collate_fn": collate_pictures, **kwargs},
    )
    return iter(loader) if num_workers else _in_a_thread(loader)


def split_rows(num_rows: int, rows_per_shard: int) -> list[range]:
    """Return the rows of each shard, a file that is written whole and not computed again after an interruption."""
    return [range(start, min(start + rows_per_shard, num_rows)) for start in range(0, num_rows, rows_per_shard)]


def load_shards(
    dataset: Dataset, shards: Sequence[range], batch_size: int, num_workers: int, **kwargs
) -> Iterator[Iterator]:
    """
    Read a dataset shard by shard: return an iterator of batches for each, which is read to its end before the next one
    is asked for. A batch lies within one shard, so that a shard does not depend on where a run began. `shards` are the
    rows of each, `kwargs` those of [`load_ahead`].
    """
    plan = [[rows[i : i + batch_size] for i in range(0, len(rows), batch_size)] for rows in shards]
    batches = load_ahead(dataset, num_workers, batch_sampler=list(itertools.chain(*plan)), **kwargs)
    return (itertools.islice(batches, len(own)) for own in plan)


def _in_a_thread(items: Iterable) -> Iterator:
    """Yield the same items, made in a thread before they are asked for."""
    iterator = iter(items)
    # Its thread is a daemon: neither Ctrl-C nor the end of the program waits for a picture
    with ThreadPool(1) as pool:
        waiting = deque(pool.apply_async(next, (iterator, None)) for _ in range(_BATCHES_AHEAD))
        while (item := waiting.popleft().get()) is not None:
            waiting.append(pool.apply_async(next, (iterator, None)))
            yield item


def begin_worker(max_pixels: int | None, worker: int):
    """Prepare a process that reads pictures, which does not know what its parent has set."""
    # Ctrl-C goes to all processes; a worker that it stops prints a traceback
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Image.MAX_IMAGE_PIXELS = max_pixels
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """End this process when its parent is gone: it would wait forever for someone to take its pictures."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
