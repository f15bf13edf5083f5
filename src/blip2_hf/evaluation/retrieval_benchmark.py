"""Retrieval between pictures and texts, scored (section 4.4 of the paper), in one process or several."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import find_executable_batch_size

from ..data.feature_cache import cache_features, load_cached_features
from ..data.text import clean_caption
from .prediction_store import PredictionStore
from .report import write_report
from .samples import CaptionSample, RowImage
from .text_prediction import first_batch_size, model_fingerprint, own_image_size, samples_fingerprint, with_image_size
from .two_stage import Ranking, TwoStageRankings, TwoStageRetrieval


_RECALL_AT = (1, 5, 10)
_IMAGES_PER_BLOCK = 20  # whose pairs are matched again after an interruption


def evaluate_retrieval(
    model: Any,
    processor: Any,
    samples: Sequence[CaptionSample],
    output: str | os.PathLike,
    k: int = 128,
    task: str = "retrieval",
    image_size: int | None = None,
    batch_size: int | None = None,
    num_workers: int = 0,
    show_progress: bool = True,
) -> dict[str, Any]:
    r"""
    Finds the captions of pictures among all captions, and the pictures of captions: contrast finds the first `k`,
    matching ranks them. Captions are written as LAVIS writes them ([`~data.clean_caption`]). All processes of
    accelerate call it together, and share the pictures.

    Args:
        model ([`Blip2ForImageTextRetrieval`] or [`Blip2ForPreTraining`]):
            The model, on the device of this process.
        processor ([`Blip2Processor`]):
            Its processor.
        samples (`list[CaptionSample]`):
            Pictures with captions, such as [`read_karpathy`] returns.
        output (`str` or `os.PathLike`):
            Folder for `results.json`, `table.md`, `predictions.json` (the first ten of each), and `parts`, with which
            an interrupted evaluation goes on. `parts` holds the tower's output, of which it tells the size.
        k (`int`, *optional*, defaults to 128):
            How many candidates of contrast are matched. 0: contrast alone.
        task (`str`, *optional*, defaults to `"retrieval"`):
            What results call it.
        image_size (`int`, *optional*):
            Side of the square that pictures are scaled to. Without it, the image processor's own size.
        batch_size (`int`, *optional*):
            How many pictures, or pairs, the model takes at a time. Without it, 128, or 16 on a CPU. It is lowered
            where memory runs out.
        num_workers (`int`, *optional*, defaults to 0):
            Processes that load pictures.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.

    Returns:
        `dict`: what results.json holds, in all processes: the share of images with a caption of theirs among the
        first 1, 5 and 10 (`image_to_text_r1`, ...), and of captions with their image (`text_to_image_r1`, ...).

    Raises:
        ValueError: if `output` holds what other settings made, or a sample has no caption.
        ImageLoadError: if a picture can't be read.
    """
    if not samples:
        raise ValueError("There are no samples.")
    if without := [sample.image_id for sample in samples if not sample.captions]:
        raise ValueError(f"{len(without)} images have no caption, the first of them {without[0]}: there is no recall.")
    state = PartialState(cpu=model.device.type == "cpu")
    texts = [clean_caption(caption) for sample in samples for caption in sample.captions]
    image_processor = with_image_size(processor.image_processor, image_size)
    start = batch_size or first_batch_size(model.device)
    retrieval = _SharedRetrieval(
        model,
        processor.qformer_tokenizer or processor.tokenizer,
        k=k,
        show_progress=show_progress and state.is_main_process,
    )
    settings = _settings(retrieval, image_processor, samples)
    retrieval.store = PredictionStore(Path(output) / "parts", {"task": task, **settings}, state)
    retrieval.batch_size_of_pairs = start
    images = _tower_outputs(model, image_processor, samples, retrieval.store, start, num_workers)
    rankings = retrieval(images, texts)
    if state.is_main_process:
        counts = {"overall": len(samples)}
        run = {"num_processes": state.num_processes, "batch_size": retrieval.batch_size}
        scores = {"overall": _scores(rankings, samples)}
        write_report(output, task, model, settings, _first_ten(rankings, samples, texts), scores, counts, run)
    state.wait_for_everyone()
    return json.loads((Path(output) / "results.json").read_text(encoding="utf-8"))


def _settings(retrieval: TwoStageRetrieval, image_processor: Any, samples: Sequence[CaptionSample]) -> dict[str, Any]:
    """What the rankings depend on."""
    model = retrieval.model
    return {
        "weights": model_fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "k": retrieval.k,
        "max_length": retrieval.max_length,
        "image_size": own_image_size(image_processor),
        "image_processor": json.loads(image_processor.to_json_string()),
        "num_samples": len(samples),
        "num_texts": sum(len(sample.captions) for sample in samples),
        "samples": samples_fingerprint(samples, [json.dumps(sample.captions) for sample in samples]),
    }


def _tower_outputs(
    model: Any,
    image_processor: Any,
    samples: Sequence[CaptionSample],
    store: PredictionStore,
    batch_size: int,
    num_workers: int,
) -> datasets.Dataset:
    """The tower's output for each picture, on the disk: each process computes a share of the files."""
    state = store.state
    rows, column = _image_rows(samples)

    @find_executable_batch_size(starting_batch_size=batch_size)
    def compute(batch_size: int) -> Path:
        return cache_features(
            rows,
            model,
            image_processor,
            store.folder / "features",
            image_column=column,
            dtype=str(model.dtype).removeprefix("torch."),
            batch_size=batch_size,
            rows_per_shard=100,
            num_workers=num_workers,
            part_index=state.process_index,
            num_parts=state.num_processes,
        )

    folder = compute()
    state.wait_for_everyone()
    return load_cached_features(folder)


