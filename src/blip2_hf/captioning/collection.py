"""Captions of a whole collection: what is there already stays, each process takes its share of the rest."""

import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import datasets
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import Subset
from tqdm import tqdm
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from ..jobs.errors import CollectionError
from ..jobs.fingerprints import model_settings
from ..jobs.output import of_first, only_writer, share, tell_share
from ..jobs.state_files import as_json
from ..models.image_loading import check_reads_8_bit
from ..models.processing_blip2 import learned_prompt
from ..models.video_loading import NUM_FRAMES
from .caption_output import CaptionOutput
from .captions import MAX_NEW_TOKENS, PictureCaption, caption_images, seed_of, tell_empty
from .formats import open_output
from .pictures import FolderPictures, Pictures, RowPictures


_ONE = ("num_captions", 1)


@dataclass
class CaptionCounts:
    r"""
    What [`caption_dataset`] did, over all processes.

    Args:
        pictures (`int`):
            Pictures of the collection.
        done_before (`int`):
            Those that an earlier run had done.
        captioned (`int`):
            Those that this run captioned.
        broken (`int`):
            Those that this run could not read.
    """

    pictures: int
    done_before: int
    captioned: int
    broken: int


def caption_dataset(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pictures: str | os.PathLike | datasets.Dataset | Pictures,
    output: str | os.PathLike | None = None,
    output_format: str | None = None,
    prompt: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int | None = None,
    num_workers: int = 0,
    existing: str = "skip",
    extension: str = ".txt",
    num_captions: int = 1,
    prefix: str | None = None,
    suffix: str | None = None,
    seed: int | None = None,
    with_confidence: bool = False,
    rerank: Any = None,
    overwrite: bool = False,
    **generate_kwargs,
) -> CaptionCounts:
    r"""
    Caption a collection and write the captions to files. A run may be interrupted, or killed, and run again: what is
    done stays, and the result is the same. In several processes (`accelerate launch`, `torchrun`) each takes its
    share. A second run on the same output is refused while the first one lasts.

    Until the run is finished, its captions are in files such as `captions.jsonl.part-00000.jsonl`. Then these become
    one file, in the order of the pictures. Pictures that can't be read are listed in `captions.jsonl.broken.jsonl`,
    and the next run tries them again. `captions.jsonl.settings.json` says what the captions were made with. With
    `existing="append"`, `captions.jsonl.added.jsonl` has the captions that were added, and what was there before.

    Args:
        model ([`Blip2ForConditionalGeneration`]):
            The model, on its device.
        processor ([`Blip2Processor`]):
            Its processor.
        pictures (`str`, `os.PathLike`, `datasets.Dataset` or [`Pictures`]):
            A folder of pictures or of videos, a dataset, or one of [`FolderPictures`], [`TarPictures`] and
            [`RowPictures`].
        output (`str` or `os.PathLike`, *optional*):
            The file, or the folder of .txt files. Without it, .txt files lie next to the pictures. A file called
            `metadata.jsonl`, `.csv` or `.parquet`, in the folder of the pictures or above it, has the column
            `file_name` in place of `file`, which `datasets.load_dataset` reads. Rows and columns that it has stay.
        output_format (`str`, *optional*):
            `"txt"` (one file a picture), `"jsonl"`, `"csv"` or `"parquet"` (columns `file`, or `shard` and `key`, or
            `row`, and `caption`). Told by the ending of `output` if it is not given.
        existing (`str`, *optional*, defaults to `"skip"`):
            How existing captions are treated: `"skip"` keeps them. `"overwrite"` replaces them one by one. `"append"`
            and `"prepend"` add the new caption once. All but `"skip"` also take captions that other settings made.
        extension (`str`, *optional*, defaults to `".txt"`):
            Ending of the text files.
        num_captions (`int`, *optional*, defaults to 1):
            Captions of each picture. With several, `caption` is a list, and a text file has a line for each.
        with_confidence (`bool`, *optional*, defaults to `False`):
            Whether the file has a column `confidence` too: how sure the model is of each caption
            ([`PictureCaption`]).
        rerank ([`~capfilt.RetrievalFilter`], *optional*):
            Keeps the best of `num_captions` captions of each picture, as in [`caption_images`].
        prompt, max_new_tokens, batch_size, num_workers, prefix, suffix, seed:
            As in [`caption_images`]. What is sampled with a seed also depends on the number of processes, and on
            interruptions.
        overwrite (`bool`, *optional*, defaults to `False`):
            Short for `existing="overwrite"`.
        generate_kwargs (`dict`):
            Those of [`~Blip2ForConditionalGeneration.generate`]: values that JSON has. A preset of the paper is
            given as its parts: `prompt=preset.prompt, **preset.generate_kwargs`.

    Returns:
        [`CaptionCounts`].

    Raises:
        CollectionError: if there are no pictures, or captions of other settings, if the output does not fit, or if
            another run is writing to it.
        ValueError: if an argument has no such value.
        OutputLostError: if captions are gone at the end, as when their folder was deleted meanwhile.

    Example:

    ```python
    >>> counts = caption_dataset(model, processor, "photos", "captions.jsonl", prompt="a photo of", num_beams=5)
    >>> counts.captioned, counts.broken
    (998, 2)
    ```"""
    state = PartialState(cpu=model.device.type == "cpu")
    pictures = _as_pictures(pictures)
    check_reads_8_bit(processor.image_processor)
    existing = "overwrite" if overwrite else existing
    num_written = num_captions if rerank is None else 1
    files = open_output(output, output_format, pictures, existing, num_written, extension, with_confidence)
    generate_kwargs["max_new_tokens"] = max_new_tokens
    texts = {"num_captions": num_captions, "prefix": prefix, "suffix": suffix, "seed": seed}
    named = {**texts, "confidence": with_confidence or None}
    if rerank is not None:
        named["rerank"] = rerank.settings()
    texts["with_confidence"] = with_confidence
    prompt = learned_prompt(processor) if prompt is None else prompt
    settings = _settings(model, processor, files.pictures, prompt, generate_kwargs, named)

    def caption(indices: list[int]) -> Generator[PictureCaption, None, None]:
        wanted = Subset(pictures, indices)
        options = {"batch_size": batch_size, "num_workers": num_workers, **texts, **generate_kwargs}
        options["rerank"] = rerank
        if seed is not None and indices:
            options["seed"] = seed_of(seed, indices[0])  # of each process its own
        return caption_images(model, processor, wanted, prompt, **options)

    with only_writer(files.lock, files.place, state):
        return _caption_missing(caption, files, settings, state)


