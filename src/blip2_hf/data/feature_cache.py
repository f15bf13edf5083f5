"""The output of a frozen vision tower, computed once and stored: training then never runs the tower."""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
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

from ..jobs.fingerprints import sampled_weights
from ..models.backbones import load_tower, measure_width
from ..models.configuration_blip2 import Blip2Config, Blip2QFormerConfig, tower_hidden_size
from ..models.image_loading import ImageLoadError, check_reads_8_bit
from ..models.modeling_vision import build_vision_model
from .rows import open_image, seeded_generator, select_columns


logger = logging.get_logger(__name__)

EMBEDS, SHAPE, DTYPE = FEATURE_COLUMNS = ("image_embeds", "image_embeds_shape", "image_embeds_dtype")
ROW = "image_embeds_row"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_DESCRIPTION = "cache.json"
_SAMPLES = 32  # rows that a fingerprint looks at
_LARGEST_ARRAY = 2**31 - 1  # bytes of one binary array of Arrow


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
        )
        self.vision_model = build_vision_model(self.config, tower)

    @property
    def device(self) -> torch.device:
        return self.vision_model.device

    def get_image_embeds(self, pixel_values: torch.Tensor) -> torch.Tensor:
        r"""
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
) -> Path:
    r"""
    Stores what the vision tower makes of each picture, in files that [`load_cached_features`] opens. It can be stopped
    and run again: finished files are kept, and the result is the same to the byte. Before it begins it tells how much
    disk space it needs.

    A row of the result has the other columns of `dataset`, and `image_embeds` (the bytes, little-endian, of an array
    of shape `image_embeds_shape`, `[views, features, width]`, and type `image_embeds_dtype`), and
    `image_embeds_row`, the number of the row in `dataset`: another one, once rows before it were left out.

    Args:
        dataset (`datasets.Dataset`):
            Rows with a picture. They are told from those of another dataset by their number, their columns and 32
            of them.
        model ([`Blip2PreTrainedModel`] or [`VisionTower`]):
            Whose `get_image_embeds` is stored. It computes on the device and in the dtype that it is on and in.
        processor ([`Blip2Processor`] or `BaseImageProcessor`):
            Makes the model's input of a picture.
        folder (`str` or `os.PathLike`):
            Where the files go: `shard-00000-of-00012.arrow` and so on, and `cache.json`, which says what made them.
        image_column (`str`, *optional*, defaults to `"image"`):
            Column of the pictures; anything that [`~image_loading.load_image`] takes.
        views (`int`, *optional*, defaults to 1):
            Versions of each picture. The first is the picture itself, the others are made by `transform`.
        transform (`Callable`, *optional*):
            `transform(image, generator)`, such as [`RandomResizedCropAndFlip`]. Needed for more than one view.
        dtype (`str`, *optional*, defaults to `"bfloat16"`):
            `"bfloat16"`, `"float16"` or `"float32"`: the type that is stored.
        batch_size (`int`, *optional*, defaults to 32):
            Number of pictures that the tower takes at a time.
        rows_per_shard (`int`, *optional*, defaults to 1000):
            Rows of a file: what is computed again after an interruption.
        seed (`int`, *optional*, defaults to 0):
            With the row and the view, seeds the generator that `transform` is given.
        num_workers (`int`, *optional*, defaults to 0):
            Processes that load and prepare pictures.
        skip_broken (`bool`, *optional*, defaults to `False`):
            Whether to leave out rows whose picture can't be read, with a warning.
        part_index (`int`, *optional*, defaults to 0), num_parts (`int`, *optional*, defaults to 1):
            This process writes every `num_parts`-th file, from number `part_index` on: to share the work between
            devices and machines.

    Returns:
        `Path`: `folder`.

    Raises:
        ValueError: if the arguments do not fit, or `folder` holds features that were made otherwise.
        OSError: if the disk has too little space.
        ImageLoadError: if a picture can't be read; the message names its row.
    """
    _check_arguments(dataset, image_column, views, transform, dtype, part_index, num_parts)
    image_processor = processor.image_processor if isinstance(processor, ProcessorMixin) else processor
    check_reads_8_bit(image_processor)
    pictures = _Views(dataset, image_column, image_processor, views, transform, seed, skip_broken)
    was_training = model.training
    model.eval()
    try:
        shards = _Shards(Path(folder), pictures, model, dtype, rows_per_shard)
        missing = shards.prepare(part_index, num_parts, batch_size)
        shards.write(missing, model, batch_size, num_workers)
    finally:
        model.train(was_training)
    return shards.folder


def load_cached_features(folder: str | os.PathLike) -> datasets.Dataset:
    r"""
    Opens what [`cache_features`] has written. Nothing is read before it is used: the files are mapped into memory.

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
    paths = _shard_paths(folder, json.loads((folder / _DESCRIPTION).read_text())["num_shards"])
    if missing := [path.name for path in paths if not path.exists()]:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of {len(paths)} files ({names}). Run cache_features with the same "
            "arguments: it writes those that are missing."
        )
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in paths])


