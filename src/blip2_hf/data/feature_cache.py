"""The output of a frozen vision tower, computed once and stored: training then never runs the tower."""

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from torch import nn
from tqdm import tqdm
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from ..jobs.atomic_files import atomic_file, remove_leftovers, write_json
from ..jobs.batch_size import BatchSize
from ..jobs.fingerprints import check_settings_file, fingerprint, sampled_rows, sampled_weights, stable_repr
from ..jobs.inference import eval_mode
from ..jobs.output import check_still_there, format_size, only_writer
from ..jobs.picture_inputs import PictureBatch, PictureInput, load_shards, split_rows
from ..jobs.state_files import read_json, read_whole
from ..models.backbones import load_tower, measure_width
from ..models.configuration_blip2 import Blip2Config, Blip2QFormerConfig, is_convolutional, tower_hidden_size
from ..models.image_loading import ImageLoadError, check_reads_8_bit
from ..models.modeling_vision import build_vision_model
from ..models.video_loading import NUM_FRAMES
from .rows import check_dataset, open_frames, seeded_generator, select_columns


logger = logging.get_logger(__name__)

EMBEDS, SHAPE, DTYPE = FEATURE_COLUMNS = ("image_embeds", "image_embeds_shape", "image_embeds_dtype")
ROW = "image_embeds_row"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_DESCRIPTION = "cache.json"
_LARGEST_ARRAY = 2**31 - 1  # bytes of one binary array of Arrow
_LONGEST_WAIT = 60  # seconds, for another process that writes the description
_UNREADABLE = "Restore it, or delete the folder, and run cache_features again."


class VisionTower(nn.Module):
    r"""
    A vision tower without a Q-Former: all that [`cache_features`] needs, before there is a BLIP-2.

    Args:
        vision_model (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`]):
            Any tower of `AutoModel`, or a model that has one in it (CLIP, SigLIP, LLaVA, BLIP-2).
        vision_feature_layer (`int`, *optional*):
            Index into the tower's `hidden_states`; `None` takes its `last_hidden_state`.
    """

    def __init__(self, vision_model: str | os.PathLike | PreTrainedModel, vision_feature_layer: int | None = None):
        super().__init__()
        tower = load_tower(vision_model)
        width = tower_hidden_size(tower.config, vision_feature_layer) or measure_width(tower, vision_feature_layer)
        self.config = Blip2Config(
            vision_config=tower.config,
            qformer_config=Blip2QFormerConfig(encoder_hidden_size=width),
            vision_feature_layer=vision_feature_layer,
            vision_position_embedding=is_convolutional(tower.config),
        )
        self.vision_model = build_vision_model(self.config, tower)

    @property
    def device(self) -> torch.device:
        return self.vision_model.device

    def get_image_embeds(self, pixel_values: torch.Tensor) -> torch.Tensor:
        r"""
        Compute the tower's output.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`):
                Images.

        Returns:
            `torch.Tensor` of shape `(num_images, features, vision hidden_size)`: the tower's output, before the
            LayerNorm that follows it.
        """
        return self.vision_model(pixel_values).last_hidden_state


