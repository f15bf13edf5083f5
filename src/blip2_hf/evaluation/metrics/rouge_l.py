"""ROUGE-L (Lin 2004) as COCO's caption evaluation computes it."""

from collections.abc import Sequence

import numpy as np

from .captions import Words, check_words


_BETA = 1.2  # recall counts for more than precision


def rouge_l_scores(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    r"""
    Compute ROUGE-L of each caption: the F-measure of the best precision and the best recall over its references, both
    from the longest common subsequence of words.

    Args:
        predictions (`list[list[str]]`):
            The words of one caption for each picture, see [`ptb_tokenize`].
        references (`list[list[list[str]]]`):
            The words of each picture's references.

    Returns:
        `np.ndarray` of shape `(num_predictions,)`: between 0 and 1.

    Raises:
        `ValueError`: if there is nothing to score, or a prediction without references.
    """
    check_words(predictions, references)
    return np.array([_rouge_l(*pair) for pair in zip(predictions, references, strict=True)])


def rouge_l(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> dict[str, float]:
    """Compute `ROUGE-L` of a corpus: the mean of [`rouge_l_scores`]."""
    return {"ROUGE-L": float(rouge_l_scores(predictions, references).mean())}


def _rouge_l(prediction: Words, references: Sequence[Words]) -> float:
    prediction = prediction or [""]  # COCO's scorer sees one empty word in an empty caption
    precision = recall = 0.0
    for reference in references:
        reference = reference or [""]
        common = longest_common_subsequence(prediction, reference)
        precision = max(precision, common / len(prediction))
        recall = max(recall, common / len(reference))
    if precision == 0:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def longest_common_subsequence(first: Words, second: Words) -> int:
    """Return the length of the longest list of words that occurs in both, in order, with gaps or without."""
    places: dict[str, int] = {}
    for index, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << index
    # One bit for each word of `first` (Hyyrö 2004): a zero where the subsequence grows.
    row = mask = (1 << len(first)) - 1
    for word in second:
        matching = row & places.get(word, 0)
        row = ((row + matching) | (row - matching)) & mask
    return len(first) - row.bit_count()


__all__ = ["rouge_l", "rouge_l_scores"]
