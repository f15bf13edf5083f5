"""Candidates of a picture: its own captions and those that were proposed, ranked by a filter."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..data.text import clean_caption
from .filters import CaptionFilter


@dataclass
class RankedCaption:
    r"""
    A candidate of a picture.

    Args:
        text (`str`):
            The caption, as it was written.
        score (`float`):
            What the filter says of it.
        is_original (`bool`):
            Whether the picture came with it.
    """

    text: str
    score: float
    is_original: bool


def rank_captions(
    caption_filter: CaptionFilter,
    pictures: list[Any],
    originals: Sequence[Sequence[str]],
    proposals: Sequence[Sequence[str]],
) -> list[list[RankedCaption]]:
    r"""
    Rank captions of each picture. The filter reads them as training does, cleaned by [`~data.clean_caption`]; what is
    then the same is scored once, and counts as an original if one of them is. What is then empty is left out.

    Args:
        caption_filter (`Callable`):
            [`RetrievalFilter`], or any function of a list of pictures, and a list of captions for each, that returns a
            list of scores for each.
        pictures (`list`):
            What it takes.
        originals (`list[list[str]]`):
            Captions that each picture came with.
        proposals (`list[list[str]]`):
            Captions that were proposed for each.

    Returns:
        `list[list[RankedCaption]]`: the candidates of each picture, the best first; of equal ones the original, then
        the one that was proposed first.

    Raises:
        ValueError: if the filter does not return a finite number for each caption.
    """
    candidates = [_candidates(*texts) for texts in zip(originals, proposals, strict=True)]
    chosen = [number for number, texts in enumerate(candidates) if texts]
    captions = [list(candidates[number]) for number in chosen]
    scores = (
        [list(map(float, row)) for row in caption_filter([pictures[i] for i in chosen], captions)] if chosen else []
    )
    if [len(row) for row in scores] != [len(row) for row in captions] or not all(map(math.isfinite, sum(scores, []))):
        raise ValueError("The filter did not return a finite number for each caption of each picture.")
    ranked: list[list[RankedCaption]] = [[] for _ in pictures]
    for number, row in zip(chosen, scores, strict=True):
        scored = zip(candidates[number].values(), row, strict=True)
        ranked[number] = [RankedCaption(text, score, is_original) for (text, is_original), score in scored]
        ranked[number].sort(key=lambda caption: -caption.score)
    return ranked


def kept_captions(ranked: Sequence[RankedCaption], keep: int = 2, min_score: float | None = None) -> list[str]:
    r"""
    Return the first captions of a ranking.

    Args:
        ranked (`list[RankedCaption]`):
            Candidates, the best first.
        keep (`int`, *optional*, defaults to 2):
            How many are kept. The paper keeps 2.
        min_score (`float`, *optional*):
            The lowest score that is kept.

    Returns:
        `list[str]`: no more than `keep`.
    """
    return [caption.text for caption in ranked[:keep] if min_score is None or caption.score >= min_score]


def _candidates(originals: Sequence[str], proposals: Sequence[str]) -> dict[str, tuple[str, bool]]:
    """Return texts, and whether they are originals, by what the filter reads of them; the first of several."""
    found: dict[str, tuple[str, bool]] = {}
    for texts, is_original in ((originals, True), (proposals, False)):
        for text in texts:
            if cleaned := clean_caption(text).strip():
                found.setdefault(cleaned, (text, is_original))
    return found


__all__ = ["RankedCaption", "kept_captions", "rank_captions"]