def cache_features(
    dataset: datasets.Dataset,
    model: nn.Module,
    processor: Any,
    folder: str | os.PathLike,
    image_column: str = "image",
    views: int = 1,
    transform: Callable | None = None,
    dtype: str = "bfloat16",
    batch_size: int = 32,
    rows_per_shard: int = 1000,
    seed: int = 0,
    num_workers: int = 0,
    skip_broken: bool = False,
    part_index: int = 0,
    num_parts: int = 1,
    allow_urls: bool | Sequence[str] | None = False,
    num_frames: int = NUM_FRAMES,
) -> Path:
    r"""
    Store the vision tower's output for each picture, or each frame of a video, in files that [`load_cached_features`]
    opens. The job can be stopped, or killed, and run again: finished files are kept, and the result is the same to the
    byte. Before it begins it tells how much disk space it needs.

    A row of the result has the other columns of `dataset`, and `image_embeds` (the bytes, little-endian, of an array
    of shape `image_embeds_shape`, `[views, features, width]` or, of videos, `[views, num_frames, features, width]`,
    and type `image_embeds_dtype`), and `image_embeds_row`, the number of the row in `dataset`: another one, once rows
    before it were left out.

    Args:
        dataset (`datasets.Dataset`):
            Rows with a picture. Another dataset is recognised by the number of rows, the columns and 32 of the rows.
        model ([`Blip2PreTrainedModel`] or [`VisionTower`]):
            The model whose `get_image_embeds` is stored. It computes on its own device and in its own dtype.
        processor ([`Blip2Processor`] or `BaseImageProcessor`):
            Processor that makes the model's input of a picture.
        folder (`str` or `os.PathLike`):
            Folder for the files: `shard-00000-of-00012.arrow` and so on, and `cache.json`, which describes them.
        image_column (`str`, *optional*, defaults to `"image"`):
            Column of the pictures: anything that [`~image_loading.load_image`] takes; or of the videos: files with
            the ending of one, and lists of pictures.
        views (`int`, *optional*, defaults to 1):
            Versions of each picture. The first is the picture itself, the others are made by `transform`.
        transform (`Callable`, *optional*):
            `transform(image, generator)`, such as [`RandomResizedCropAndFlip`]. Needed for more than one view.
        dtype (`str`, *optional*, defaults to `"bfloat16"`):
            `"bfloat16"`, `"float16"` or `"float32"`: the stored dtype.
        batch_size (`int`, *optional*, defaults to 32):
            Number of pictures that the tower takes at a time. It is halved if memory runs out.
        rows_per_shard (`int`, *optional*, defaults to 1000):
            Rows of a file: what is computed again after an interruption.
        seed (`int`, *optional*, defaults to 0):
            Seed, together with the row and the view, of the generator that `transform` is given.
        num_workers (`int`, *optional*, defaults to 0):
            Processes that load and prepare pictures.
        skip_broken (`bool`, *optional*, defaults to `False`):
            Whether to leave out rows whose picture can't be read, with a warning.
        part_index (`int`, *optional*, defaults to 0), num_parts (`int`, *optional*, defaults to 1):
            This process writes every `num_parts`-th file, from number `part_index` on: to share the work between
            devices and machines.
        allow_urls (`bool` or `list[str]`, *optional*, defaults to `False`):
            Which URLs in the rows are fetched: none, with `True` those of public addresses, with a list also those of
            the hosts in it.
        num_frames (`int`, *optional*, defaults to 4):
            Frames of each video, spread evenly ([`~video_loading.frame_numbers`]).

    Returns:
        `Path`: `folder`.

    Raises:
        ValueError: if the arguments do not fit, if `folder` holds features that were made otherwise, or if another
            run is writing the same part of them.
        OSError: if the disk has too little space, or files are gone at the end.
        ImageLoadError: if a picture can't be read; the message names its row.
    """
    _check_arguments(dataset, views, transform, dtype, rows_per_shard, part_index, num_parts)
    image_processor = processor.image_processor if isinstance(processor, ProcessorMixin) else processor
    check_reads_8_bit(image_processor)
    options = (transform, seed, skip_broken, allow_urls, num_frames)
    pictures = _Views(dataset, image_column, image_processor, views, *options)
    with eval_mode(model):
        shards = _Shards(Path(folder), pictures, model, dtype, rows_per_shard, batch_size)
        with only_writer(shards.folder / f".part-{part_index}-of-{num_parts}.lock", shards.folder):
            own = range(part_index, len(shards.rows), num_parts)
            shards.write(shards.prepare(own), num_workers)
            check_still_there([shards.folder / _DESCRIPTION, *(shards.paths[shard] for shard in own)], shards.folder)
    return shards.folder


