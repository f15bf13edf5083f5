"""Text that was generated, against what was wanted."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers.trainer_utils import EvalPrediction


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The share of predictions that are the reference, but for capitals and white space."""
    pairs = list(zip(predictions, references, strict=True))
    return sum(_words(prediction) == _words(reference) for prediction, reference in pairs) / len(pairs)


def word_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The mean over texts of the harmonic mean of precision and recall of words."""
    scores = []
    for prediction, reference in zip(predictions, references, strict=True):
        found, wanted = _words(prediction), _words(reference)
        shared = (Counter(found) & Counter(wanted)).total()
        scores.append(2 * shared / max(len(found) + len(wanted), 1))
    return sum(scores) / len(scores)


def _words(text: str) -> list[str]:
    return text.lower().split()


class GeneratedTextMetrics:
    r"""
    `compute_metrics` of a [`~training.Blip2Trainer`] with `predict_with_generate=True`: [`exact_match`] and
    [`word_f1`] of the first line of what was generated.

    Args:
        processor ([`Blip2Processor`]):
            The processor of the model.

    Example:

    ```python
    >>> trainer = Blip2Trainer(model, arguments, compute_metrics=GeneratedTextMetrics(processor), ...)
    ```"""

    def __init__(self, processor: Any):
        self.processor = processor

    def texts(self, token_ids: np.ndarray) -> list[str]:
        """
        What `Trainer` collected, as text.

        Args:
            token_ids (`np.ndarray` of shape `(num_texts, length)`):
                New tokens, or labels; negative where there are none.

        Returns:
            `list[str]`: their first lines.
        """
        tokenizer = self.processor.tokenizer
        token_ids = np.where(token_ids < 0, tokenizer.pad_token_id, token_ids)
        texts = tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        return [text.strip().partition("\n")[0].strip() for text in texts]

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        predictions, references = self.texts(prediction.predictions), self.texts(prediction.label_ids)
        return {"exact_match": exact_match(predictions, references), "word_f1": word_f1(predictions, references)}


__all__ = ["GeneratedTextMetrics", "exact_match", "word_f1"]
