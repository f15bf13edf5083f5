"""Captioners: several captions of each picture, by a model of this library or by a pipeline."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.pipelines.base import Pipeline
from transformers.processing_utils import ProcessorMixin

from ..captioning.captions import MAX_NEW_TOKENS
from ..jobs.batch_size import BatchSize
from ..jobs.fingerprints import model_settings
from ..jobs.inference import eval_mode, seeded
from ..models.image_loading import check_reads_8_bit
from ..models.modeling_pretraining import Blip2ForPreTraining
from ..models.processing_blip2 import learned_prompt


NUM_CAPTIONS, TOP_P = 10, 0.9  # the paper's number; nucleus sampling as BLIP has it

Captioner = Callable[[list[Any]], Sequence[Sequence[str]]]


class ModelCaptioner:
    r"""
    Several captions of each picture by a BLIP-2 (section 3.4): sampled, unless `generate_kwargs` say otherwise. If
    memory runs out, pictures are captioned in halves; what is then sampled is not what it would have been.

    Args:
        model ([`Blip2ForConditionalGeneration`] or [`Blip2ForPreTraining`]):
            The model, on its device. That of stage 1 writes with its Q-Former (ITG).
        processor ([`Blip2Processor`]):
            Its processor.
        num_captions (`int`, *optional*, defaults to 10):
            Captions of each picture. The paper has 10.
        prompt (`str`, *optional*):
            Text that the captions go on from; it is not part of them. Without it the processor's `prompt`, if it has
            one.
        generate_kwargs (`dict`):
            Arguments of `generate`, over `do_sample=True, top_p=0.9, num_beams=1, max_new_tokens=30`.

    Raises:
        ValueError: if `num_captions` is less than 1.

    Example:

    ```python
    >>> captioner = ModelCaptioner(model, processor, num_captions=10, prompt="a photo of")
    >>> captioner([image])  # [['a dog on a beach', ...]], ten of them
    ```"""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        num_captions: int = NUM_CAPTIONS,
        prompt: str | None = None,
        **generate_kwargs,
    ):
        self.model = model
        self.processor = processor
        self.prompt = learned_prompt(processor) if prompt is None else prompt
        self.generate_kwargs = _generation(num_captions, generate_kwargs)
        self._batch_size = BatchSize()
        self._tokens = processor(text=self.prompt or "", return_tensors="pt").to(model.device)

    def __call__(self, pictures: list[Any]) -> list[list[str]]:
        r"""
        Caption pictures.

        Args:
            pictures (`list`):
                Pictures (`PIL.Image.Image`), or what the tower made of them (`torch.Tensor` of shape
                `(features, width)`).

        Returns:
            `list[list[str]]`: the captions of each.
        """
        inputs = picture_inputs(pictures, self.processor.image_processor)
        with eval_mode(self.model):
            return [texts for _, found in self._batch_size.run(self._write, inputs) for texts in found]

    def _write(self, inputs: torch.Tensor) -> list[list[str]]:
        is_stage1 = isinstance(self.model, Blip2ForPreTraining)
        names = ("input_ids", "attention_mask") if is_stage1 else self._tokens.keys()
        prompt = {name: self._tokens[name].expand(len(inputs), -1) for name in names}
        inputs = inputs.to(self.model.device, self.model.dtype)
        images = {"pixel_values" if inputs.dim() == 4 else "image_embeds": inputs}
        generated = self.model.generate(**images, **prompt, **self.generate_kwargs)
        if is_stage1:
            # [DEC] and the prompt, without the [SEP] that the tokenizer puts behind it
            is_prompt = self._tokens["input_ids"] != self.model.config.qformer_config.eos_token_id
            texts = self.processor.post_process_image_text_to_text(generated[:, int(is_prompt.sum()) :])
        else:
            texts = self.processor.post_process_image_text_to_text(generated, input_ids=prompt["input_ids"])
        count = self.generate_kwargs["num_return_sequences"]
        return [texts[start : start + count] for start in range(0, len(texts), count)]

    def settings(self) -> dict[str, Any]:
        """Return what the captions depend on."""
        model = model_settings(self.model, self.processor.image_processor)
        own = {} if isinstance(self.model, Blip2ForPreTraining) else self.model.generation_config.to_diff_dict()
        own.pop("transformers_version", None)
        return {**model, "prompt": self.prompt, "generation": own | self.generate_kwargs}


class PipelineCaptioner:
    r"""
    Several captions of each picture by a pipeline: sampled, unless `generate_kwargs` say otherwise.

    Args:
        pipe ([`~transformers.Pipeline`]):
            A pipeline of the task `"image-to-text"`. One of another task goes into a function of your own, which
            takes a list of pictures and returns a list of captions for each.
        num_captions (`int`, *optional*, defaults to 10):
            Captions of each picture.
        generate_kwargs (`dict`):
            Arguments of the pipeline's call, such as `prompt`, and of `generate`, over
            `do_sample=True, top_p=0.9, num_beams=1, max_new_tokens=30`.

    Raises:
        ValueError: if `num_captions` is less than 1; in a call, if it is given features.
    """

    def __init__(self, pipe: Pipeline, num_captions: int = NUM_CAPTIONS, **generate_kwargs):
        self.pipe = pipe
        self.generate_kwargs = _generation(num_captions, generate_kwargs)

    def __call__(self, pictures: list[Any]) -> list[list[str]]:
        if pictures and isinstance(pictures[0], torch.Tensor):
            raise ValueError(
                "The rows have features in place of pictures, which a pipeline can't read. Take a captioner of this "
                "library with the same vision tower, or rows with pictures."
            )
        outputs = self.pipe(pictures, batch_size=len(pictures), **self.generate_kwargs)
        return [[record["generated_text"] for record in records] for records in outputs]

    def settings(self) -> dict[str, Any]:
        """Return what the captions depend on."""
        return {**model_settings(self.pipe.model, self.pipe.image_processor), "generation": self.generate_kwargs}


def propose_captions(captioner: Captioner | None, pictures: list[Any], seed: int = 0) -> list[list[str]]:
    r"""
    Return what a captioner writes about pictures, the same each time: PyTorch's generators are seeded, and left as
    they were.

    Args:
        captioner (`Callable`, *optional*):
            [`ModelCaptioner`], [`PipelineCaptioner`], or any function from a list of pictures to a list of captions
            for each. `None` proposes nothing.
        pictures (`list`):
            What it takes.
        seed (`int`, *optional*, defaults to 0):
            Seed of what is sampled.

    Returns:
        `list[list[str]]`: the captions of each picture, without white space around them.

    Raises:
        ValueError: if the captioner does not return a list of texts for each picture.
    """
    if captioner is None or not pictures:
        return [[] for _ in pictures]
    with seeded(seed):
        captions = [list(texts) if not isinstance(texts, str) else texts for texts in captioner(pictures)]
    wrong = [texts for texts in captions if isinstance(texts, str) or not all(isinstance(text, str) for text in texts)]
    if len(captions) != len(pictures) or wrong:
        found = f"such as {wrong[0]!r}" if wrong else f"{len(captions)} lists"
        raise ValueError(
            f"The captioner was given {len(pictures)} pictures and returned {found}. A list of captions (`str`) for "
            "each picture was expected."
        )
    return [[text.strip() for text in texts] for texts in captions]


def picture_inputs(pictures: list[Any], image_processor: Any) -> torch.Tensor:
    """Return pixels of shape `(pictures, channels, height, width)`, or features of `(pictures, features, width)`."""
    if isinstance(pictures[0], torch.Tensor):
        return torch.stack(pictures)
    check_reads_8_bit(image_processor)
    return image_processor(images=pictures, return_tensors="pt")["pixel_values"]


def _generation(num_captions: int, generate_kwargs: dict[str, Any]) -> dict[str, Any]:
    if num_captions < 1:
        raise ValueError(f"num_captions={num_captions}: 1 at least. To rank without proposals, give no captioner.")
    sampling = {"do_sample": True, "top_p": TOP_P, "num_beams": 1} if generate_kwargs.get("do_sample", True) else {}
    return {"max_new_tokens": MAX_NEW_TOKENS, **sampling, **generate_kwargs, "num_return_sequences": num_captions}


__all__ = ["ModelCaptioner", "PipelineCaptioner", "propose_captions"]
