"""GQA's accuracy (Hudson and Manning 2019)."""

from collections.abc import Sequence

from .vqa import comparable_answer


_PROTOCOLS = {"normalized": comparable_answer, "strict": str}


def gqa_accuracy(
    predictions: Sequence[str], references: Sequence[str], protocol: str = "normalized"
) -> dict[str, float]:
    r"""
    Compute the share of answers that are the one right answer.

    Args:
        predictions (`list[str]`):
            One answer for each question.
        references (`list[str]`):
            The right answer to each question.
        protocol (`str`, *optional*, defaults to `"normalized"`):
            - `"normalized"`: both are normalised as for VQA ([`normalize_vqa_answer`]): lower case, no punctuation, no
              articles, number words to ten as digits. LAVIS does so with the prediction.
            - `"strict"`: texts are compared as they are, as in GQA's own evaluation, whose answers are in lower case.

    Returns:
        `dict[str, float]`: `gqa_accuracy`, between 0 and 1.

    Raises:
        `ValueError`: if there is nothing to score, no such protocol, or not one reference for each prediction.

    Example:

    ```python
    >>> gqa_accuracy(["Yes.", "a table", "chair"], ["yes", "table", "desk"])
    {'gqa_accuracy': 0.6666666666666666}
    ```"""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions but {len(references)} references: each needs one")
    if len(predictions) == 0:
        raise ValueError("there are no predictions to score")
    for answer in (*predictions, *references):
        if not isinstance(answer, str):
            raise ValueError(f"predictions and references are lists of texts, one for each question, not {answer!r}")
    if protocol not in _PROTOCOLS:
        raise ValueError(f"protocol={protocol!r}: one of {', '.join(_PROTOCOLS)} was expected")
    written = _PROTOCOLS[protocol]
    right = [
        written(prediction) == written(reference)
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return {"gqa_accuracy": sum(right) / len(right)}


__all__ = ["gqa_accuracy"]
