"""LAVIS's lemmatiser of answers, for OK-VQA."""

from collections.abc import Sequence
from functools import cache
from typing import Any


_MODEL = "en_core_web_sm"
_INSTALL = (
    f"Answers are lemmatised by spaCy and its model {_MODEL}, as in LAVIS. Install both: "
    f'pip install "blip2-hf[okvqa]", and python -m spacy download {_MODEL}. Or score the answers as they are: '
    "lemmatize=False, or --no-lemmatize."
)


@cache
def load_lemmatizer() -> Any:
    """Load spaCy's pipeline, or raise an `ImportError` that says how to install it."""
    try:
        import spacy
    except ImportError as error:
        raise ImportError(f"spaCy is not installed. {_INSTALL}") from error
    try:
        return spacy.load(_MODEL)
    except OSError as error:
        raise ImportError(f"spaCy is installed, but not {_MODEL}. {_INSTALL}") from error


def lemmatize_answers(answers: Sequence[str]) -> list[str]:
    r"""
    Lemmatise answers as LAVIS does for OK-VQA, because the annotators' answers are lemmatised. Nouns and verbs become
    their base form, and spaces separate words and signs. This needs spaCy and its model `en_core_web_sm`.

    Args:
        answers (`list[str]`):
            What a model answered.

    Returns:
        `list[str]`: the lemmatised answers.

    Raises:
        `ImportError`: if spaCy or its model is not installed.

    Example:

    ```python
    >>> lemmatize_answers(["two dogs", "skateboarding"])
    ['two dog', 'skateboard']
    ```"""
    different = list(dict.fromkeys(answers))
    lemmatized = dict(zip(different, map(_lemmas, load_lemmatizer().pipe(different)), strict=True))
    return [lemmatized[answer] for answer in answers]


def _lemmas(words: Any) -> str:
    return " ".join(word.lemma_ if word.pos_ in ("NOUN", "VERB") else word.text for word in words)


__all__ = ["lemmatize_answers"]
