"""Captions and questions as BLIP-2 was trained on them: the steps of LAVIS, in its order, and its prefixes."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch


_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_SPACES = re.compile(r"\s{2,}")
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")  # half a character, which no tokenizer reads
_WORD = re.compile(r"\S+")


def clean_caption(text: str, max_words: int = 50) -> str:
    """
    Clean a caption as LAVIS does: lower case, ``. ! " ( ) * # : ; ~`` turned into spaces, runs of white space into one
    space. A prompt is put in front afterwards.

    Args:
        text (`str`):
            The caption.
        max_words (`int`, *optional*, defaults to 50):
            Number of words to keep.

    Returns:
        `str`: the caption; empty if nothing but punctuation was given.
    """
    text = _SPACES.sub(" ", _PUNCTUATION.sub(" ", text.lower()))
    return _first_words(text.rstrip("\n").strip(" "), max_words)


def clean_question(text: str, max_words: int = 50) -> str:
    """
    Clean a question as LAVIS does: lower case, ``. ! " ( ) * # : ; ~`` deleted, white space left as it is except for
    spaces at the end.

    Args:
        text (`str`):
            The question.
        max_words (`int`, *optional*, defaults to 50):
            Number of words to keep.

    Returns:
        `str`: the question.
    """
    return _first_words(_PUNCTUATION.sub("", text.lower()).rstrip(" "), max_words)


def texts_of(value: Any) -> list[Any]:
    """
    Return one text, several, or several records with `answer`, as in VQAv2, as a list. What is none of them stays, to
    be refused.

    Args:
        value:
            What a row has in a column of texts.

    Returns:
        `list`: the texts.
    """
    if isinstance(value, Mapping) and isinstance(value.get("answer"), list):
        return value["answer"]  # as `datasets.Sequence` stores records
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        return [value]
    return [text.get("answer", text) if isinstance(text, Mapping) else text for text in value]


def has_text(value: Any) -> bool:
    """
    Tell whether a row has a text, which is more than white space.

    Args:
        value:
            What the row has in a column of texts.

    Returns:
        `bool`: whether the text, or one of several, is not empty.
    """
    return any(text.strip() if isinstance(text, str) else text is not None for text in texts_of(value))


def split_prefix(text: str, generator: torch.Generator) -> tuple[str, str]:
    """
    Split a text in front of a random word into a prefix for an encoder and a suffix for a decoder. Each word has the
    same probability.

    Args:
        text (`str`):
            The text.
        generator (`torch.Generator`):
            Source of all randomness.

    Returns:
        `tuple[str, str]`: prefix, which may be empty, and suffix, which has at least one word, without the white space
        between them.

    Raises:
        ValueError: if the text has no word.
    """
    starts = [word.start() for word in _WORD.finditer(text)]
    if not starts:
        raise ValueError(f"A text with at least one word was expected, got {text!r}.")
    start = starts[int(torch.randint(len(starts), (), generator=generator))]
    return text[:start].rstrip(), text[start:]


def _first_words(text: str, max_words: int) -> str:
    return " ".join(text.split(" ")[:max_words])
