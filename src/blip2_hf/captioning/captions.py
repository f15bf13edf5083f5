"""Captions of pictures and videos, some at a time: the next are decoded while the model writes."""

import random
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from ..jobs.batch_size import BatchSize, first_batch_size
from ..jobs.inference import eval_mode, seeded
from ..jobs.picture_inputs import PictureInputs, PictureStream, load_ahead
from ..models.image_loading import load_image
from ..models.processing_blip2 import learned_prompt
from ..models.video_loading import is_video


MAX_NEW_TOKENS = 30  # LAVIS's captions have no more

# From pictures, and captions of each, to their scores
Reranker = Callable[[list, list[list[str]]], Sequence[Sequence[float]]]
WrittenCaptions = tuple[list[str], list[float] | None]  # of a picture, and how sure the model is of each

_NEEDS_NO_SPACE = (*" \t\n", *",.;:!?")  # at the beginning of what is put behind a caption


@dataclass
class PictureCaption:
    r"""
    What [`caption_images`] says of a picture.

    Args:
        index (`int`):
            Which of the pictures.
        texts (`list[str]`, *optional*):
            Its captions, as many as were asked for; none if the picture can't be read.
        error (`str`, *optional*):
            Why it can't be read.
        confidences (`list[float]`, *optional*):
            How sure the model is of each caption, if this was asked for: the geometric mean of the probabilities of
            its tokens, and of its end unless it was cut off.
    """

    index: int
    texts: list[str] = field(default_factory=list)
    error: str | None = None
    confidences: list[float] | None = None

    @property
    def text(self) -> str | None:
        """Return the first caption; `None` if the picture can't be read."""
        return self.texts[0] if self.texts else None

    @property
    def is_empty(self) -> bool:
        """Return whether the model wrote nothing but white space."""
        return bool(self.texts) and not any(text.strip() for text in self.texts)


def tell_empty(count: int) -> str:
    """Say how many pictures have empty captions, and what may help."""
    return f'Empty captions: {count:,}. Another prompt may help, such as "a photo of" (--prompt).'


