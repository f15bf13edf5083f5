"""
Texts that a model writes about many pictures: in batches as large as the memory allows, in one process or several, and
on the disk as they come.

A picture goes through the tower and the Q-Former once for all questions of a batch about it.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging

from ..data.image_size import own_image_size, with_image_size
from ..jobs.batch_size import first_batch_size
from ..jobs.fingerprints import model_fingerprint
from ..models.generation_presets import GenerationPreset
from ..models.image_loading import check_reads_8_bit
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
) -> tuple[list[str], int]:
    r"""
    Writes a text for each sample. All processes of accelerate call it together, and share the pictures.

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
            How many texts are written at a time. Without it, 128, or 16 on a CPU. It is halved where memory runs out.
        num_workers (`int`, *optional*, defaults to 0):
            Processes that load pictures.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `tuple[list[str], int]`: the texts, in all processes, and the size that batches had in the end.
    """
    check_reads_8_bit(processor.image_processor)
    state = store.state
    done = store.read()
    images = _by_image(samples, done)[state.process_index :: state.num_processes]
    pictures = _Pictures(samples, images, with_image_size(processor.image_processor, image_size))
    loader = DataLoader(
        pictures,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=16 if num_workers else None,
        generator=torch.Generator(),  # the global one is left alone
    )
    queue = ((number, pixel_values) for numbers, pixel_values in loader for number in numbers)
    writer = _Writer(model, processor, generate_kwargs, batch_size or first_batch_size(model.device))
    was_training = model.training
    model.eval()
    try:
        with logging.tqdm(
            total=sum(map(len, images)), unit="text", disable=not (show_progress and state.is_main_process)
        ) as progress:
            for numbers, texts in writer.batches(queue, prompts):
                store.write(dict(zip(numbers, texts, strict=True)))
                progress.update(len(numbers))
    finally:
        model.train(was_training)
    state.wait_for_everyone()
    found = store.read()
    return [found[number] for number in range(len(samples))], writer.batch_size


def prediction_settings(
    model: Any,
    processor: Any,
    preset: GenerationPreset,
    samples: Sequence[Sample],
    image_size: int | None,
) -> dict[str, Any]:
    """
    Return what predictions depend on: neither the batch size nor the number of processes, and neither references nor
    names.
    """
    image_processor = with_image_size(processor.image_processor, image_size)
    defaults = model.generation_config.to_diff_dict()
    questions = [sample.question for sample in samples if isinstance(sample, QuestionSample)]
    return {
        "weights": model_fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompt": preset.prompt,
        "generate_kwargs": preset.generate_kwargs,
        "generation_config": {name: value for name, value in defaults.items() if name != "transformers_version"},
        "image_size": own_image_size(image_processor),
        "image_processor": json.loads(image_processor.to_json_string()),
        "num_samples": len(samples),
        "samples": samples_fingerprint(samples, questions),
    }


def _by_image(samples: Sequence[Sample], done: dict[int, Any]) -> list[list[int]]:
    """Numbers of the samples that are not done, those about one picture together."""
    images: dict[Any, list[int]] = {}
    for number, sample in enumerate(samples):
        if number not in done:
            images.setdefault(picture_key(sample), []).append(number)
    return list(images.values())


class _Pictures(Dataset):
    """Numbers of the samples about a picture, and what the tower reads of it."""

    def __init__(self, samples: Sequence[Sample], images: list[list[int]], image_processor: Any):
        self.samples = samples
        self.images = images
        self.image_processor = image_processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[list[int], torch.Tensor]:
        numbers = self.images[index]
        picture = open_sample_image(self.samples[numbers[0]])
        return numbers, self.image_processor(images=[picture], return_tensors="pt")["pixel_values"][0]


class _Writer:
    """Writes texts in batches, which it halves when memory runs out."""

    def __init__(self, model: Any, processor: Any, generate_kwargs: dict[str, Any], batch_size: int):
        self.model = model
        self.processor = processor
        self.generate_kwargs = generate_kwargs
        self.batch_size = batch_size

    def batches(self, queue: Iterator[tuple[int, torch.Tensor]], prompts: Sequence[str]):
        """Numbers of samples and their texts, batch after batch."""
        rows = list(islice(queue, self.batch_size))
        while rows:
            numbers, pictures = zip(*rows[: self.batch_size], strict=True)
            texts = self._write_or_halve([prompts[number] for number in numbers], pictures)
            if texts:
                yield numbers, texts
            rows = rows[len(texts) :]
            rows += islice(queue, max(0, self.batch_size - len(rows)))

    def _write_or_halve(self, prompts: list[str], pictures: Sequence[torch.Tensor]) -> list[str]:
        """Texts, or none where memory has run out: the next batch is then half as large."""
        try:
            return self.write(prompts, pictures)
        except RuntimeError as error:
            if len(prompts) == 1 or not should_reduce_batch_size(error):
                raise
        # Only here has the error let go of the batch's tensors
        clear_device_cache(garbage_collection=True)
        self.batch_size = len(prompts) // 2
        logging.get_logger(__name__).warning(f"Memory has run out: {self.batch_size} texts at a time from here on.")
        return []

    @torch.no_grad()
    def write(self, prompts: list[str], pictures: Sequence[torch.Tensor]) -> list[str]:
        """A text for each prompt and picture."""
        inputs = self.processor(text=prompts, return_tensors="pt").to(self.model.device)
        if self.processor.qformer_tokenizer is not None:
            # The Q-Former reads the question: each has features of its own
            inputs["pixel_values"] = self._stack(pictures)
        else:
            distinct = {id(picture): picture for picture in pictures}
            row = {key: number for number, key in enumerate(distinct)}
            features = self.model.get_image_features(self._stack(list(distinct.values()))).pooler_output
            inputs["image_features"] = features[[row[id(picture)] for picture in pictures]]
        tokens = self.model.generate(**inputs, **self.generate_kwargs)
        return self.processor.post_process_image_text_to_text(tokens, input_ids=inputs["input_ids"])

    def _stack(self, pictures: Sequence[torch.Tensor]) -> torch.Tensor:
        if len(sizes := {tuple(picture.shape) for picture in pictures}) > 1:
            raise ValueError(f"The image processor makes pictures of several sizes, {sorted(sizes)}: give image_size.")
        return torch.stack(list(pictures)).to(self.model.device, self.model.dtype)


__all__ = ["predict_texts"]