def load_cached_features(folder: str | os.PathLike) -> datasets.Dataset:
    r"""
    Open what [`cache_features`] has written. Nothing is read before it is used: the files are mapped into memory.

    Args:
        folder (`str` or `os.PathLike`):
            The folder.

    Returns:
        `datasets.Dataset`: one row for each of the dataset's, in its order; `push_to_hub` shares it.

    Raises:
        FileNotFoundError: if there are no features, or files of them are missing.
    """
    folder = Path(folder)
    if not (folder / _DESCRIPTION).exists():
        raise FileNotFoundError(f"{folder} has no {_DESCRIPTION}, so no features. Write them with cache_features.")
    paths = _shard_paths(folder, read_json(folder / _DESCRIPTION, _UNREADABLE)["num_shards"])
    if missing := [path.name for path in paths if not path.exists()]:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of {len(paths)} files ({names}). Run cache_features with the same "
            "arguments: it writes those that are missing."
        )
    advice = "Delete it, and run cache_features with the same arguments, which writes it anew."
    return datasets.concatenate_datasets([read_whole(path, _open_shard, advice) for path in paths])


def check_feature_size(image_size: int, *data: str | os.PathLike | None):
    r"""
    Refuse features of pictures of another size than that of the processor, because the processor is saved with the
    model, which would later be given pictures of another size than in training.

    Args:
        image_size (`int`):
            Side of the squares that the processor makes.
        data (`str` or `os.PathLike`, *optional*):
            Data to learn from or to validate on. Only folders that [`cache_features`] wrote are checked.

    Raises:
        ValueError: if features were made of pictures of another size.
    """
    for name, description in _descriptions(data):
        sides = description["pixel_values"][1:]
        if set(sides) - {image_size}:
            made_of = "x".join(map(str, sides))
            raise ValueError(
                f"The features in {name} were made of pictures of {made_of} pixels, but image_size is {image_size}. "
                "Give the size of the features, or store features of that size with cache_features."
            )


def check_feature_settings(config: Blip2Config, *data: str | os.PathLike | None):
    r"""
    Refuse features of another layer of the tower than the model's, or with position embeddings that the model does not
    add, or without those that it adds. The model would later be given other features than in training.

    Args:
        config ([`Blip2Config`]):
            Configuration of the model.
        data (`str` or `os.PathLike`, *optional*):
            Data to learn from or to validate on. Only folders that [`cache_features`] wrote are checked.

    Raises:
        ValueError: if features were made otherwise.
    """
    for name, description in _descriptions(data):
        for setting, default in (("vision_feature_layer", None), ("vision_position_embedding", False)):
            found, expected = description.get(setting, default), getattr(config, setting)
            if found != expected:
                raise ValueError(
                    f"The features in {name} were made with {setting}={found}, but the model has {expected}. "
                    "Store them anew with cache_features, of this model or of the tower that it is made of."
                )


def _descriptions(data: Sequence[str | os.PathLike | None]) -> Iterator[tuple[str | os.PathLike, dict[str, Any]]]:
    """Yield those of the names that are folders of features, and what describes the features."""
    for name in filter(None, data):
        path = Path(name) / _DESCRIPTION
        if path.exists():
            yield name, read_json(path, _UNREADABLE)


