"""Retrieval between pictures and texts, scored (section 4.4 of the paper), in one process or several."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from transformers.utils import logging

from ..data.feature_cache import cache_features, load_cached_features
from ..data.image_size import own_image_size, with_image_size
from ..data.text import clean_caption
from ..jobs.atomic_files import atomic_file
from ..jobs.batch_size import first_batch_size
from ..jobs.fingerprints import model_settings
from ..jobs.output import check_still_there, of_first, only_writer, share
from ..jobs.state_files import read_whole
from ..retrieval.two_stage import EncodedTexts, TwoStageRankings, TwoStageRetrieval
from .prediction_store import PredictionStore
from .report import read_results, write_report
from .samples import (
    OVERALL,
    CaptionSample,
    RowImage,
    check_distinct_pictures,
    sample_name,
    samples_fingerprint,
)


_RECALL_AT = (1, 5, 10)
_RESULTS = ("features/*.arrow", "contrast.pt", "pairs-*.npy")
_IMAGES_PER_BLOCK = 20  # whose pairs are matched again after an interruption
_UNREADABLE = "Delete it, and run the same command again, which computes it anew."


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
    Find the captions of pictures among all captions, and the pictures of captions: contrast finds the first `k`,
    matching ranks them. Captions are written as LAVIS writes them ([`~data.clean_caption`]). All processes of
    accelerate call it together, and share the pictures.

    Args:
        model ([`Blip2ForImageTextRetrieval`] or [`Blip2ForPreTraining`]):
            The model, on the device of this process.
        processor ([`Blip2Processor`]):
            Its processor.
        samples (`list[CaptionSample]`):
            Pictures with captions, such as [`read_karpathy`] returns. A picture without captions is one that captions
            may find, and is not asked for any.
        output (`str` or `os.PathLike`):
            Folder for `results.json`, `table.md`, `predictions.json` (the first ten of each), and `parts`, with which
            an interrupted evaluation goes on. `parts` holds the tower's output, of which it tells the size, and which
            serves any `k`.
        k (`int`, *optional*, defaults to 128):
            How many candidates of contrast are matched. 0: contrast alone.
        task (`str`, *optional*, defaults to `"retrieval"`):
            What results call it.
        image_size (`int`, *optional*):
            Side of the square that pictures are scaled to. Without it, the image processor's own size.
        batch_size (`int`, *optional*):
            How many pictures, texts or pairs the model takes at a time. Without it, 128, or 16 on a CPU. It is halved
            if memory runs out.
        num_workers (`int`, *optional*, defaults to 0):
            Processes that load pictures.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.

    Returns:
        `dict`: what results.json holds, in all processes: the share of images with a caption of theirs among the
        first 1, 5 and 10 (`image_to_text_r1`, ...), and of captions with their image (`text_to_image_r1`, ...). Where
        `k` is less than 10, and than the number of candidates, only those up to `k` are told.

    Raises:
        ValueError: if `output` holds what other settings made, if another run is writing to it, if two samples have
            the same id or picture, or if no sample has a caption.
        OSError: if files are gone at the end, as when `output` was deleted meanwhile.
        ImageLoadError: if a picture can't be read.
    """
    if not samples:
        raise ValueError("There are no samples.")
    check_distinct_pictures(samples)
    texts = _texts(samples, processor.image_token)
    state = PartialState(cpu=model.device.type == "cpu")
    image_processor = with_image_size(processor.image_processor, image_size)
    tokenizer = processor.qformer_tokenizer or processor.tokenizer
    start = first_batch_size(batch_size, model.device)
    retrieval = _SharedRetrieval(model, tokenizer, k, start, show_progress=show_progress and state.is_main_process)
    # Not `k`, because features and scores of pairs do not depend on it
    settings = {
        **model_settings(model, image_processor),
        "max_length": retrieval.max_length,
        "image_size": own_image_size(image_processor),
        "num_samples": len(samples),
        "num_texts": len(texts),
        "samples": samples_fingerprint(samples, texts),
    }
    with only_writer(Path(output) / ".lock", output, state):
        retrieval.store = PredictionStore(Path(output) / "parts", settings, state, _RESULTS)
        images = _tower_outputs(model, image_processor, samples, retrieval.store, start, num_workers)
        rankings = retrieval.rank(images, texts)
        if state.is_main_process:
            without = [sample.image_id for sample in samples if not sample.captions]
            write_report(
                output,
                task,
                model,
                {**settings, "k": k},
                _first_ten(rankings, samples, texts),
                {OVERALL: rankings.recall(_owners(samples), _RECALL_AT)},
                {OVERALL: len(samples)},
                {OVERALL: len(samples) - len(without)},
                without,
                {"num_processes": state.num_processes, "batch_size": retrieval.batch_size},
            )
        return of_first(lambda: read_results(output), state)


def _texts(samples: Sequence[CaptionSample], image_token: str) -> list[str]:
    """Return all captions, as they are read."""
    texts = []
    for number, sample in enumerate(samples):
        for caption in sample.captions:
            texts.append(clean_caption(caption))
            if image_token in texts[-1]:
                raise ValueError(
                    f"{sample_name(sample, number)}: a caption is {caption!r}, and {image_token!r} stands for a "
                    "picture. Write the caption without it."
                )
    if not texts:
        raise ValueError(f"None of {len(samples)} images has a caption: there is no recall.")
    return texts


