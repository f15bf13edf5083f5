"""The filter: how well captions fit pictures, by a model for retrieval."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.processing_utils import ProcessorMixin

from ..jobs.fingerprints import model_settings
from ..jobs.inference import eval_mode
from ..models.losses import image_text_similarity
from ..models.modeling_image_text import Blip2ImageTextPreTrainedModel
from ..retrieval.two_stage import TwoStageRetrieval
from .captioners import picture_inputs


SCORES = ("sum", "itm", "itc")

CaptionFilter = Callable[[list[Any], list[list[str]]], Sequence[Sequence[float]]]


class RetrievalFilter:
    r"""
    Scores of captions by a model for retrieval. A picture goes through the tower once, however many captions it has.
    Its keys and values are computed once for contrast and once for matching. A caption of several pictures is read
    once for contrast.

    Args:
        model ([`Blip2ForImageTextRetrieval`] or [`Blip2ForPreTraining`]):
            The model, on its device.
        processor ([`Blip2Processor`]):
            Its processor.
        score (`str`, *optional*, defaults to `"sum"`):
            `"itm"`, the logit of "match"; `"itc"`, the cosine; or `"sum"` of both, by which retrieval ranks.
        batch_size (`int`, *optional*, defaults to 64):
            Pairs that the model takes at a time.
        max_length (`int`, *optional*, defaults to 35):
            Most tokens of a caption; the rest is not read.

    Raises:
        ValueError: if there is no such score; in a call, if features or scores are not finite.

    Example:

    ```python
    >>> model, processor = load_retrieval_model("stage1")
    >>> RetrievalFilter(model, processor)([image], [["a cat", "a red bus"]])
    [[3.1, -2.7]]
    ```"""

    def __init__(
        self,
        model: Blip2ImageTextPreTrainedModel,
        processor: ProcessorMixin,
        score: str = "sum",
        batch_size: int = 64,
        max_length: int = 35,
    ):
        if score not in SCORES:
            raise ValueError(f"score={score!r}: one of {', '.join(SCORES)} was expected.")
        self.model = model
        self.processor = processor
        self.score = score
        self.retrieval = TwoStageRetrieval(
            model, processor.tokenizer, batch_size=batch_size, max_length=max_length, show_progress=False
        )

    def __call__(self, pictures: list[Any], captions: list[list[str]]) -> list[list[float]]:
        r"""
        Score captions of pictures.

        Args:
            pictures (`list`):
                Pictures (`PIL.Image.Image`), or what the tower made of them (`torch.Tensor` of shape
                `(features, width)`).
            captions (`list[list[str]]`):
                Captions of each, one at least.

        Returns:
            `list[list[float]]`: their scores.
        """
        numbers = {text: number for number, text in enumerate(dict.fromkeys(sum(captions, [])))}
        pairs = torch.tensor(
            [(picture, numbers[text]) for picture, texts in enumerate(captions) for text in texts], dtype=torch.long
        )
        image_embeds = self._image_embeds(pictures)
        texts = self.retrieval.encode_texts(list(numbers))
        scores = torch.zeros(len(pairs))
        if self.score != "itm":
            similarity = image_text_similarity(self.retrieval.encode_images(image_embeds), texts.features)
            scores += similarity[pairs[:, 0], pairs[:, 1]]
        if self.score != "itc":
            scores += self.retrieval.match(image_embeds, texts.input_ids, pairs)
        return [part.tolist() for part in scores.split([len(texts) for texts in captions])]

    @torch.no_grad()
    def _image_embeds(self, pictures: list[Any]) -> torch.Tensor:
        inputs = picture_inputs(pictures, self.processor.image_processor).to(self.model.device)
        if inputs.dim() == 3:
            return inputs
        with eval_mode(self.model):
            return self.model.get_image_embeds(inputs)

    def settings(self) -> dict[str, Any]:
        """Return what the scores depend on."""
        model = model_settings(self.model, self.processor.image_processor)
        return {**model, "score": self.score, "max_length": self.retrieval.max_length}


__all__ = ["RetrievalFilter"]