def check_feature_size(image_size: int, *data: str | os.PathLike | None):
    r"""
    Refuse features of pictures of another size than that of the processor which is saved with what learns from them:
    the model would be given other pictures than those it has learned from.

    Args:
        image_size (`int`):
            Side of the squares that the processor makes.
        data (`str` or `os.PathLike`, *optional*):
            What is learned from, or validated on. Only folders that [`cache_features`] wrote are looked into.

    Raises:
        ValueError: if features were made of pictures of another size.
    """
    for name in filter(None, data):
        path = Path(name) / _DESCRIPTION
        sides = json.loads(path.read_text())["pixel_values"][1:] if path.exists() else []
        if set(sides) - {image_size}:
            made_of = "x".join(map(str, sides))
            raise ValueError(
                f"The features in {name} were made of pictures of {made_of} pixels, but image_size is {image_size}. "
                "Give the size of the features, or store features of that size with cache_features."
            )


def read_cached_features(row: Mapping, view: int = 0) -> torch.Tensor:
    r"""
    The features of one view, without a copy: the tensor lies in the memory of the row, which may be a file that is
    mapped into it, and is not to be written to.

    Args:
        row (`Mapping`):
            `image_embeds` (`bytes` or a buffer of Arrow), `image_embeds_shape` and `image_embeds_dtype`.
        view (`int`, *optional*, defaults to 0):
            Which of the views; 0 is the picture itself.

    Returns:
        `torch.Tensor` of shape `(features, width)`, in the type that was stored.

    Raises:
        ValueError: if there is no such view, or the bytes do not have the size that they should.
    """
    views, length, width = row[SHAPE]
    dtype = DTYPES[row[DTYPE]]
    size = length * width * dtype.itemsize
    buffer = pa.py_buffer(row[EMBEDS])
    if buffer.size != views * size:
        raise ValueError(
            f"{EMBEDS} has {buffer.size} bytes; {views * size} were expected for {row[SHAPE]} {row[DTYPE]} values."
        )
    if not 0 <= view < views:
        raise ValueError(f"There is no view {view}: the row has {views}.")
    # torch.frombuffer warns of memory that can't be written; other views are not even read from the disk
    array = pa.Array.from_buffers(pa.uint8(), size, [None, buffer.slice(view * size, size)])
    return torch.from_dlpack(array).view(dtype).view(length, width)


def _check_arguments(dataset, image_column, views, transform, dtype, part_index, num_parts):
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(
            f"cache_features takes a datasets.Dataset, got a {type(dataset).__name__}. datasets.load_dataset without "
            "streaming=True, or datasets.Dataset.from_list, make one."
        )
    if len(dataset) == 0:
        raise ValueError("The dataset has no rows.")
    if taken := [name for name in (*FEATURE_COLUMNS, ROW) if name in dataset.column_names]:
        raise ValueError(f"The dataset has a column {taken[0]!r} already. Rename it, or remove it.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: one of {', '.join(DTYPES)} was expected.")
    if views < 1 or (views > 1 and transform is None):
        raise ValueError(
            f"views={views} without a transform: the first view is the picture itself, each further one needs a "
            "transform, such as RandomResizedCropAndFlip(224)."
        )
    if not 0 <= part_index < num_parts:
        raise ValueError(f"part_index={part_index} of num_parts={num_parts}: 0 to {num_parts - 1} was expected.")