def _image_rows(samples: Sequence[CaptionSample]) -> tuple[datasets.Dataset, str]:
    """The pictures as a data set, one row each, and their column."""
    first = samples[0].image
    if isinstance(first, RowImage) and isinstance(first.rows, datasets.Dataset):
        return first.rows.select([sample.image.row for sample in samples]), first.column
    images = [sample.image for sample in samples]
    images = [image.rows[image.row][image.column] if isinstance(image, RowImage) else image for image in images]
    return datasets.Dataset.from_dict({"image": images}), "image"


class _SharedRetrieval(TwoStageRetrieval):
    """Retrieval in two stages whose pairs are matched block by block, by all processes, into files that stay."""

    store: PredictionStore
    batch_size_of_pairs: int

    @torch.inference_mode()
    def match(self, images: Any, input_ids: list[list[int]], pairs: torch.Tensor) -> torch.Tensor:
        blocks = pairs.split(
            torch.unique_consecutive(pairs[:, 0] // _IMAGES_PER_BLOCK, return_counts=True)[1].tolist()
        )
        paths = [self._path(block) for block in blocks]
        state = self.store.state
        mine = list(zip(paths, blocks, strict=True))[state.process_index :: state.num_processes]
        # Features are computed in batches of one size, whatever the memory: candidates don't depend on it
        match = super().match

        @find_executable_batch_size(starting_batch_size=self.batch_size_of_pairs)
        def compute(batch_size: int):
            self.batch_size = batch_size
            for path, block in mine:
                if not path.exists():
                    scores = match(images, input_ids, block)
                    temporary = path.with_name(f"{path.name}.tmp")
                    with open(temporary, "wb") as file:
                        np.save(file, scores.numpy())
                    os.replace(temporary, path)

        compute()
        state.wait_for_everyone()
        return torch.cat([torch.from_numpy(np.load(path)) for path in paths])

    def _path(self, block: torch.Tensor) -> Path:
        digest = hashlib.blake2b(block.numpy().tobytes(), digest_size=8).hexdigest()
        return self.store.folder / f"pairs-{int(block[0, 0]):06d}-{digest}.npy"


def _scores(rankings: TwoStageRankings, samples: Sequence[CaptionSample]) -> dict[str, float]:
    owners = [number for number, sample in enumerate(samples) for _ in sample.captions]
    is_match = torch.zeros(len(samples), len(owners), dtype=torch.bool)
    is_match[owners, range(len(owners))] = True
    return _recall("image_to_text", rankings.image_to_text, is_match) | _recall(
        "text_to_image", rankings.text_to_image, is_match.T
    )


def _recall(name: str, ranking: Ranking, is_match: torch.Tensor) -> dict[str, float]:
    found = is_match.gather(1, ranking.index)
    return {f"{name}_r{count}": found[:, :count].any(dim=1).double().mean().item() for count in _RECALL_AT}


def _first_ten(rankings: TwoStageRankings, samples: Sequence[CaptionSample], texts: list[str]) -> dict[str, list]:
    """What is found first, in words and ids."""
    captions, images = rankings.image_to_text.index[:, :10].tolist(), rankings.text_to_image.index[:, :10].tolist()
    return {
        "image_to_text": [
            {"image_id": sample.image_id, "captions": [texts[text] for text in row]}
            for sample, row in zip(samples, captions, strict=True)
        ],
        "text_to_image": [
            {"caption": text, "image_ids": [samples[image].image_id for image in row]}
            for text, row in zip(texts, images, strict=True)
        ],
    }


__all__ = ["evaluate_retrieval"]
