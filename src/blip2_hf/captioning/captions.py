"""Captions of pictures, some at a time: the next are decoded while the model writes."""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from ..jobs.batch_size import BatchSize, first_batch_size
from ..jobs.inference import eval_mode
from ..jobs.picture_inputs import PictureInputs, PictureStream, load_ahead


MAX_NEW_TOKENS = 30  # LAVIS's captions have no more


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
    Caption pictures in their order, as `pipeline("image-to-text")` does. The next pictures are decoded while the model
    writes. A picture that can't be read stops nothing. If the memory of the device is too small for a batch, the batch
    is halved, and so are all that follow.

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
            Processes that decode pictures; 0 takes a thread of this one, as does an iterable that is no sequence.
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
    if isinstance(images, (str, bytes)):
        raise TypeError(f"caption_images takes a list of images, got one {type(images).__name__}.")
    is_sequence = isinstance(images, (Sequence, Dataset)) and not isinstance(images, IterableDataset)
    inputs = (PictureInputs if is_sequence else PictureStream)(images, processor.image_processor, "image")
    writer = CaptionWriter(model, processor, prompt, {"max_new_tokens": max_new_tokens, **generate_kwargs})
    with eval_mode(model):
        for batch in load_ahead(inputs, num_workers, batch_size=first_batch_size(batch_size, model.device)):
            texts = iter([] if batch.pixel_values is None else writer(batch.pixel_values))
            for number in batch.numbers:
                error = batch.errors.get(number)
                yield PictureCaption(number, None if error else next(texts), error)


class CaptionWriter:
    """Runs the model on no more pictures at a time than its memory takes."""

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, prompt: str | None, generate_kwargs: dict[str, Any]
    ):
        self.model = model
        self.processor = processor
        self.generate_kwargs = generate_kwargs
        self.prompt = processor(text=prompt or "", return_tensors="pt").to(model.device)
        self.batch_size = BatchSize()

    def __call__(self, pixel_values: torch.Tensor) -> list[str]:
        return [text for _, texts in self.batch_size.run(self._write, pixel_values) for text in texts]

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


__all__ = ["PictureCaption", "caption_images"]
