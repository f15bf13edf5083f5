"""
Texts that a model writes about many pictures: in batches as large as the memory allows, in one process or several, and
on the disk as they come.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from transformers.utils import logging

from ..data.image_size import own_image_size, with_image_size
from ..jobs.batch_size import BatchSize, first_batch_size
from ..jobs.fingerprints import fingerprint, model_settings
from ..jobs.inference import eval_mode
from ..jobs.output import share
from ..jobs.picture_inputs import PictureInputs, load_ahead
from ..jobs.text_writing import choose_texts, write_texts
from ..models.generation_presets import GenerationPreset
from ..models.image_loading import ImageLoadError, check_reads_8_bit
from .prediction_store import PredictionStore
from .samples import QuestionSample, Sample, open_sample_image, picture_key, samples_fingerprint


def predict_texts(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    prompts: Sequence[str],
    generate_kwargs: dict[str, Any],
    store: PredictionStore,
    image_size: int | None = None,
    batch_size: int | None = None,
    num_workers: int = 0,
    show_progress: bool = True,
    normalization: str | None = None,
) -> tuple[list[str], int]:
    r"""
    Write a text for each sample, or choose one of its choices. All processes of accelerate call it together, and share
    the pictures.

    Args:
        model ([`Blip2ForConditionalGeneration`]):
            The model, on the device of this process.
        processor ([`Blip2Processor`]):
            Its processor.
        samples (`list[CaptionSample]` or `list[QuestionSample]`):
            Pictures.
        prompts (`list[str]`):
            What the model goes on from, for each sample.
        generate_kwargs (`dict`):
            Arguments of `generate`.
        store ([`PredictionStore`]):
            What is in it is not written again.
        image_size (`int`, *optional*):
            Side of the square that pictures are scaled to. Without it, the image processor's own size.
        batch_size (`int`, *optional*):
            How many texts are written at a time. Without it, 128, or 16 on a CPU. It is halved if memory runs out.
        num_workers (`int`, *optional*, defaults to 0):
            Processes that load pictures.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
        normalization (`str`, *optional*):
            How choices are scored ([`~Blip2ForConditionalGeneration.score_texts`]). Without it, texts are generated.

    Returns:
        `tuple[list[str], int]`: the texts, in all processes, and the size that batches had in the end.
    """
    check_reads_8_bit(processor.image_processor)
    images = share(_by_image(samples, store.read()), store.state)
    image_processor = with_image_size(processor.image_processor, image_size)
    queue = _read_pictures(samples, images, image_processor, num_workers)
    current = BatchSize(first_batch_size(batch_size, model.device))

    @torch.no_grad()
    def write(rows: list[tuple[int, torch.Tensor]]) -> list[str]:
        own_prompts, pictures = [prompts[number] for number, _ in rows], [picture for _, picture in rows]
        if normalization is None:
            return write_texts(model, processor, generate_kwargs, own_prompts, pictures)
        choices: Any = [samples[number].choices for number, _ in rows]
        found = choose_texts(model, processor, choices, normalization, own_prompts, pictures)
        return [own[values.index(max(values))] for own, values in zip(choices, found, strict=True)]

    is_shown = show_progress and store.state.is_main_process
    total = sum(map(len, images))
    progress = logging.tqdm(total=total, unit="text", disable=not is_shown)
    with eval_mode(model), store.open() as add, progress:
        while rows := list(islice(queue, current.size)):
            for part, texts in current.run(write, rows):
                for (number, _), text in zip(part, texts, strict=True):
                    add([number, text])
                progress.update(len(part))
    store.state.wait_for_everyone()
    return store.read_all(len(samples)), current.size


def prediction_settings(
    model: Any,
    processor: Any,
    preset: GenerationPreset,
    samples: Sequence[Sample],
    image_size: int | None,
    normalization: str | None = None,
) -> dict[str, Any]:
    """
    Return what predictions depend on: neither the batch size nor the number of processes, and neither references nor
    names.
    """
    image_processor = with_image_size(processor.image_processor, image_size)
    defaults = model.generation_config.to_diff_dict()
    questions = [sample.question for sample in samples if isinstance(sample, QuestionSample)]
    choosing: dict[str, Any] = {}
    if normalization is not None:
        choices = [json.dumps(sample.choices).encode() for sample in samples if isinstance(sample, QuestionSample)]
        defaults, choosing = {}, {"normalization": normalization, "choices": fingerprint(choices)}
    return {
        **model_settings(model, image_processor),
        "prompt": preset.prompt,
        "generate_kwargs": preset.generate_kwargs,
        "generation_config": {name: value for name, value in defaults.items() if name != "transformers_version"},
        "image_size": own_image_size(image_processor),
        "num_samples": len(samples),
        "samples": samples_fingerprint(samples, questions),
        **choosing,
    }


def _by_image(samples: Sequence[Sample], done: dict[int, Any]) -> list[list[int]]:
    """Return the numbers of the samples that are not done, those about one picture together."""
    images: dict[Any, list[int]] = {}
    for number, sample in enumerate(samples):
        if number not in done:
            images.setdefault(picture_key(sample), []).append(number)
    return list(images.values())


def _read_pictures(
    samples: Sequence[Sample], images: Sequence[list[int]], image_processor: Any, num_workers: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the number of each sample and its picture, those about one picture one after the other."""
    inputs = _SampleInputs([samples[numbers[0]] for numbers in images], image_processor)
    for batch in load_ahead(inputs, num_workers, batch_size=1, prefetch_factor=16 if num_workers else None):
        if batch.pixel_values is None:
            raise ImageLoadError(*batch.errors.values())
        (index,), (picture,) = batch.numbers, batch.pixel_values
        for number in images[index]:
            yield number, picture


class _SampleInputs(PictureInputs):
    """The model's input for the pictures of samples."""

    def open_picture(self, number: int) -> Any:
        return open_sample_image(self.pictures[number])


__all__ = ["predict_texts"]
