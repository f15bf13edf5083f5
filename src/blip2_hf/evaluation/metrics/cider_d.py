"""CIDEr-D (Vedantam et al. 2015), which COCO's caption evaluation calls CIDEr."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from .captions import Words, check_words, count_ngrams


_SIGMA = 6.0  # of the penalty for another length
_Weights = list[dict[tuple[str, ...], float]]  # for each size of n-grams


def cider_d_scores(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    r"""
    Compute CIDEr-D of each caption: the cosine similarity of tf-idf weighted n-grams of one to four words to each
    reference. Weights are clipped to the reference's, and another length is penalised. The score is the mean over
    references and sizes, times 10. The given references are the documents of the idf, so a score depends on the
    corpus, and is 0 for a corpus of one picture.

    Args:
        predictions (`list[list[str]]`):
            The words of one caption for each picture, see [`ptb_tokenize`].
        references (`list[list[list[str]]]`):
            The words of each picture's references.

    Returns:
        `np.ndarray` of shape `(num_predictions,)`: between 0 and 10.

    Raises:
        `ValueError`: if there is nothing to score, or a prediction without references.
    """
    check_words(predictions, references)
    counts = [[count_ngrams(reference) for reference in own] for own in references]
    pictures = Counter(ngram for own in counts for ngram in set().union(*own))
    log_pictures = math.log(len(references))
    rarity = {ngram: log_pictures - math.log(number) for ngram, number in pictures.items()}
    return np.array(
        [
            _cider_d(count_ngrams(prediction), own, rarity, log_pictures)
            for prediction, own in zip(predictions, counts, strict=True)
        ]
    )


def cider_d(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> dict[str, float]:
    """Compute `CIDEr-D` of a corpus: the mean of [`cider_d_scores`]. Papers print it times 100: 1.37 as 137."""
    return {"CIDEr-D": float(cider_d_scores(predictions, references).mean())}


def _cider_d(counts: Counter, references: list[Counter], rarity: dict, unseen: float) -> float:
    weights, norms, length = _weigh(counts, rarity, unseen)
    total = 0.0
    for reference in references:
        other_weights, other_norms, other_length = _weigh(reference, rarity, unseen)
        penalty = math.exp(-((length - other_length) ** 2) / (2 * _SIGMA**2))
        for own, other, norm in zip(weights, other_weights, np.multiply(norms, other_norms), strict=True):
            shared = sum(min(weight, other[ngram]) * other[ngram] for ngram, weight in own.items() if ngram in other)
            total += penalty * (shared / norm if norm else shared)
    return 10 * total / (4 * len(references))


def _weigh(counts: Counter, rarity: dict, unseen: float) -> tuple[_Weights, list[float], int]:
    """Return the weights of n-grams by size, their norms, and the length, which is in pairs of words as in COCO's."""
    weights: _Weights = [{}, {}, {}, {}]
    for ngram, count in counts.items():
        weights[len(ngram) - 1][ngram] = count * rarity.get(ngram, unseen)
    norms = [math.sqrt(sum(weight**2 for weight in own.values())) for own in weights]
    return weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2)


__all__ = ["cider_d", "cider_d_scores"]
