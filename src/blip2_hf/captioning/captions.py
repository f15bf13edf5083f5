"""Captions of pictures, some at a time: the next are decoded while the model writes."""

import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from ..jobs.batch_size import first_batch_size
from ..models.image_loading import ImageLoadError, load_image_for


logger = logging.get_logger(__name__)

MAX_NEW_TOKENS = 30  # LAVIS's captions have no more
_BATCHES_AHEAD = 2


@dataclass
class PictureCaption:
    r"""
    What [`caption_images`] says of a picture.

    Args:
        index (`int`):
            Which of the pictures.
        text (`str`, *optional*):
            Its caption; `None` if the picture can't be read.
        error (`str`, *optional*):
            Why it can't be read.
    """

    index: int
    text: str | None = None
    error: str | None = None


def caption_images(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence | Dataset | Iterable,
    prompt: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int | None = None,
    num_workers: int = 0,
    **generate_kwargs,
) -> Generator[PictureCaption, None, None]:
    r"""
    Captions pictures in their order, as `pipeline("image-to-text")` does. The next pictures are decoded while the
    model writes, and one that can't be read stops nothing. Where the memory of the device does not do, the pictures
    are captioned again in halves, and all that follow in batches of that size.

    Args:
        model ([`Blip2ForConditionalGeneration`]):
            The model, on its device.
        processor ([`Blip2Processor`]):
            Its processor.
        images (sequence, `Dataset`, or iterable):
            Anything that [`~image_loading.load_image`] takes.
        prompt (`str`, *optional*):
            Text that the captions go on from.
        max_new_tokens (`int`, *optional*, defaults to 30):
            The most tokens of a caption.
        batch_size (`int`, *optional*):
            Pictures at a time, to begin with. Without it 128, or 16 on a CPU.
        num_workers (`int`, *optional*, defaults to 0):
            Processes that decode pictures; 0 takes a thread of this one. What is no sequence is read by a thread.
        generate_kwargs (`dict`):
            Those of [`~Blip2ForConditionalGeneration.generate`], such as `num_beams`. A preset of the paper is given
            as its parts: `prompt=preset.prompt, **preset.generate_kwargs`.

    Returns:
        generator of [`PictureCaption`].

    Example:

    ```python
    >>> for caption in caption_images(model, processor, ["cat.jpg", "dog.jpg"], prompt="a photo of", num_beams=5):
    ...     print(caption.index, caption.text or caption.error)
    ```"""
    writer = CaptionWriter(model, processor, prompt, {"max_new_tokens": max_new_tokens, **generate_kwargs})
    size = batch_size or first_batch_size(model.device)
    was_training = model.training
    model.eval()
    try:
        for items, pixel_values in _batches(images, processor.image_processor, size, num_workers):
            texts = iter([] if pixel_values is None else writer(torch.from_numpy(pixel_values)))
            for index, error in items:
                yield PictureCaption(index, None if error else next(texts), error)
    finally:
        model.train(was_training)


class CaptionWriter:
    """Runs the model on no more pictures at a time than its memory takes."""

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, prompt: str | None, generate_kwargs: dict[str, Any]
    ):
        self.model = model
        self.processor = processor
        self.generate_kwargs = generate_kwargs
        self.prompt = processor(text=prompt or "", return_tensors="pt").to(model.device)
        self.limit: int | None = None

    def __call__(self, pixel_values: torch.Tensor) -> list[str]:
        texts: list[str] = []
        while len(texts) < len(pixel_values):
            end = len(pixel_values) if self.limit is None else len(texts) + self.limit
            part = pixel_values[len(texts) : end]
            found = self._try_to_write(part)
            if found is None:
                # Not where the error is handled, for it holds on to what lies in the memory
                clear_device_cache(garbage_collection=True)
                self.limit = len(part) // 2
                logger.warning(f"Too little memory for {len(part)} pictures at a time: going on with {self.limit}.")
            else:
                texts += found
        return texts

    def _try_to_write(self, pixel_values: torch.Tensor) -> list[str] | None:
        """Captions, or `None` if there is too little memory for so many."""
        try:
            return self._write(pixel_values)
        except RuntimeError as error:
            if len(pixel_values) == 1 or not should_reduce_batch_size(error):
                raise
            return None

    def _write(self, pixel_values: torch.Tensor) -> list[str]:
        prompt = {name: value.expand(len(pixel_values), -1) for name, value in self.prompt.items()}
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        generated = self.model.generate(pixel_values=pixel_values, **prompt, **self.generate_kwargs)
        if len(generated) != len(pixel_values):
            raise ValueError(
                f"The model wrote {len(generated)} texts about {len(pixel_values)} pictures, and one of each was "
                "expected. Leave num_return_sequences at 1."
            )
        return self.processor.post_process_image_text_to_text(generated, input_ids=prompt["input_ids"])