def _caption_missing(
    caption: Callable[[list[int]], Generator[PictureCaption, None, None]],
    files: CaptionOutput,
    settings: dict[str, Any],
    state: PartialState,
) -> CaptionCounts:
    """Caption the pictures that have no caption yet, each process a share of them, and make the result."""

    def look() -> tuple[str, set[int], int]:
        files.check(settings)
        files.prepare(settings)
        return files.existing, files.done(), files.next_part()

    num_pictures, (files.existing, done, part) = len(files.pictures), of_first(look, state)
    missing = [index for index in range(num_pictures) if index not in done]
    part += state.process_index
    if state.is_main_process:
        to_do = f"{num_pictures:,} pictures, {len(done):,} done already, {len(missing):,} to caption"
        tqdm.write(f"{to_do}{tell_share(state)}: {files.place}", file=sys.stderr)
    own = share(missing, state)
    own_counts = _write(caption(own), own, files, part, is_shown=state.is_main_process)
    captioned, broken, empty = map(sum, zip(*gather_object([own_counts]), strict=True))
    counts = CaptionCounts(num_pictures, len(done), captioned, broken)
    if state.is_main_process:
        files.finish(settings)
        files.check_complete()
        message = f"Captions written: {captioned:,}."
        if not missing:
            message = 'Nothing is left to caption. existing="overwrite" (--overwrite) writes all captions anew.'
        if broken:
            message += f" Pictures that can't be read: {broken:,}; {files.broken} says why."
        if empty:
            message += f" {tell_empty(empty)}"
        tqdm.write(message, file=sys.stderr)
    state.wait_for_everyone()
    return counts


def _as_pictures(pictures: Any) -> Pictures:
    if isinstance(pictures, (str, os.PathLike)):
        pictures = FolderPictures(pictures)
    elif not isinstance(pictures, Pictures):
        pictures = RowPictures(pictures)
    if len(pictures) == 0:
        raise CollectionError(f"There are no pictures in {pictures.describe()}.")
    return pictures


def _settings(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pictures: Pictures,
    prompt: str | None,
    generate_kwargs: Mapping[str, Any],
    texts: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what captions depend on, as JSON gives it back. What has no effect is left out."""
    generation = {
        name: value
        for name, value in (model.generation_config.to_diff_dict() | generate_kwargs).items()
        if value is not None and value is not False and name[0] != "_" and name != "transformers_version"
    }
    settings = {
        **pictures.describe(),
        "model": model.name_or_path,
        **model_settings(model, processor.image_processor),
        "prompt": prompt,
        **({} if processor.frames_per_video == NUM_FRAMES else {"num_frames": processor.frames_per_video}),
        "generation": generation,
        **{name: value for name, value in texts.items() if value not in (None, "") and (name, value) != _ONE},
    }
    return as_json(settings)


def _write(
    captions: Generator[PictureCaption, None, None],
    indices: Sequence[int],
    files: CaptionOutput,
    part: int,
    is_shown: bool,
) -> tuple[int, int, int]:
    """Write captions as they come. Return the numbers of captioned, of unreadable and of pictures without a word."""
    if not indices:
        return 0, 0, 0
    written = empty = 0
    with (
        closing(captions),
        files.open_part(part) as add,
        logging.tqdm(total=len(indices), desc="Captions", unit="picture", disable=not is_shown) as progress,
    ):
        for caption in captions:
            written += files.write(add, replace(caption, index=indices[caption.index]))
            empty += caption.is_empty
            progress.update()
    return written, len(indices) - written, empty


__all__ = ["CaptionCounts", "caption_dataset"]