def caption_images(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence | Dataset | Iterable,
    prompt: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int | None = None,
    num_workers: int = 0,
    num_captions: int = 1,
    prefix: str | None = None,
    suffix: str | None = None,
    seed: int | None = None,
    with_confidence: bool = False,
    rerank: Reranker | None = None,
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
            Anything that [`~image_loading.load_image`] takes, and videos: files with the ending of one, and lists of
            pictures. Of a video the model reads `processor.frames_per_video` frames.
        prompt (`str`, *optional*):
            Text that the captions go on from. Without it the processor's `prompt`, if it has one.
        max_new_tokens (`int`, *optional*, defaults to 30):
            The most tokens of a caption.
        batch_size (`int`, *optional*):
            Pictures at a time, to begin with. Without it 128, or 16 on a CPU.
        num_workers (`int`, *optional*, defaults to 0):
            Processes that decode pictures; 0 takes a thread of this one, as does an iterable that is no sequence.
        num_captions (`int`, *optional*, defaults to 1):
            Captions of each picture. More than 1 need sampling, or as many beams.
        prefix, suffix (`str`, *optional*):
            Texts that are put before and behind each caption, such as a trigger word. The model does not see them. A
            space is put between if there is none.
        seed (`int`, *optional*):
            Seed of what is sampled. Captions are the same again with the same `images` and the same `batch_size`, if
            memory suffices for the batches.
        with_confidence (`bool`, *optional*, defaults to `False`):
            Whether to compute how sure the model is of each caption, which takes one more pass over the captions.
        rerank (`Callable`, *optional*):
            [`~capfilt.RetrievalFilter`], or any function of a list of pictures, and a list of captions for each, that
            returns a list of scores for each. Of `num_captions` captions, which are best sampled, the one with the
            highest score remains. `images` is a sequence then, because pictures are opened a second time.
        generate_kwargs (`dict`):
            Those of [`~Blip2ForConditionalGeneration.generate`], such as `num_beams`. A preset of the paper is given
            as its parts: `prompt=preset.prompt, **preset.generate_kwargs`.

    Returns:
        generator of [`PictureCaption`].

    Raises:
        ValueError: if `num_captions` or `batch_size` is less than 1, or arguments of `generate` do not fit, or a video
            or a stream is to be re-ranked.

    Example:

    ```python
    >>> for caption in caption_images(model, processor, ["cat.jpg", "dog.jpg"], prompt="a photo of", num_beams=5):
    ...     print(caption.index, caption.text or caption.error)
    ```"""
    if isinstance(images, (str, bytes)):
        raise TypeError(f"caption_images takes a list of images, got one {type(images).__name__}.")
    if num_captions < 1:
        raise ValueError(f"num_captions={num_captions}: at least 1 was expected.")
    is_sequence = isinstance(images, (Sequence, Dataset)) and not isinstance(images, IterableDataset)
    if rerank is not None and not is_sequence:
        raise ValueError("rerank opens each picture a second time: give the images as a list.")
    kind = PictureInputs if is_sequence else PictureStream
    inputs: Any = kind(images, processor.image_processor, "image", processor.frames_per_video)
    generate_kwargs["max_new_tokens"] = max_new_tokens
    writer = CaptionWriter(model, processor, prompt, generate_kwargs, num_captions, with_confidence)
    with eval_mode(model):
        for batch in load_ahead(inputs, num_workers, batch_size=first_batch_size(batch_size, model.device)):
            with seeded(None if seed is None else seed_of(seed, batch.numbers[0])):
                written = writer(batch.pictures)
            if rerank is not None and written:
                written = _keep_best(rerank, [inputs.open_picture(number) for number in batch.readable], written)
            found = iter(written)
            for number in batch.numbers:
                error = batch.errors.get(number)
                texts, confidences = ([], None) if error else next(found)
                yield PictureCaption(
                    number, [with_affixes(text, prefix, suffix) for text in texts], error, confidences
                )


def _keep_best(rerank: Reranker, pictures: list, written: list[WrittenCaptions]) -> list[WrittenCaptions]:
    """Return the caption of each picture that has the highest score, the first of equal ones."""
    if any(map(is_video, pictures)):
        raise ValueError("A video can't be re-ranked, because matching reads one picture. Caption videos without.")
    scores = rerank([load_image(picture) for picture in pictures], [texts for texts, _ in written])
    best = [list(own).index(max(own)) for own in scores]
    return [
        ([texts[i]], confidences and [confidences[i]]) for i, (texts, confidences) in zip(best, written, strict=True)
    ]


def seed_of(seed: int, number: int) -> int:
    """Return the seed of the pictures from a number on."""
    return random.Random(f"{seed} {number}").getrandbits(63)


def with_affixes(text: str, prefix: str | None, suffix: str | None) -> str:
    """Put texts before and behind a caption, with a space between if there is neither one nor punctuation."""
    if prefix:
        text = f"{prefix}{'' if prefix[-1].isspace() else ' '}{text}"
    if suffix:
        text = f"{text}{'' if suffix.startswith(_NEEDS_NO_SPACE) else ' '}{suffix}"
    return text.strip() if prefix or suffix else text


class CaptionWriter:
    """Runs the model on no more pictures at a time than its memory takes."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        prompt: str | None,
        generate_kwargs: dict[str, Any],
        num_captions: int = 1,
        with_confidence: bool = False,
    ):
        self.model = model
        self.processor = processor
        self.num_captions = num_captions
        self.generate_kwargs = generate_kwargs | ({"num_return_sequences": num_captions} if num_captions > 1 else {})
        self.with_confidence = with_confidence
        self.text = (learned_prompt(processor) if prompt is None else prompt) or ""
        self.prompt = processor(text=self.text, return_tensors="pt").to(model.device)
        self.batch_size = BatchSize()

    def __call__(self, pictures: Sequence[torch.Tensor]) -> list[WrittenCaptions]:
        """
        Return the captions of each picture, or row of frames, and how sure the model is of each if that is asked for.
        Those of one shape are a batch.
        """
        batches = [torch.stack(list(same)) for _, same in groupby(pictures, key=lambda picture: picture.shape)]
        return [pair for batch in batches for _, found in self.batch_size.run(self._write, batch) for pair in found]

    @torch.no_grad()
    def _write(self, pixel_values: torch.Tensor) -> list[WrittenCaptions]:
        prompt = {name: value.expand(len(pixel_values), -1) for name, value in self.prompt.items()}
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        of_qformer = {name: prompt.pop(name) for name in list(prompt) if name.startswith("qformer_")}
        features = self.model.get_image_features(pixel_values, **of_qformer).pooler_output
        generated = self.model.generate(image_features=features, **prompt, **self.generate_kwargs)
        if len(generated) != len(pixel_values) * self.num_captions:
            raise ValueError(
                f"The model wrote {len(generated)} texts about {len(pixel_values)} pictures, and {self.num_captions} "
                "of each was expected. Give num_captions in place of num_return_sequences."
            )
        texts = self.processor.post_process_image_text_to_text(generated, input_ids=prompt["input_ids"])
        captions = [texts[start : start + self.num_captions] for start in range(0, len(texts), self.num_captions)]
        confidences = self._confidences(features, captions) if self.with_confidence else [None] * len(captions)
        return list(zip(captions, confidences, strict=True))

    def _confidences(self, features: torch.Tensor, captions: list[list[str]]) -> list[list[float]]:
        # An empty caption has nothing to score, and scores 0
        candidates = [[text or "." for text in texts] for texts in captions]
        inputs = self.processor(text=[self.text] * len(captions), candidates=candidates, return_tensors="pt")
        # A caption that was cut off has no end
        inputs["candidate_labels"] = inputs["candidate_labels"][..., : self.generate_kwargs["max_new_tokens"]]
        inputs = {
            name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask", "candidate_labels")
        }
        scores = self.model.score_texts(**inputs, image_features=features, normalization="mean").exp().tolist()
        return [
            [score if text else 0.0 for text, score in zip(texts, own, strict=True)]
            for texts, own in zip(captions, scores, strict=True)
        ]


__all__ = ["PictureCaption", "caption_images"]
