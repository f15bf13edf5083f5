"""Captions and questions as BLIP-2 was trained on them: the steps of LAVIS, in its order."""

import re


_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_SPACES = re.compile(r"\s{2,}")


def clean_caption(text: str, max_words: int = 50) -> str:
    """
    A caption as LAVIS trains on it: lower case, ``. ! " ( ) * # : ; ~`` turned into spaces, runs of white space into
    one space. A prompt goes in front of it afterwards.

    Args:
        text (`str`):
            The caption.
        max_words (`int`, *optional*, defaults to 50):
            Number of words that are kept.

    Returns:
        `str`: the caption; empty if nothing but punctuation was given.
    """
    text = _SPACES.sub(" ", _PUNCTUATION.sub(" ", text.lower()))
    return _first_words(text.rstrip("\n").strip(" "), max_words)


def clean_question(text: str, max_words: int = 50) -> str:
    """
    A question as LAVIS trains on it: lower case, ``. ! " ( ) * # : ; ~`` deleted, white space left as it is but for
    spaces at the end.

    Args:
        text (`str`):
            The question.
        max_words (`int`, *optional*, defaults to 50):
            Number of words that are kept.

    Returns:
        `str`: the question.
    """
    return _first_words(_PUNCTUATION.sub("", text.lower()).rstrip(" "), max_words)


def _first_words(text: str, max_words: int) -> str:
    return " ".join(text.split(" ")[:max_words])
