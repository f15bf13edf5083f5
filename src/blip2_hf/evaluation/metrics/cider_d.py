"""CIDEr-D (Vedantam et al. 2015), which COCO's caption evaluation calls CIDEr."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from .captions import Words, check_words, count_ngrams


_SIGMA = 6.0  # of the penalty for another length
_Weights = list[dict[tuple[str, ...], float]]  # for each size of n-grams


def inverse_document_frequencies(references: Sequence[Sequence[Words]]) -> dict[tuple[str, ...], float]:
    r"""
    Compute how rare each n-gram of a corpus is: the logarithm of the number of pictures over that of pictures with the
    n-gram in a reference. The weight of n-grams in no reference, the logarithm of the number of pictures, is that of
    the empty n-gram `()`.

    Args:
        references (`list[list[list[str]]]`):
            The words of each picture's references.

    Returns:
        `dict[tuple[str, ...], float]`: the weight of each n-gram.
    """
    pictures = Counter(ngram for own in references for ngram in set().union(*map(count_ngrams, own)))
    log_pictures = math.log(len(references))
    return {(): log_pictures} | {ngram: log_pictures - math.log(number) for ngram, number in pictures.items()}


def cider_d_scores(
    predictions: Sequence[Words],
    references: Sequence[Sequence[Words]],
    rarity: Mapping[tuple[str, ...], float] | None = None,
) -> np.ndarray:
    r"""
    Compute CIDEr-D of each caption: the cosine similarity of tf-idf weighted n-grams of one to four words to each
    reference. Weights are clipped to the reference's, and another length is penalised. The score is the mean over
    references and sizes, times 10.

    Args:
        predictions (`list[list[str]]`):
            The words of one caption for each picture, see [`ptb_tokenize`].
        references (`list[list[list[str]]]`):
            The words of each picture's references.
        rarity (`dict[tuple[str, ...], float]`, *optional*):
            The idf of a corpus, of [`inverse_document_frequencies`]. By default the given references are the corpus,
            so that a score depends on all of them, and is 0 for one picture.

    Returns:
        `np.ndarray` of shape `(num_predictions,)`: between 0 and 10.

    Raises:
        `ValueError`: if there is nothing to score, or a prediction without references.
    """
    check_words(predictions, references)
    if rarity is None:
        rarity = inverse_document_frequencies(references)
    return np.array(
        [
            _cider_d(count_ngrams(prediction), [count_ngrams(reference) for reference in own], rarity)
            for prediction, own in zip(predictions, references, strict=True)
        ]
    )


def cider_d(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> dict[str, float]:
    """Compute `CIDEr-D` of a corpus: the mean of [`cider_d_scores`]. Papers print it times 100: 1.37 as 137."""
    return {"CIDEr-D": float(cider_d_scores(predictions, references).mean())}


def _cider_d(counts: Counter, references: list[Counter], rarity: Mapping) -> float:
    weights, norms, length = _weigh(counts, rarity)
    total = 0.0
    for reference in references:
        other_weights, other_norms, other_length = _weigh(reference, rarity)
        penalty = math.exp(-((length - other_length) ** 2) / (2 * _SIGMA**2))
        for own, other, norm in zip(weights, other_weights, np.multiply(norms, other_norms), strict=True):
            shared = sum(min(weight, other[ngram]) * other[ngram] for ngram, weight in own.items() if ngram in other)
            total += penalty * (shared / norm if norm else shared)
    return 10 * total / (4 * len(references))


def _weigh(counts: Counter, rarity: Mapping) -> tuple[_Weights, list[float], int]:
    """Return the weights of n-grams by size, their norms, and the length, which is in pairs of words as in COCO's."""
    weights: _Weights = [{}, {}, {}, {}]
    for ngram, count in counts.items():
        weights[len(ngram) - 1][ngram] = count * rarity.get(ngram, rarity[()])
    norms = [math.sqrt(sum(weight**2 for weight in own.values())) for own in weights]
    return weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2)


__all__ = ["cider_d", "cider_d_scores", "inverse_document_frequencies"]