def _tower_outputs(
    model: Any,
    image_processor: Any,
    samples: Sequence[CaptionSample],
    store: PredictionStore,
    batch_size: int,
    num_workers: int,
) -> datasets.Dataset:
    """Return the tower's output for each picture, on the disk: each process computes a share of the files."""
    state = store.state
    folder = store.folder / "features"
    if state.is_main_process and not any(folder.glob("*.arrow")):
        # Other settings may have ended before the first file
        (folder / "cache.json").unlink(missing_ok=True)
    state.wait_for_everyone()
    rows, column = _image_rows(samples)
    cache_features(
        rows,
        model,
        image_processor,
        folder,
        image_column=column,
        dtype=str(model.dtype).removeprefix("torch."),
        batch_size=batch_size,
        rows_per_shard=100,
        num_workers=num_workers,
        part_index=state.process_index,
        num_parts=state.num_processes,
        allow_urls=_allowed_urls(samples),
    )
    state.wait_for_everyone()
    return load_cached_features(folder)


def _allowed_urls(samples: Sequence[CaptionSample]) -> bool | list[str] | None:
    """Return which URLs may be fetched for all rows: those of no row if one row of them may lead to none."""
    allowed = [sample.image.allow_urls for sample in samples if isinstance(sample.image, RowImage)]
    if not allowed:
        return None  # the user gave them
    if False in allowed:
        return False
    hosts = [set() if x is True else {x} if isinstance(x, str) else set(x) for x in allowed]
    return sorted(set.intersection(*hosts))


def _image_rows(samples: Sequence[CaptionSample]) -> tuple[datasets.Dataset, str]:
    """Return the pictures as a dataset, one row each, and their column."""
    images = [sample.image for sample in samples]
    first = images[0]
    # Samples may come from several datasets
    is_one = all(isinstance(x, RowImage) and x.rows is first.rows and x.column == first.column for x in images)
    if is_one and isinstance(first.rows, datasets.Dataset):
        return first.rows.select([image.row for image in images]), first.column
    images = [image.rows[image.row][image.column] if isinstance(image, RowImage) else image for image in images]
    return datasets.Dataset.from_dict({"image": images}), "image"


class _SharedRetrieval(TwoStageRetrieval):
    """Retrieval in two stages by all processes, whose features and scores of pairs go into files that stay."""

    store: PredictionStore

    def rank(self, images: datasets.Dataset, texts: list[str]) -> TwoStageRankings:
        """Return what finds what: by contrast alone with `k=0`."""
        image_features, encoded = self._encode(images, texts)
        if self.k == 0:
            return self.compare(image_features, encoded.features, k=max(_RECALL_AT))
        return self(images, encoded, image_features)

    def _encode(self, images: datasets.Dataset, texts: list[str]) -> tuple[torch.Tensor, EncodedTexts]:
        """Return features of images and texts. One process computes them, so that all have the same candidates."""
        path = self.store.folder / "contrast.pt"
        if self.store.state.is_main_process and not path.exists():
            encoded = self.encode_texts(texts)
            features = {"image_features": self.encode_images(images), "text_features": encoded.features}
            with atomic_file(path) as file:
                torch.save({**features, "input_ids": encoded.input_ids, "batch_size": self.batch_size}, file)
        self.store.state.wait_for_everyone()
        found = read_whole(path, torch.load, _UNREADABLE)
        # If memory has run out, it has done so in one process
        self._batch_size.size = min(self.batch_size, found["batch_size"])
        return found["image_features"], EncodedTexts(found["input_ids"], found["text_features"])

    def match(self, images: Any, input_ids: list[list[int]], pairs: torch.Tensor) -> torch.Tensor:
        """Return the scores of pairs, block by block, each by one process."""
        sizes = torch.unique_consecutive(pairs[:, 0] // _IMAGES_PER_BLOCK, return_counts=True)[1]
        blocks = {self._path(block): block for block in pairs.split(sizes.tolist())}
        mine = share(list(blocks.items()), self.store.state)
        done = sum(len(block) for path, block in mine if path.exists())
        total = sum(len(block) for _, block in mine)
        is_hidden = not self.show_progress
        self.show_progress = False  # of each block
        with logging.tqdm(total=total, initial=done, desc="Pairs", unit="pair", disable=is_hidden) as bar:
            for path, block in mine:
                if not path.exists():
                    scores = super().match(images, input_ids, block).numpy()
                    with atomic_file(path) as file:
                        np.save(file, scores)
                    bar.update(len(block))
        self.store.state.wait_for_everyone()
        check_still_there(blocks, self.store.folder)
        return torch.cat([torch.from_numpy(read_whole(path, np.load, _UNREADABLE)) for path in blocks])

    def _path(self, block: torch.Tensor) -> Path:
        digest = hashlib.blake2b(block.numpy().tobytes(), digest_size=8).hexdigest()
        return self.store.folder / f"pairs-{int(block[0, 0]):06d}-{digest}.npy"


def _owners(samples: Sequence[CaptionSample]) -> torch.Tensor:
    """Return the number of each caption's picture."""
    return torch.tensor([number for number, sample in enumerate(samples) for _ in sample.captions])


def _first_ten(rankings: TwoStageRankings, samples: Sequence[CaptionSample], texts: list[str]) -> dict[str, list]:
    """Return what is found first, in words and ids."""
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
