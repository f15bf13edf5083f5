"""Pictures and texts for training, one pair in each row: datasets with a length, and streams."""

import copy
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets.distributed import split_dataset_by_node
from transformers.utils import logging

from ..jobs.errors import shorten
from ..jobs.fingerprints import fingerprint, sampled_rows, stable_repr
from ..models.processing_blip2 import IMAGE_TOKEN
from ..models.video_loading import NUM_FRAMES
from .bad_rows import (
    ID_MISSING,
    PICTURE_MISSING,
    TEXT_EMPTY,
    TEXT_MISSING,
    TEXT_UNREADABLE,
    BadPictureError,
    BadRow,
    BadRowError,
    RowName,
    count_kinds,
    find_file,
    open_row_picture,
)
from .feature_cache import EMBEDS, FEATURE_COLUMNS, ROW, SHAPE, read_cached_features
from .rows import (
    ROW_NUMBER,
    check_id,
    column_names,
    get_column,
    picture_bytes,
    read_row_numbers,
    seeded_generator,
    select_columns,
    stable_hash,
)
from .text import LONE_SURROGATE, clean_caption, clean_question, split_prefix, texts_of


logger = logging.get_logger(__name__)


@dataclass(eq=False, repr=False)
class _Pairs:
    """Base class of both kinds of pairs: makes an item of a row."""

    dataset: Any
    image_column: str = "image"
    text_column: str = "caption"
    transform: Callable | None = None
    id_column: str | None = None
    clean_text: bool = True
    seed: int = 0
    train: bool = True
    source: str | None = None
    prompt: str | None = None
    prompt_column: str | None = None
    prefix_lm: bool = False
    allow_urls: bool | Sequence[str] = field(default=False, kw_only=True)
    num_frames: int | None = field(default=None, kw_only=True)

    # Fields of ImageTextPairs alone
    images = None
    images_column = "image"

    def __post_init__(self):
        _check_prompt(self.prompt, self.prompt_column)
        columns = column_names(self.dataset if self.images is None else self.images)
        self.has_features = columns is not None and EMBEDS in columns
        if self.has_features and self.transform is not None:
            raise ValueError(_TRANSFORM_OF_FEATURES)
        self.picture_column = self.image_column if self.images is None else self.images_column
        picture_columns = FEATURE_COLUMNS if self.has_features else (self.picture_column,)
        own_columns = [name for name in (self.text_column, self.id_column, self.prompt_column) if name is not None]
        if self.images is None:
            self.dataset = _select(self.dataset, [*picture_columns, *own_columns])
        else:
            self.dataset = _select(self.dataset, [self.image_column, *own_columns])
            self.images = _select(self.images, picture_columns)
        self._called = self.source  # by messages
        # Shared memory: workers that outlive an epoch see the next one
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __setstate__(self, state: dict[str, Any]):
        # Not the dict itself, because copy.copy passes that of the original
        self.__dict__.update(state)
        self._epoch.share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    @property
    def frames_per_video(self) -> int | None:
        """Return `num_frames` or, of stored features, how many there are of each video; `None` if there are none."""
        return self.num_frames

    def set_epoch(self, epoch: int):
        """
        Set the epoch. Each one draws other crops, captions and views.

        Args:
            epoch (`int`):
                Its number, from 0.
        """
        self._epoch.fill_(epoch)
        if isinstance(self.dataset, datasets.IterableDataset):
            self.dataset.set_epoch(epoch)

    def _item(self, row: Mapping, number: int, epoch: int) -> dict[str, Any]:
        generator = seeded_generator(self.seed, epoch, number if self.source is None else f"{self.source}/{number}")
        picture_row, image_id = self._picture_row(row, number)
        picture = None if EMBEDS in picture_row else get_column(picture_row, self.picture_column)
        name = RowName(number, find_file(row, picture), self._called)
        item: dict[str, Any] = {"row": name}
        if EMBEDS in picture_row:
            item["image_embeds"] = self._features(picture_row, generator)
        else:
            num_frames = self.num_frames or NUM_FRAMES
            image = open_row_picture(picture, name, self.picture_column, self.allow_urls, num_frames)
            item["image"] = image if self.transform is None else self._transformed(image, generator)
        item |= self._texts(row, name, generator)
        if self.id_column is not None:
            image_id = self._id(get_column(row, self.id_column), name)
        item["image_id"] = _hash_id(image_id if self.source is None else f"{self.source}/{image_id}", name)
        return item

    def _transformed(self, image: Any, generator: torch.Generator) -> Any:
        """Return what the transform makes of a picture, or of each frame of a video, which get the same crop."""
        if not isinstance(image, list):
            return self.transform(image, generator)
        state, frames = generator.get_state(), []
        for frame in image:
            generator.set_state(state)
            frames.append(self.transform(frame, generator))
        return frames

    def _id(self, value: Any, name: RowName) -> int | str:
        if value is None:
            raise BadRowError(f"{name.at_start} has no id in column {self.id_column!r}.", name, ID_MISSING)
        return check_id(value, name.at_start, self.id_column)

    def _picture_row(self, row: Mapping, number: int) -> tuple[Mapping, int]:
        """Return the row that has the picture, and its number."""
        return row, number

    def _features(self, row: Mapping, generator: torch.Generator) -> torch.Tensor:
        if self.transform is not None:
            raise ValueError(_TRANSFORM_OF_FEATURES)
        views = row[SHAPE][0]
        return read_cached_features(row, int(torch.randint(views, (), generator=generator)) if self.train else 0)

    def _texts(self, row: Mapping, name: RowName, generator: torch.Generator) -> dict[str, str]:
        """Return `text` and, if there is one, `prompt`."""
        texts = self._own_texts(row, name, self.clean_text)
        is_drawn = self.train and not isinstance(get_column(row, self.text_column), str)
        text = texts[int(torch.randint(len(texts), (), generator=generator)) if is_drawn else 0]
        if self.prompt is None and not self.prefix_lm:
            return {"text": text}
        prompt = self.prompt or ""
        if self.prompt_column is not None:
            value = get_column(row, self.prompt_column)
            clean = clean_question if self.clean_text else None
            prompt = prompt.replace("{}", self._check(value, self.prompt_column, name, clean))
        if self.prefix_lm and self.train:
            prefix, text = split_prefix(text, generator)
            prompt = f"{prompt.rstrip()} {prefix}".lstrip() if prefix else prompt
        return {"text": text, "prompt": prompt}

    def _own_texts(self, row: Mapping, name: RowName, cleaned: bool) -> list[str]:
        """Return the texts of a row. Those after a question are answers, which are not cleaned."""
        value = get_column(row, self.text_column)
        clean = clean_caption if cleaned and self.prompt_column is None else None
        return [self._check(text, self.text_column, name, clean) for text in texts_of(value) or [value]]

    def _check(self, text: Any, column: str, name: RowName, clean: Callable[[str], str] | None) -> str:
        found = f"{name.at_start} has {shorten(text)} in column {column!r}"
        if not isinstance(text, str):
            expected = "a text, or a list of texts," if column == self.text_column else "a text"
            raise BadRowError(f"{found}; {expected} was expected.", name, TEXT_MISSING)
        if LONE_SURROGATE.search(text):
            raise BadRowError(
                f"{found}, with a lone surrogate; a text that UTF-8 can hold was expected.", name, TEXT_UNREADABLE
            )
        cleaned = text if clean is None else clean(text)
        if not cleaned.strip():
            what = f"{shorten(text)}, of which cleaning leaves nothing," if text.strip() else "an empty text"
            raise BadRowError(
                f"{name.at_start} has {what} in column {column!r}; at least one word was expected.", name, TEXT_EMPTY
            )
        return cleaned


