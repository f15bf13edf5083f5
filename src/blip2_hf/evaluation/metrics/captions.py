"""What the caption metrics share: checks of the input, tokens and n-grams."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain

from .ptb import ptb_tokenize


Words = Sequence[str]


def check_pairs(predictions: Sequence, references: Sequence, wanted: str) -> None:
    """Raise a `ValueError` if predictions and lists of references do not fit together."""
    if isinstance(predictions, str) or isinstance(references, str):
        raise ValueError(f"predictions and references are lists, one entry for each picture, not one text; {wanted}")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions but {len(references)} lists of references: each needs one")
    if len(predictions) == 0:
        raise ValueError("there are no predictions to score")
    for index, own in enumerate(references):
        if isinstance(own, str) or own is None:
            raise ValueError(f"the references of prediction {index} are a list, not {own!r}; {wanted}")
        if len(own) == 0:
            raise ValueError(f"prediction {index} has no references: each needs at least one")


def check_words(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> None:
    """Check as [`check_pairs`], and that captions are lists of words."""
    wanted = "a caption is a list of words, as ptb_tokenize gives it; caption_metrics takes texts"
    check_pairs(predictions, references, wanted)
    for caption in chain(predictions, *references):
        if isinstance(caption, str):
            raise ValueError(f"{wanted}, not {caption!r}")


def check_texts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Check as [`check_pairs`], and that captions are texts."""
    wanted = "predictions are a list of texts, references a list of lists of texts"
    check_pairs(predictions, references, wanted)
    for caption in chain(predictions, *references):
        if not isinstance(caption, str):
            raise ValueError(f"{wanted}, but a caption is {caption!r}")


def count_ngrams(caption: Words, longest: int = 4) -> Counter[tuple[str, ...]]:
    """Count the runs of one to `longest` words. A token with a no-break space in it counts as its parts."""
    words = " ".join(caption).split()
    return Counter(
        tuple(words[start : start + size]) for size in range(1, longest + 1) for start in range(len(words) - size + 1)
    )


def tokenize_captions(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[list[str]], list[list[list[str]]]]:
    r"""
    Tokenise captions for the caption metrics, each by [`ptb_tokenize`].

    Args:
        predictions (`list[str]`):
            One caption for each picture; it may be empty.
        references (`list[list[str]]`):
            The captions that people wrote for each picture.

    Returns:
        `tuple`: the predictions as lists of words, the references as lists of lists of words.

    Raises:
        `ValueError`: if there is nothing to score, or a prediction without references.
    """
    check_texts(predictions, references)
    return [ptb_tokenize(text) for text in predictions], [[ptb_tokenize(text) for text in own] for own in references]
