"""Text that was generated, against what was wanted."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers.trainer_utils import EvalPrediction

from ..data.pairs import ImageTextPairs
from .metrics import choose_vqa_protocol, vqa_accuracy


def exact_match(predictions: Sequence[str], references: Sequence[str] | Sequence[Sequence[str]]) -> float:
    """Compute the share of predictions that are a reference of theirs, but for capitals and white space."""
    pairs = list(zip(predictions, map(_as_list, references), strict=True))
    return sum(_words(prediction) in map(_words, own) for prediction, own in pairs) / len(pairs)


def word_f1(predictions: Sequence[str], references: Sequence[str] | Sequence[Sequence[str]]) -> float:
    """
    Compute the mean over texts of the harmonic mean of precision and recall of words, with the nearest of several
    references.
    """
    pairs = zip(predictions, map(_as_list, references), strict=True)
    scores = [max(_f1(_words(prediction), _words(reference)) for reference in own) for prediction, own in pairs]
    return sum(scores) / len(scores)


def _f1(found: list[str], wanted: list[str]) -> float:
    return 2 * (Counter(found) & Counter(wanted)).total() / max(len(found) + len(wanted), 1)


def _as_list(references: str | Sequence[str]) -> Sequence[str]:
    return [references] if isinstance(references, str) else references


def _words(text: str) -> list[str]:
    return text.lower().split()


class GeneratedTextMetrics:
    r"""
    `compute_metrics` of a [`~training.Blip2Trainer`] with `predict_with_generate=True`: [`exact_match`] and
    [`word_f1`] of the first line of what was generated, and any score of yours.

    Labels hold the first text of each row alone. With `pairs`, all of them count.

    Args:
        processor ([`Blip2Processor`]):
            The processor of the model.
        pairs ([`~data.ImageTextPairs`], *optional*):
            The very dataset that is evaluated, whose texts are the references.
        score (`Callable`, *optional*):
            `score(predictions, references)` returns a `dict` of scores that are added, such as
            [`~metrics.caption_metrics`] (`CIDEr-D`, `BLEU-4`, ...) and [`score_answers`] (`vqa_accuracy`). It is given
            the texts as they stand in the data; `exact_match` and `word_f1` compare with the texts as they are
            learned.

    Attributes:
        predictions (`list[str]`):
            The texts of the last call.

    Raises:
        ValueError: if `score` is given without `pairs`; in a call, if the predictions are not of `pairs`.

    Example:

    ```python
    >>> metrics = GeneratedTextMetrics(processor, validation, caption_metrics)
    >>> trainer = Blip2Trainer(model, arguments, eval_dataset=validation, compute_metrics=metrics, ...)
    ```"""

    def __init__(self, processor: Any, pairs: ImageTextPairs | None = None, score: Callable | None = None):
        if score is not None and pairs is None:
            raise ValueError("score needs all references: give the dataset that is evaluated as pairs.")
        self.processor = processor
        self.score = score
        self.predictions: list[str] = []
        self.references = None if pairs is None else pairs.references()
        self.references_as_written = [] if pairs is None else pairs.references(cleaned=False)

    def texts(self, token_ids: np.ndarray) -> list[str]:
        """
        Decode what `Trainer` collected.

        Args:
            token_ids (`np.ndarray` of shape `(num_texts, length)`):
                New tokens, or labels; negative if there are none.

        Returns:
            `list[str]`: their first lines.
        """
        tokenizer = self.processor.tokenizer
        token_ids = np.where(token_ids < 0, tokenizer.pad_token_id, token_ids)
        texts = tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        return [text.strip().partition("\n")[0].strip() for text in texts]

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        predictions = self.predictions = self.texts(prediction.predictions)
        if self.references is None:
            references = [[text] for text in self.texts(prediction.label_ids)]
        else:
            references = self.references
        if len(predictions) != len(references):
            raise ValueError(
                f"There are {len(predictions)} predictions, but {len(references)} rows in the pairs of these metrics. "
                "Each dataset that is evaluated needs GeneratedTextMetrics of its own."
            )
        scores = {"exact_match": exact_match(predictions, references), "word_f1": word_f1(predictions, references)}
        return scores if self.score is None else scores | self.score(predictions, self.references_as_written)


def score_answers(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """
    Compute [`~metrics.vqa_accuracy`] by the protocol that fits the references ([`~metrics.choose_vqa_protocol`]).

    Args:
        predictions (`list[str]`):
            One answer for each question.
        references (`list[list[str]]`):
            The accepted answers to each question.

    Returns:
        `dict[str, float]`: `vqa_accuracy`.
    """
    return vqa_accuracy(predictions, references, protocol=choose_vqa_protocol(references))


__all__ = ["GeneratedTextMetrics", "exact_match", "score_answers", "word_f1"]