@dataclass(eq=False, repr=False)
class ImageTextPairs(_Pairs, torch.utils.data.Dataset):
    r"""
    Pictures, or their stored features, with their texts. Random choices (the crop, one of several texts, one of the
    stored views) follow from `seed`, the epoch and the row. A resumed run, with any number of workers, therefore sees
    the same data as an undisturbed one.

    An item holds `image` (`PIL.Image.Image`, mode RGB, or a list of the frames of a video) or `image_embeds`
    (`torch.Tensor` of shape `(features, width)` or `(frames, features, width)`, in the stored dtype; its memory must
    not be written to), `text` (`str`), `image_id` (`int`) and `row` (`str`), its
    name in errors, such as `row 17 (dogs/17.jpg)`; with a prompt or prefixes also `prompt` (`str`), which stands in
    front of the text.

    `Trainer` and accelerate tell the epoch to a dataset only in one process, in a run that was not resumed: add
    [`SetEpochCallback`] to the `Trainer`, or call `set_epoch` in a loop of your own.

    Args:
        dataset (`datasets.Dataset` or sequence of `dict`):
            The rows. With a column `image_embeds`, as from [`load_cached_features`], pictures are not read. Errors
            name the number of a row here or, in a part that [`hold_out`] made, in the whole.
            A function of `with_transform` gets opened pictures or, from a column that has URLs, pictures as they are
            stored, which [`~image_loading.load_image`] opens.
        image_column (`str`, *optional*, defaults to `"image"`):
            Column of the pictures: anything that [`~image_loading.load_image`] takes; or of the videos: files with
            the ending of one, and lists of pictures.
        text_column (`str`, *optional*, defaults to `"caption"`):
            Column of the texts: a string, or a list of strings, or of dicts with `answer`, of which one is drawn.
            `json.caption` is the field `caption` of the column `json`.
        transform (`Callable`, *optional*):
            `transform(image, generator)` on each picture, such as [`RandomResizedCropAndFlip`].
        id_column (`str`, *optional*):
            Column of ids that are equal for rows of the same picture: integers, or strings, of which a hash is taken.
            `None`: the number of the row, which rows of another dataset have too (see `source`).
        clean_text (`bool`, *optional*, defaults to `True`):
            Whether captions go through [`clean_caption`], and questions through [`clean_question`], as in LAVIS and
            therefore in evaluation. Answers (texts with a `prompt_column`) stay as they are.
        seed (`int`, *optional*, defaults to 0):
            Seed of all random choices.
        train (`bool`, *optional*, defaults to `True`):
            Whether to draw one of several texts and one of the stored views. `False`, for evaluation, takes the first
            text and view 0, the picture itself.
        source (`str`, *optional*):
            Name of the dataset, if several are joined, so that equal numbers are not taken for the same image.
        prompt (`str`, *optional*):
            Text in front of the text to learn: `"a photo of"` or, with `{}` for the value of `prompt_column`,
            `"Question: {} Answer:"`.
        prompt_column (`str`, *optional*):
            Column of the questions: a string each, which goes through [`clean_question`] if `clean_text`. The texts
            are then answers.
        prefix_lm (`bool`, *optional*, defaults to `False`):
            Whether to move the beginning of the text, up to a random word, to the prompt ([`split_prefix`]): for
            encoder-decoders. With `train=False` nothing is moved.
        images (`datasets.Dataset` or sequence of `dict`, *optional*):
            The pictures, or the features of [`load_cached_features`], if rows share them. `image_column` of `dataset`
            then holds the number of a row of `images` (for features, of the row from which they were made). It is also
            the `image_id`: rows with the same picture are no negatives of each other.
        images_column (`str`, *optional*, defaults to `"image"`):
            Column of the pictures in `images`.
        allow_urls (`bool` or `list[str]`, *optional*, defaults to `False`):
            Which URLs in the rows are fetched: none, with `True` those of public addresses, with a list also those of
            the hosts in it.
        num_frames (`int`, *optional*):
            Frames of each video, spread evenly ([`~video_loading.frame_numbers`]); by default 4. Stored features are
            of as many as there were when they were stored.

    Raises:
        BadRowError: if the picture of a row is missing, or a text, any one of several, is missing or empty, or the row
            has no id; the message names row and file.
        ImageLoadError: if a picture is missing or can't be read: a `BadRowError` too.
        ValueError: if a column is missing, or arguments do not fit.

    Example:

    ```python
    >>> pairs = ImageTextPairs(load_dataset("parquet", data_files="pictures.parquet", split="train"))
    >>> pairs[0]
    {'row': 'row 0', 'image': <PIL.Image.Image image mode=RGB size=640x480>, 'text': 'a dog', 'image_id': 0}
    ```"""

    images: datasets.Dataset | Sequence[Mapping] | None = None
    images_column: str = "image"

    def __post_init__(self):
        dataset, images = self.dataset, self.images
        if isinstance(dataset, datasets.IterableDataset) or isinstance(images, datasets.IterableDataset):
            raise ValueError("A datasets.IterableDataset has no length and no rows by number: use ImageTextStream.")
        super().__post_init__()
        # For each row that was not left out, the place of its features
        self._places: dict[int, int] | None = None
        if self.has_features and self.images is not None:
            self.images = self.images.with_format("arrow")
            if ROW in column_names(images):
                self._places = {row: place for place, row in enumerate(images.with_format(None)[ROW])}
        elif self.has_features:
            self.dataset = self.dataset.with_format("arrow")
        self._kept: np.ndarray | None = None
        # For a part of a dataset, such as one that was held out, the number of each row in the whole
        self._numbers = read_row_numbers(dataset)

    @property
    def frames_per_video(self) -> int | None:
        if not self.has_features:
            return self.num_frames
        shape = _read_row(self.dataset if self.images is None else self.images, 0)[SHAPE]
        return shape[1] if len(shape) == 4 else None

    def __len__(self) -> int:
        return len(self.dataset) if self._kept is None else len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = _read_row(self.dataset, self.place(index))
        return self._item(row, self.row_number(index), self.epoch)

    def place(self, index: int) -> int:
        """
        Return the index of an item's row in the given dataset: `dataset[pairs.place(index)]`.

        Args:
            index (`int`):
                Index of an item.

        Returns:
            `int`.

        Raises:
            IndexError: if there is no such item.
        """
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no row {index}: the dataset has {len(self)}.")
        return index % len(self) if self._kept is None else int(self._kept[index])

    def row_number(self, index: int) -> int:
        """
        Return the number of an item's row in the dataset, which differs from `index` if rows before it are left out.
        In a part that [`hold_out`] made, it is the number in the dataset that was split.

        Args:
            index (`int`):
                Index of an item; a negative one counts from the end.

        Returns:
            `int`: the number.

        Raises:
            IndexError: if there is no such item.
        """
        place = self.place(index)
        return place if self._numbers is None else int(self._numbers[place])

    def different_pictures(self, count: int) -> list[int]:
        """
        Return items that show different pictures, spread over the dataset if possible.

        Args:
            count (`int`):
                Number of items.

        Returns:
            `list[int]`: their indices in ascending order; fewer if there are fewer pictures.
        """
        spread = [len(self) * number // count for number in range(count)] if count < len(self) else []
        found: dict[str, int] = {}
        for index in dict.fromkeys([*spread, *range(len(self))]):
            if len(found) == count:
                break
            found.setdefault(self._picture_key(index), index)
        return sorted(found.values())

    def _picture_key(self, index: int) -> str:
        """Return a hash that is equal for items of the same picture."""
        row = _read_row(self.dataset, self.place(index))
        column = self.id_column or self.picture_column if self.images is None else self.image_column
        if self.id_column is None and self.images is None and self.has_features:
            return fingerprint([row[EMBEDS]])
        return fingerprint([picture_bytes(get_column(row, column))])

    def references(self, cleaned: bool = True) -> list[list[str]]:
        """
        Read all texts of each item, in the order of the items, without the pictures.

        Args:
            cleaned (`bool`, *optional*, defaults to `True`):
                Whether captions are cleaned, as for training, or as they stand in the data.

        Returns:
            `list[list[str]]`: for each item the texts from which one is drawn.

        Raises:
            BadRowError: if a text is missing or empty.
        """
        rows = _select(self.dataset, [self.text_column])
        names = (RowName(self.row_number(index), source=self._called) for index in range(len(self)))
        return [
            self._own_texts(_read_row(rows, self.place(index)), name, cleaned and self.clean_text)
            for index, name in enumerate(names)
        ]

    def without(self, bad: Iterable[BadRow | int]) -> "ImageTextPairs":
        """
        Return the same rows except some. The others keep their numbers, and therefore their ids and random choices.

        Args:
            bad (iterable of [`BadRow`] or `int`):
                What [`check_pairs`] found, or numbers of rows.

        Returns:
            [`ImageTextPairs`]: a copy with an epoch of its own.

        Raises:
            ValueError: if the dataset has no such row, or all rows are left out.
        """
        left_out = {row.row if isinstance(row, BadRow) else operator.index(row) for row in bad}
        size = len(self.dataset)
        numbers = np.arange(size) if self._numbers is None else self._numbers
        if unknown := np.setdiff1d(list(left_out), numbers).tolist():
            raise ValueError(f"There is no row {unknown[0]:.0f}: the dataset has {size}. Give rows of this dataset.")
        places = np.arange(size) if self._kept is None else self._kept
        kept = places[~np.isin(numbers[places], list(left_out))]
        if len(kept) == 0 and left_out:
            raise ValueError(f"All {len(self)} rows are bad, none is left. report_bad_rows says why.")
        pairs = copy.copy(self)
        pairs._kept, pairs._epoch = kept, self._epoch.clone().share_memory_()
        return pairs

    def fingerprint(self) -> str:
        """
        Return a hash of the number of rows and of some stored rows, including those that are left out.

        Returns:
            `str`: 32 hexadecimal digits, which do not depend on where the files of the dataset lie.
        """
        return fingerprint(
            _row_bytes(rows, number, self.picture_column)
            for rows in (self.dataset, [] if self.images is None else self.images)
            for number in sampled_rows(len(rows))
        )

    def _picture_row(self, row: Mapping, number: int) -> tuple[Mapping, int]:
        if self.images is None:
            return row, number
        value = get_column(row, self.image_column)
        name = RowName(number, find_file(row, None), self.source)
        try:
            image_number = operator.index(value)
        except TypeError:
            image_number = -1
        place = image_number if self._places is None else self._places.get(image_number, -1)
        if not 0 <= place < len(self.images):
            last = len(self.images) - 1 if self._places is None else max(self._places, default=-1)
            left_out = "," if self._places is None else ", except those that cache_features left out,"
            raise BadPictureError(
                f"{name.at_start} has {value!r} in column {self.image_column!r}; the number of a row of images, "
                f"0 to {last}{left_out} was expected.",
                name,
                PICTURE_MISSING,
            )
        return _read_row(self.images, place), image_number


@dataclass(eq=False, repr=False)
class ImageTextStream(_Pairs, torch.utils.data.IterableDataset):
    r"""
    The items of [`ImageTextPairs`], from rows that come one after the other: a `datasets.IterableDataset`, such as any
    dataset of the Hub with `streaming=True`, and WebDataset's tar files
    (`load_dataset("webdataset", data_files="shards/*.tar", split="train", streaming=True)`, with `image_column="jpg"`
    and `text_column="txt"` or `"json.caption"`).

    Each worker of a `DataLoader` reads its share, of the shards of a `datasets.IterableDataset`, or of the rows of
    anything else. The order of the rows, and with `datasets` the random choices, also depend on the number of workers:
    resume a run with the same number. [`~training.Blip2Trainer`] divides a stream that repeats among processes. For
    another stream, and in `Trainer`, set `accelerator_config={"dispatch_batches": False}`: each process then reads all
    rows, and keeps its share.

    `Trainer` takes a stream for one epoch, and a resumed run skips rows that were seen: give it a stream that repeats.

    Args:
        dataset (`datasets.IterableDataset` or iterable of `dict`):
            The rows, which are iterated over once in each epoch.
        image_column, text_column, transform, id_column, clean_text, seed, train, source, prompt, prompt_column, \
prefix_lm, allow_urls, num_frames:
            As in [`ImageTextPairs`]. Without `id_column`, `image_id` is the running number of the row, which no other
            worker or process uses.
        skip_broken (`bool`, *optional*, defaults to `False`):
            Whether rows that raise [`BadRowError`] are left out, with a warning that counts them by kind.
        check (`Callable`, *optional*):
            Function of an item that raises [`BadRowError`] if no batch can be made of it:
            [`LanguageModelCollator.check`].
        repeat (`bool`, *optional*, defaults to `False`):
            Whether the rows start again, as those of the next epoch, without end.
        rank (`int`, *optional*, defaults to 0), world_size (`int`, *optional*, defaults to 1):
            Rank of this process, and number of processes, in a loop of your own: each process then reads its share.

    Raises:
        BadRowError: if the picture of a row is missing or can't be read, or its text is missing or empty; the message
            has its file (for WebDataset, shard and key) and its number, which is a running one (`row 3 of the stream`)
            in a `datasets.IterableDataset`, because the number in a file is not known.
        ValueError: if the rows can be read only once, or a column is missing, or arguments do not fit.
    """

    skip_broken: bool = False
    check: Callable[[dict[str, Any]], Any] | None = None
    repeat: bool = False
    rank: int = 0
    world_size: int = 1

    def __post_init__(self):
        if isinstance(self.dataset, Iterator):
            raise ValueError(
                f"A {type(self.dataset).__name__} can be read only once. Give a list, or an object whose __iter__ "
                "starts again, or datasets.IterableDataset.from_generator."
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank={self.rank} of world_size={self.world_size}: 0 to {self.world_size - 1} was expected."
            )
        super().__post_init__()
        if isinstance(self.dataset, datasets.IterableDataset):
            if self.world_size > 1:
                self.dataset = split_dataset_by_node(self.dataset, self.rank, self.world_size)
            if self.source is None and ROW_NUMBER not in (self.dataset.column_names or ()):
                # Shards and shuffling hide the number that a row has in its file
                self._called = "the stream"

    def shared_out(self, rank: int, world_size: int) -> "ImageTextStream":
        """
        Return the share of one process.

        Args:
            rank (`int`):
                Rank of the process.
            world_size (`int`):
                Number of processes.

        Returns:
            [`ImageTextStream`]: a copy, with rows that no other process has.
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
        skipped: Counter = Counter()
        for number, row in self._numbered_rows():
            try:
                item = self._item(row, number, epoch)
                if self.check is not None:
                    self.check(item)
            except BadRowError as error:
                if not self.skip_broken:
                    raise
                skipped[error.kind] += 1
                logger.warning(f"Left out {skipped.total()} so far ({count_kinds(skipped)}); the last one: {error}")
            else:
                yield item

    def _numbered_rows(self) -> Iterator[tuple[int, Mapping]]:
        """Yield the rows of this worker, with numbers that no other worker or process uses."""
        worker = torch.utils.data.get_worker_info()
        worker_id, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        share, num_shares = worker_id * self.world_size + self.rank, num_workers * self.world_size
        if isinstance(self.dataset, datasets.IterableDataset):
            # Already split between processes; it splits itself between workers
            for count, row in enumerate(self.dataset):
                yield row.get(ROW_NUMBER, count * num_shares + share), row
        else:
            for number, row in enumerate(self.dataset):
                if number % num_shares == share:
                    yield row.get(ROW_NUMBER, number), row


_TRANSFORM_OF_FEATURES = (
    "The rows have features in place of pictures, which a transform can't change. Give no transform; cache_features "
    "can store several views of each picture."
)


def _check_prompt(prompt: str | None, prompt_column: str | None):
    has_place = prompt is not None and "{}" in prompt
    if has_place and prompt_column is None:
        raise ValueError(f"prompt={prompt!r} has a place, {{}}, but no prompt_column was given. Name the column.")
    if prompt_column is not None and not has_place:
        raise ValueError(
            f"prompt_column={prompt_column!r} was given with prompt={prompt!r}, which has no place, {{}}, for it. "
            "Give a prompt such as 'Question: {} Answer:'."
        )
    if prompt is not None and IMAGE_TOKEN in prompt:
        raise ValueError(
            f"prompt={prompt!r} has a mark, {IMAGE_TOKEN}. Leave it out: the picture stands in front of the prompt."
        )


def _select(dataset: Any, columns: Iterable[str]) -> Any:
    """Select the columns that are read, and those that say where a row of WebDataset comes from."""
    known = column_names(dataset) or []
    origin = [name for name in ("__key__", "__url__", ROW_NUMBER) if name in known]
    return select_columns(dataset, [*columns, *origin])


def _row_bytes(rows: Any, number: int, picture_column: str) -> bytes:
    """Return a row as it is stored, with a part of a picture that is a file, and how many there are."""
    values = {n: v.to_pybytes() if isinstance(v, pa.Buffer) else v for n, v in _read_row(rows, number).items()}
    values = {n: picture_bytes(v) if n == picture_column else v for n, v in values.items()}
    return stable_repr((len(rows), number, values)).encode("utf-8", "surrogatepass")


def _read_row(rows: Any, number: int) -> Mapping:
    row = rows[number]
    if not isinstance(row, pa.Table):
        return row
    # Features stay in the file that is mapped into memory
    return {n: _stored_bytes(row[n]) if n == EMBEDS else row[n][0].as_py() for n in row.column_names}


def _stored_bytes(column: pa.ChunkedArray) -> pa.Buffer:
    """Return the bytes of a column of one row, without the copy that a scalar of Arrow would be."""
    array = column.chunk(0)
    _, offsets, data = array.buffers()
    kind = np.dtype(np.int64 if pa.types.is_large_binary(array.type) else np.int32)
    start, stop = np.frombuffer(offsets, kind, count=2, offset=array.offset * kind.itemsize).tolist()
    return data.slice(start, stop - start)


def _hash_id(value: int | str, name: RowName) -> int:
    """Return an id of 64 bits: the integer itself, or the hash of a string."""
    if isinstance(value, str):
        return stable_hash(value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name.at_start} has the id {value}, which does not fit into 64 bits. Give it as a string.")
    return value