def read_cached_features(row: Mapping, view: int = 0) -> torch.Tensor:
    r"""
    Return the features of one view, without a copy. The tensor lies in the memory of the row, which may be a mapped
    file, and must not be written to.

    Args:
        row (`Mapping`):
            `image_embeds` (`bytes` or a buffer of Arrow), `image_embeds_shape` and `image_embeds_dtype`.
        view (`int`, *optional*, defaults to 0):
            Index of the view; 0 is the picture itself.

    Returns:
        `torch.Tensor` of shape `(features, width)` or, of a video, `(num_frames, features, width)`, in the stored
        dtype.

    Raises:
        ValueError: if there is no such view, or the bytes do not have the size that they should.
    """
    views, *shape = row[SHAPE]
    dtype = DTYPES[row[DTYPE]]
    size = math.prod(shape) * dtype.itemsize
    buffer = pa.py_buffer(row[EMBEDS])
    if buffer.size != views * size:
        raise ValueError(
            f"{EMBEDS} has {buffer.size} bytes; {views * size} were expected for {row[SHAPE]} {row[DTYPE]} values."
        )
    if not 0 <= view < views:
        raise ValueError(f"There is no view {view}: the row has {views}.")
    # Not torch.frombuffer, which warns of read-only memory. Other views are not even read from the disk
    array = pa.Array.from_buffers(pa.uint8(), size, [None, buffer.slice(view * size, size)])
    return torch.from_dlpack(array).view(dtype).view(shape)


def _check_arguments(dataset, views, transform, dtype, rows_per_shard, part_index, num_parts):
    check_dataset(dataset, (*FEATURE_COLUMNS, ROW))
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: one of {', '.join(DTYPES)} was expected.")
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard={rows_per_shard}: at least 1 was expected.")
    if views < 1 or (views > 1 and transform is None):
        raise ValueError(
            f"views={views} without a transform: the first view is the picture itself, each further one needs a "
            "transform, such as RandomResizedCropAndFlip(224)."
        )
    if not 0 <= part_index < num_parts:
        raise ValueError(f"part_index={part_index} of num_parts={num_parts}: 0 to {num_parts - 1} was expected.")


class _Views(torch.utils.data.Dataset):
    """The model's input for each row: its picture, and the further views of it."""

    def __init__(
        self, dataset, image_column, image_processor, views, transform, seed, skip_broken, allow_urls, num_frames
    ):
        self.images = select_columns(dataset.with_format(None), [image_column])
        others = [name for name in dataset.column_names if name != image_column]
        self.others = dataset.select_columns(others).with_format("arrow") if others else None
        self.image_column = image_column
        self.image_processor = image_processor
        self.views = views
        self.transform = transform
        self.seed = seed
        self.skip_broken = skip_broken
        self.allow_urls = allow_urls
        self.num_frames = num_frames

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> PictureInput:
        try:
            image = self.image(row)
        except ImageLoadError as error:
            if not self.skip_broken:
                raise
            return row, str(error)
        frames = image if isinstance(image, list) else [image]
        images = list(frames)
        for view in range(1, self.views):
            # The same crop of each frame
            images += [self.transform(frame, seeded_generator(self.seed, row, view)) for frame in frames]
        return row, self.image_processor(images=images, return_tensors="pt")["pixel_values"]

    def image(self, row: int):
        """Return the picture of a row, or a list of the frames of its video."""
        return open_frames(self.images[row][self.image_column], f"row {row}", self.num_frames, self.allow_urls)

    def first(self) -> torch.Tensor:
        """
        Return the input for the first readable picture, of shape `(views, channels, height, width)`, or video, of
        shape `(views * num_frames, channels, height, width)`.
        """
        for row in range(len(self)):
            if isinstance(pixel_values := self[row][1], torch.Tensor):
                return pixel_values
        raise ImageLoadError(f"None of the {len(self)} pictures can be read.")

    def columns(self, rows: Sequence[int]) -> pa.Table | None:
        """Return the other columns of some rows."""
        return None if self.others is None else self.others[list(rows)]

    def sampled(self) -> Iterator[bytes]:
        """Yield some rows as they are read, which does not depend on where their files lie."""
        for row in sampled_rows(len(self)):
            try:
                image = self.image(row)
                frames = image if isinstance(image, list) else [image]
                yield repr((row, frames[0].size)).encode() + b"".join(frame.tobytes() for frame in frames)
            except ImageLoadError:
                if not self.skip_broken:
                    raise
            if (columns := self.columns([row])) is not None:
                yield repr(columns.to_pylist()).encode("utf-8", "surrogatepass")


