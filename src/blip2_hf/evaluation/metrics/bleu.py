"""BLEU (Papineni et al. 2002) as COCO's caption evaluation computes it."""

import math
from collections import Counter
from collections.abc import Sequence

from .captions import Words, check_words, count_ngrams


# COCO's smoothing, against zeros in products and divisions by zero
_TINY, _SMALL = 1e-15, 1e-9


def bleu(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> dict[str, float]:
    r"""
    Compute BLEU of a corpus for up to four words: the clipped precision of n-grams over the whole corpus, with a
    penalty for brevity against the references closest in length. BLEU of one caption is that of a corpus of one.

    Args:
        predictions (`list[list[str]]`):
            The words of one caption for each picture, see [`ptb_tokenize`].
        references (`list[list[list[str]]]`):
            The words of each picture's references.

    Returns:
        `dict[str, float]`: `BLEU-1` to `BLEU-4`, between 0 and 1.

    Raises:
        `ValueError`: if there is nothing to score, or a prediction without references.
    """
    check_words(predictions, references)
    right, made = [0] * 4, [0] * 4
    length = reference_length = 0
    for prediction, own in zip(predictions, references, strict=True):
        counts, reference_counts = count_ngrams(prediction), [count_ngrams(reference) for reference in own]
        number = _length(counts)
        length += number
        reference_length += min((abs(other - number), other) for other in map(_length, reference_counts))[1]
        most: Counter = Counter()
        for other in reference_counts:
            most |= other
        for ngram, count in counts.items():
            right[len(ngram) - 1] += min(count, most[ngram])
            made[len(ngram) - 1] += count
    return _scores(right, made, (length + _TINY) / (reference_length + _SMALL))


def _length(counts: Counter) -> int:
    return sum(count for ngram, count in counts.items() if len(ngram) == 1)


def _scores(right: list[int], made: list[int], ratio: float) -> dict[str, float]:
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = {}, 1.0
    for size in range(1, 5):
        product *= (right[size - 1] + _TINY) / (made[size - 1] + _SMALL)
        scores[f"BLEU-{size}"] = product ** (1 / size) * brevity
    return scores


__all__ = ["bleu"]