class _Prepared(Dataset):
    """The model's input for each picture, or why it can't be read."""

    def __init__(self, images: Sequence | Dataset, image_processor: Any):
        self.images = images
        self.image_processor = image_processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor | str]:
        try:
            image = load_image_for(self.image_processor, self.images[index], f"image {index + 1} of {len(self)}")
        except ImageLoadError as error:
            return index, str(error)
        return index, _to_pixel_values(image, self.image_processor)


class _PreparedStream(IterableDataset):
    """The same of pictures that come one after the other."""

    def __init__(self, images: Iterable, image_processor: Any):
        self.images = images
        self.image_processor = image_processor

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor | str]]:
        for index, image in enumerate(self.images):
            try:
                image = load_image_for(self.image_processor, image, f"image {index + 1}")
            except ImageLoadError as error:
                yield index, str(error)
            else:
                yield index, _to_pixel_values(image, self.image_processor)


def _to_pixel_values(image: Image.Image | torch.Tensor, image_processor: Any) -> torch.Tensor:
    return image_processor(images=image, return_tensors="pt")["pixel_values"][0]


def _batches(
    images: Any, image_processor: Any, batch_size: int, num_workers: int
) -> Iterator[tuple[list[tuple[int, str | None]], np.ndarray | None]]:
    is_map = isinstance(images, (Sequence, Dataset)) and not isinstance(images, IterableDataset)
    if isinstance(images, (str, bytes)):
        raise TypeError(f"caption_images takes a list of images, got one {type(images).__name__}.")
    num_workers = num_workers if is_map else 0
    loader = DataLoader(
        _Prepared(images, image_processor) if is_map else _PreparedStream(images, image_processor),
        batch_size=batch_size,
        collate_fn=_collate,
        num_workers=num_workers,
        worker_init_fn=leave_interrupts_to_the_parent,
        generator=torch.Generator(),  # the global one is left alone
    )
    return iter(loader) if num_workers else _ahead(loader)


def _ahead(items: Iterable) -> Iterator:
    """The same items, made in a thread before they are asked for."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as executor:
        waiting = deque(executor.submit(next, iterator, None) for _ in range(_BATCHES_AHEAD))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(executor.submit(next, iterator, None))
            yield item


def leave_interrupts_to_the_parent(worker: int):
    # Ctrl-C goes to all processes; a worker that it stops prints a traceback
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _collate(
    items: list[tuple[int, torch.Tensor | str]],
) -> tuple[list[tuple[int, str | None]], np.ndarray | None]:
    """Which pictures they are and why they can't be read; input for those that can."""
    readable = [value for _, value in items if isinstance(value, torch.Tensor)]
    shapes = {tuple(value.shape) for value in readable}
    if len(shapes) > 1:
        raise ValueError(
            f"The image processor made pictures of several sizes, {sorted(shapes)}. Let it make them of one, or take "
            "them one at a time with batch_size=1."
        )
    errors = [(index, value if isinstance(value, str) else None) for index, value in items]
    # An array comes through a pipe: a container has often less shared memory than a batch of tensors needs
    return errors, torch.stack(readable).numpy() if readable else None


__all__ = ["PictureCaption", "caption_images"]