class _Views(torch.utils.data.Dataset):
    """The model's input for each row: its picture, and the further views of it."""

    def __init__(self, dataset, image_column, image_processor, views, transform, seed, skip_broken):
        self.images = select_columns(dataset.with_format(None), [image_column], image_column)
        others = [name for name in dataset.column_names if name != image_column]
        self.others = dataset.select_columns(others).with_format("arrow") if others else None
        self.image_column = image_column
        self.image_processor = image_processor
        self.views = views
        self.transform = transform
        self.seed = seed
        self.skip_broken = skip_broken

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[int, torch.Tensor | None]:
        try:
            image = self.image(row)
        except ImageLoadError as error:
            if not self.skip_broken:
                raise
            logger.warning(f"Left out: {error}")
            return row, None
        images = [image]
        for view in range(1, self.views):
            images.append(self.transform(image, seeded_generator(self.seed, row, view)))
        return row, self.image_processor(images=images, return_tensors="pt")["pixel_values"]

    def image(self, row: int):
        return open_image(self.images[row][self.image_column], f"row {row}")

    def first(self) -> torch.Tensor:
        """Input for the first row whose picture can be read, of shape `(views, channels, height, width)`."""
        for row in range(len(self)):
            if (pixel_values := self[row][1]) is not None:
                return pixel_values
        raise ImageLoadError(f"None of the {len(self)} pictures can be read.")

    def columns(self, rows: Sequence[int]) -> pa.Table | None:
        """The other columns of some rows."""
        return None if self.others is None else self.others[list(rows)]

    def fingerprint(self) -> str:
        """A hash of some rows, as they are read: it does not depend on where their files lie."""
        digest = hashlib.blake2b(digest_size=16)
        for row in sorted({len(self) * sample // _SAMPLES for sample in range(_SAMPLES)}):
            try:
                image = self.image(row)
                digest.update(repr((row, image.size)).encode() + image.tobytes())
            except ImageLoadError:
                if not self.skip_broken:
                    raise
            if (columns := self.columns([row])) is not None:
                digest.update(repr(columns.to_pylist()).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


class _Shards:
    """The files of a cache, and what makes them."""

    def __init__(self, folder: Path, pictures: _Views, model: nn.Module, dtype: str, rows_per_shard: int):
        pixel_values = pictures.first()
        self.folder = folder
        self.pictures = pictures
        self.dtype = dtype
        self.shape = list(_run_tower(model, pixel_values[:1], 1).shape[1:])
        self.row_bytes = pictures.views * self.shape[0] * self.shape[1] * DTYPES[dtype].itemsize
        self.rows = [
            range(start, min(start + rows_per_shard, len(pictures)))
            for start in range(0, len(pictures), rows_per_shard)
        ]
        self.paths = _shard_paths(folder, len(self.rows))
        features = {} if pictures.others is None else dict(pictures.others.features)
        features |= {
            EMBEDS: datasets.Value("binary"),
            SHAPE: datasets.List(datasets.Value("int32")),
            DTYPE: datasets.Value("string"),
            ROW: datasets.Value("int64"),
        }
        self.schema = datasets.Features(features).arrow_schema
        description = {
            "rows": len(pictures),
            "columns": list(features),
            "dataset": pictures.fingerprint(),
            "image_column": pictures.image_column,
            "tower": model.config.vision_config.model_type,
            "tower_weights": _tower_fingerprint(model),
            "vision_feature_layer": model.config.vision_feature_layer,
            "image_processor": json.loads(pictures.image_processor.to_json_string()),
            "pixel_values": list(pixel_values.shape[1:]),
            "features": self.shape,
            "dtype": dtype,
            "views": pictures.views,
            # The address of a function differs from run to run
            "transform": re.sub(r" at 0x[0-9a-f]+", "", repr(pictures.transform)) if pictures.views > 1 else None,
            "seed": pictures.seed,
            "skip_broken": pictures.skip_broken,
            "rows_per_shard": rows_per_shard,
            "num_shards": len(self.rows),
        }
        self.description = json.loads(json.dumps(description))

    def prepare(self, part_index: int, num_parts: int, batch_size: int) -> list[int]:
        """Opens the folder, and tells which files are to be written."""
        if self._rows_at_once(batch_size) * self.row_bytes > _LARGEST_ARRAY:
            raise ValueError(f"batch_size={batch_size}: the features of a batch exceed 2 GB. Lower it.")
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _DESCRIPTION
        if not path.exists():
            temporary = path.with_name(f"{path.name}.{part_index}.tmp")
            temporary.write_text(json.dumps(self.description, indent=2))
            os.replace(temporary, path)
        found = json.loads(path.read_text())
        if different := [name for name in self.description if found.get(name) != self.description[name]]:
            details = "; ".join(f"{name}: {found.get(name)} there, {self.description[name]} now" for name in different)
            raise ValueError(
                f"{self.folder} holds features that were made otherwise ({details}). Give the same arguments to go "
                "on with them, or another folder."
            )
        missing = [s for s in range(part_index, len(self.rows), num_parts) if not self.paths[s].exists()]
        self._check_space(missing)
        return missing

    def _check_space(self, missing: list[int]):
        needed = sum(len(self.rows[shard]) for shard in missing) * self.row_bytes
        free = shutil.disk_usage(self.folder).free
        length, width = self.shape
        tqdm.write(
            f"{len(self.pictures):,} rows of {self.pictures.views} x {length} x {width} {self.dtype} values: "
            f"{self.row_bytes / 1e6:.3g} MB a row, {len(self.pictures) * self.row_bytes / 1e9:.3g} GB in all, "
            f"{needed / 1e9:.3g} GB to be written now; {free / 1e9:.3g} GB are free in {self.folder}.",
            file=sys.stderr,
        )
        if needed > free:
            raise OSError(
                f"{self.folder} has {free / 1e9:.3g} GB of free space, the features need {needed / 1e9:.3g} GB. Free "
                "some, or store fewer views, or a smaller dtype, or on another disk."
            )

    def write(self, missing: list[int], model: nn.Module, batch_size: int, num_workers: int):
        """Computes and writes the files that are missing."""
        step = self._rows_at_once(batch_size)
        # A batch lies within one file, so that a file does not depend on where a run began
        plan = {s: [self.rows[s][i : i + step] for i in range(0, len(self.rows[s]), step)] for s in missing}
        loader = torch.utils.data.DataLoader(
            self.pictures,
            batch_sampler=[batch for batches in plan.values() for batch in batches],
            collate_fn=_stack,
            num_workers=num_workers,
            generator=torch.Generator(),  # the global one is left alone
        )
        with logging.tqdm(total=sum(len(self.rows[s]) for s in missing), unit="row", desc="Features") as progress:
            batches = iter(loader)
            for shard in missing:
                tables = self._tables(islice(batches, len(plan[shard])), model, batch_size, progress)
                _write_shard(self.paths[shard], self.schema, tables)

    def _rows_at_once(self, batch_size: int) -> int:
        return max(1, batch_size // self.pictures.views)

    def _tables(self, batches: Iterator, model: nn.Module, batch_size: int, progress) -> Iterator[pa.Table]:
        for num_rows, rows, pixel_values in batches:
            if rows:
                features = _run_tower(model, pixel_values, batch_size).to(DTYPES[self.dtype])
                yield self._table(rows, features.unflatten(0, (-1, self.pictures.views)))
            progress.update(num_rows)

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


def _stack(items: list[tuple[int, torch.Tensor | None]]) -> tuple[int, list[int], torch.Tensor | None]:
    """Number of rows; those whose picture could be read; their pictures, view after view."""
    readable = [(row, pixel_values) for row, pixel_values in items if pixel_values is not None]
    shapes = {tuple(pixel_values.shape[1:]) for _, pixel_values in readable}
    if len(shapes) > 1:
        raise ValueError(
            f"The image processor made pictures of several sizes, {sorted(shapes)}, in rows {items[0][0]} to "
            f"{items[-1][0]}. Let it make them of one."
        )
    pixel_values = torch.cat([pixel_values for _, pixel_values in readable]) if readable else None
    return len(items), [row for row, _ in readable], pixel_values


@torch.no_grad()
def _run_tower(model: nn.Module, pixel_values: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Features of pictures, on the CPU, of shape `(num_images, features, width)`."""
    return torch.cat([model.get_image_embeds(part.to(model.device)).cpu() for part in pixel_values.split(batch_size)])


def _write_shard(path: Path, schema: pa.Schema, tables: Iterator[pa.Table]):
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        with pa.ipc.new_stream(file, schema) as writer:
            for table in tables:
                writer.write_table(table)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _shard_paths(folder: Path, num_shards: int) -> list[Path]:
    return [folder / f"shard-{shard:05d}-of-{num_shards:05d}.arrow" for shard in range(num_shards)]


def _tower_fingerprint(model: nn.Module) -> str:
    """A hash of a tower's configuration and of some values of each weight; the LayerNorm behind it may be trained."""
    config = model.vision_model.config.to_dict()
    ignored = {"architectures", "dtype", "transformers_version"}
    config = {name: value for name, value in config.items() if name[0] != "_" and name not in ignored}
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16)
    for name, sample in sampled_weights(model.vision_model):
        if not name.startswith("post_layernorm."):
            digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()
