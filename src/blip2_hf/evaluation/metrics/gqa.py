"""GQA's accuracy (Hudson and Manning 2019)."""

from collections.abc import Sequence


def gqa_accuracy(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    r"""
    The share of answers that are the one right answer. The official evaluation compares the strings as they are, and
    its answers are in lower case; so lower case is made, and white space around an answer taken off, first.

    Args:
        predictions (`list[str]`):
            One answer for each question.
        references (`list[str]`):
            The right answer to each question.

    Returns:
        `dict[str, float]`: `gqa_accuracy`, between 0 and 1.

    Raises:
        `ValueError`: if there is nothing to score, or not one reference for each prediction.

    Example:

    ```python
    >>> gqa_accuracy(["Yes", "a table"], ["yes", "table"])
    {'gqa_accuracy': 0.5}
    ```"""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions but {len(references)} references: each needs one")
    if len(predictions) == 0:
        raise ValueError("there are no predictions to score")
    for answer in (*predictions, *references):
        if not isinstance(answer, str):
            raise ValueError(f"predictions and references are lists of texts, one for each question, not {answer!r}")
    right = [
        prediction.strip().lower() == reference.strip().lower()
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return {"gqa_accuracy": sum(right) / len(right)}


__all__ = ["gqa_accuracy"]