class _Shards:
    """The files of a cache, and how they are written."""

    def __init__(
        self, folder: Path, pictures: _Views, model: nn.Module, dtype: str, rows_per_shard: int, batch_size: int
    ):
        pixel_values = pictures.first()
        self.folder = folder
        self.pictures = pictures
        self.model = model
        self.dtype = dtype
        self.batch_size = BatchSize(batch_size)
        self.rows_at_once = max(1, batch_size // len(pixel_values))
        self.images_each = len(pixel_values)
        # An axis of frames, if there are several in a view
        self.frames = [] if self.images_each == pictures.views else [self.images_each // pictures.views]
        self.shape = [*self.frames, *self._run_tower(pixel_values[:1]).shape[1:]]
        self.row_bytes = pictures.views * math.prod(self.shape) * DTYPES[dtype].itemsize
        self.rows = split_rows(len(pictures), rows_per_shard)
        self.paths = _shard_paths(folder, len(self.rows))
        features = {} if pictures.others is None else dict(pictures.others.features)
        features |= {
            EMBEDS: datasets.Value("binary"),
            SHAPE: datasets.List(datasets.Value("int32")),
            DTYPE: datasets.Value("string"),
            ROW: datasets.Value("int64"),
        }
        self.schema = datasets.Features(features).arrow_schema
        self.description = {
            "rows": len(pictures),
            "columns": list(features),
            "dataset": fingerprint(pictures.sampled()),
            "image_column": pictures.image_column,
            "tower": model.config.vision_config.model_type,
            "tower_weights": _tower_fingerprint(model),
            "vision_feature_layer": model.config.vision_feature_layer,
            # Left out for all other towers, so that their files of older versions go on
            **({"vision_position_embedding": True} if model.config.vision_position_embedding else {}),
            "image_processor": json.loads(pictures.image_processor.to_json_string()),
            "pixel_values": list(pixel_values.shape[1:]),
            "features": self.shape,
            "dtype": dtype,
            "views": pictures.views,
            "transform": stable_repr(pictures.transform) if pictures.views > 1 else None,
            "seed": pictures.seed,
            "skip_broken": pictures.skip_broken,
            "rows_per_shard": rows_per_shard,
            "num_shards": len(self.rows),
        }

    def prepare(self, own: Sequence[int]) -> list[int]:
        """Open the folder, and return which of a process's own files are to be written."""
        if self.rows_at_once * self.row_bytes > _LARGEST_ARRAY:
            raise ValueError(f"batch_size={self.batch_size.size}: the features of a batch exceed 2 GB. Lower it.")
        path = self.folder / _DESCRIPTION
        if not path.exists():
            # If parts start at the same time, one writes the file with which the others compare
            with only_writer(self.folder / ".lock", self.folder, wait=_LONGEST_WAIT):
                if not path.exists():
                    write_json(path, self.description)
        advice = "Give the same arguments to go on with the features in it, or another folder."
        check_settings_file(path, self.description, self.folder, advice)
        remove_leftovers(self.folder)
        missing = [shard for shard in own if not self.paths[shard].exists()]
        self._check_space(missing)
        return missing

    def _check_space(self, missing: list[int]):
        needed = sum(len(self.rows[shard]) for shard in missing) * self.row_bytes
        free = shutil.disk_usage(self.folder).free
        shape = " x ".join(map(str, [self.pictures.views, *self.shape]))
        tqdm.write(
            f"{len(self.pictures):,} rows of {shape} {self.dtype} values: "
            f"{format_size(self.row_bytes)} a row, {format_size(len(self.pictures) * self.row_bytes)} in all, "
            f"{format_size(needed)} to be written now; {format_size(free)} are free in {self.folder}.",
            file=sys.stderr,
        )
        if needed > free:
            raise OSError(
                f"{self.folder} has {format_size(free)} of free space, the features need {format_size(needed)}. Free "
                "some, or store fewer views, or a smaller dtype, or on another disk."
            )

    def write(self, missing: list[int], num_workers: int):
        """Compute and write the files that are missing."""
        rows = [self.rows[shard] for shard in missing]
        shards = load_shards(self.pictures, rows, self.rows_at_once, num_workers)
        with logging.tqdm(total=sum(map(len, rows)), unit="row", desc="Features") as progress:
            for shard, batches in zip(missing, shards, strict=True):
                with atomic_file(self.paths[shard]) as file, pa.ipc.new_stream(file, self.schema) as writer:
                    for table in self._tables(batches, progress):
                        writer.write_table(table)

    def _tables(self, batches: Iterator[PictureBatch], progress) -> Iterator[pa.Table]:
        for batch in batches:
            for error in batch.errors.values():
                logger.warning(f"Left out: {error}")
            if batch.pixel_values is not None:
                self._check_frames(batch)
                features = self._run_tower(batch.pixel_values).to(DTYPES[self.dtype])
                yield self._table(batch.readable, features.unflatten(0, (-1, self.pictures.views, *self.frames)))
            progress.update(len(batch.numbers))

    def _check_frames(self, batch: PictureBatch):
        for row, count in zip(batch.readable, batch.counts, strict=True):
            if count != self.images_each:
                kinds = ("a picture", "a video") if self.frames else ("a video", "a picture")
                raise ValueError(
                    f"Row {row} has {kinds[0]}, the first row {kinds[1]}. Store pictures and videos in folders of "
                    "their own."
                )

    @torch.no_grad()
    def _run_tower(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the features of pictures, on the CPU, of shape `(num_images, features, width)`."""
        parts = self.batch_size.run(
            lambda part: self.model.get_image_embeds(part.to(self.model.device)).cpu(), pixel_values
        )
        return torch.cat([features for _, features in parts])

    def _table(self, rows: list[int], features: torch.Tensor) -> pa.Table:
        if list(features.shape[2:]) != self.shape:
            raise ValueError(
                f"Rows {rows[0]} to {rows[-1]} have features of shape {list(features.shape[2:])}, the first row "
                f"{self.shape}. Let the image processor make pictures of one size."
            )
        if not features.isfinite().all():
            raise ValueError(
                f"The features of rows {rows[0]} to {rows[-1]} are not finite in {self.dtype}. Store them as bfloat16 "
                "or float32, and let the tower compute in one of these."
            )
        table = self.pictures.columns(rows)
        columns = [] if table is None else table.combine_chunks().columns
        shape = list(features.shape[1:])
        columns += [
            pa.array([row.view(torch.uint8).numpy().tobytes() for row in features], pa.binary()),
            pa.array([shape] * len(rows), self.schema.field(SHAPE).type),
            pa.array([self.dtype] * len(rows), pa.string()),
            pa.array(rows, pa.int64()),
        ]
        return pa.Table.from_arrays(columns, schema=self.schema)


def _open_shard(path: Path) -> datasets.Dataset:
    return datasets.Dataset.from_file(str(path))


def _shard_paths(folder: Path, num_shards: int) -> list[Path]:
    return [folder / f"shard-{shard:05d}-of-{num_shards:05d}.arrow" for shard in range(num_shards)]


def _tower_fingerprint(model: nn.Module) -> str:
    """Return a hash of a tower's configuration and weights, without the LayerNorm after it, which may be trained."""
    config = model.vision_model.config.to_dict()
    ignored = {"architectures", "dtype", "transformers_version"}
    config = {name: value for name, value in config.items() if name[0] != "_" and name not in ignored}
    weights = sampled_weights(model.vision_model)
    parts = [name.encode() + x.numpy().tobytes() for name, x in weights if not name.startswith("post_layernorm.")]
    return fingerprint([json.dumps(config, sort_keys=True, default=str).encode(), *parts])
