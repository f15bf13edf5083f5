"""Rewards of captions for TRL's trainers: likeness to references, and how well a picture and a caption go together."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from transformers.processing_utils import ProcessorMixin

from .capfilt.filters import RetrievalFilter
from .evaluation.metrics import cider_d_scores, inverse_document_frequencies, ptb_tokenize, tokenize_captions
from .models.image_loading import load_image
from .models.modeling_image_text import Blip2ImageTextPreTrainedModel


class _CaptionReward(ABC):
    """Base class of rewards that compare captions with a column of the data set."""

    def __init__(self, name: str, column: str):
        self.__name__ = name  # in TRL's logs
        self.column = column

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float]:
        r"""
        Score completions, with the arguments that TRL gives.

        Args:
            completions (`list[str]` or `list[list[dict]]`):
                Captions, as text or as messages.
            columns:
                The columns of the data set, with a value for each completion.

        Returns:
            `list[float]`: one for each completion.

        Raises:
            ValueError: if the column is missing, or has not one picture in a row that needs one.
        """
        if self.column not in columns:
            raise ValueError(
                f"The data set has no column {self.column!r}, which {self.__name__} needs. Name another with column=."
            )
        return self._score(completion_texts(completions), columns[self.column])

    @abstractmethod
    def _score(self, captions: list[str], values: Sequence[Any]) -> list[float]:
        """Return the scores of captions. `values` has what each is compared with."""


class CiderReward(_CaptionReward):
    r"""
    CIDEr-D of captions against the references of their pictures, between 0 and 10, as in self-critical training
    (Rennie et al. 2017).

    Args:
        corpus (`list[list[str]]`):
            The references of each training picture, from which the rarity of words is computed.
        column (`str`, *optional*, defaults to `"references"`):
            The column of the data set with the references of a picture.

    Raises:
        ValueError: if the corpus has fewer than two pictures.

    Example:

    ```python
    >>> reward = CiderReward(dataset["references"])
    >>> trainer = GRPOTrainer(model, reward_funcs=reward, train_dataset=dataset, processing_class=processor)
    ```"""

    def __init__(self, corpus: Sequence[Sequence[str]], column: str = "references"):
        super().__init__("cider_d", column)
        words = [[ptb_tokenize(text) for text in own] for own in corpus]
        if len(words) < 2:
            raise ValueError(
                f"The corpus has {len(words)} pictures. Give the references of two at least, because the rarity of a "
                "word is the share of pictures that have it."
            )
        self.rarity = inverse_document_frequencies(words)

    def _score(self, captions: list[str], values: Sequence[Any]) -> list[float]:
        return cider_d_scores(*tokenize_captions(captions, values), self.rarity).tolist()


class RetrievalReward(_CaptionReward):
    r"""
    How well captions go with their pictures, by a model of stage 1 or for retrieval. No references are needed.

    Args:
        model ([`Blip2ForImageTextRetrieval`] or [`Blip2ForPreTraining`]):
            The model, on its device. It is not trained.
        processor ([`Blip2Processor`]):
            Its processor.
        score (`str`, *optional*, defaults to `"itm"`):
            `"itm"`, the logit of "match"; `"itc"`, the cosine; or `"sum"` of both.
        column (`str`, *optional*, defaults to `"image"`):
            The column of the data set with the picture, or with a list of one.
        kwargs (`dict`):
            `batch_size` and `max_length`, as for [`~capfilt.RetrievalFilter`].

    Raises:
        ValueError: if there is no such score.

    Example:

    ```python
    >>> reward = RetrievalReward(*load_retrieval_model("stage1"), score="itc")
    ```"""

    def __init__(
        self,
        model: Blip2ImageTextPreTrainedModel,
        processor: ProcessorMixin,
        score: str = "itm",
        column: str = "image",
        **kwargs: Any,
    ):
        super().__init__(score, column)
        self.filter = RetrievalFilter(model, processor, score=score, **kwargs)

    def _score(self, captions: list[str], values: Sequence[Any]) -> list[float]:
        pictures: list[Any] = []
        texts: list[list[str]] = []
        for image, text in zip(values, captions, strict=True):
            picture = _only(image)
            # The completions of a prompt follow each other, and their picture goes through the tower once
            if not pictures or not _is_same(picture, pictures[-1]):
                pictures.append(picture)
                texts.append([])
            texts[-1].append(text)
        return [score for scores in self.filter([*map(load_image, pictures)], texts) for score in scores]


def completion_texts(completions: Sequence[Any]) -> list[str]:
    r"""
    Return the text of completions.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Texts, or messages whose `content` is a text or a list of parts.

    Returns:
        `list[str]`: stripped of white space.
    """
    return [
        (completion if isinstance(completion, str) else "".join(map(_message_text, completion))).strip()
        for completion in completions
    ]


def _message_text(message: Mapping) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _is_same(picture: Any, other: Any) -> bool:
    # Arrays have no single answer to ==
    return picture is other or (isinstance(picture, (str, Image.Image)) and picture == other)


def _only(image: Any) -> Any:
    if not isinstance(image, (list, tuple)):
        return image
    if len(image) != 1:
        raise ValueError(f"A row has {len(image)} pictures: one was expected.")
    return image[0]


__all__ = ["CiderReward", "RetrievalReward", "completion_texts"]
