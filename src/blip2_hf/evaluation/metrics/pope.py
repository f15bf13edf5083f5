"""POPE (Li et al. 2023): whether a model says that an object is in a picture when it is not."""

import re
from collections.abc import Sequence


_NO = {"no", "No", "not"}
_YES = re.compile(r"\byes\b", re.IGNORECASE)
_LABELS = ("yes", "no")


def pope(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    r"""
    Score answers to questions whether an object is in a picture, as POPE's authors do. An answer is `no` if its first
    sentence has the word "no", "No" or "not". Any other answer is `yes`, also an empty one. `yes` is the positive
    class.

    Args:
        predictions (`list[str]`):
            One answer for each question.
        references (`list[str]`):
            The right answers, each `"yes"` or `"no"`.

    Returns:
        `dict[str, float]`: `accuracy`, `precision`, `recall`, `f1`; `yes_ratio`, the share of answers that are `yes`;
        and `unclear_ratio`, the share of answers that are `yes` by the rule, but lack the word. All are between 0
        and 1. A ratio of nothing, such as the precision of a model that never says yes, is 0.

    Raises:
        `ValueError`: if there is nothing to score, if there is not one reference for each prediction, or if a
            reference is neither yes nor no.

    Example:

    ```python
    >>> scores = pope(["yes", "Yes, there is.", "No.", "a dog"], ["yes", "no", "no", "yes"])
    >>> scores["accuracy"], scores["recall"], scores["yes_ratio"], scores["unclear_ratio"]
    (0.75, 1.0, 0.75, 0.25)
    ```"""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions but {len(references)} references: each needs one")
    if len(predictions) == 0:
        raise ValueError("there are no predictions to score")
    for answer in predictions:
        if not isinstance(answer, str):
            raise ValueError(f"predictions are a list of texts, one for each question, not {answer!r}")
    labels = [_is_yes(label, f"reference {number}") for number, label in enumerate(references)]
    sentences = [_first_sentence(answer) for answer in predictions]
    answers = [_NO.isdisjoint(sentence.split(" ")) for sentence in sentences]
    unclear = [answer and not _YES.search(sentence) for answer, sentence in zip(answers, sentences, strict=True)]
    hits = sum(answer and label for answer, label in zip(answers, labels, strict=True))
    return {
        "accuracy": sum(answer == label for answer, label in zip(answers, labels, strict=True)) / len(labels),
        "precision": hits / max(sum(answers), 1),
        "recall": hits / max(sum(labels), 1),
        "f1": 2 * hits / max(sum(answers) + sum(labels), 1),
        "yes_ratio": sum(answers) / len(answers),
        "unclear_ratio": sum(unclear) / len(answers),
    }


def _is_yes(label: str, name: str) -> bool:
    """Return whether a right answer is yes, and refuse what is neither yes nor no."""
    if not isinstance(label, str) or label.lower() not in _LABELS:
        raise ValueError(f"{name} is {label!r}: yes or no was expected")
    return label.lower() == "yes"


def check_yes_or_no(references: Sequence[Sequence[str]], question_ids: Sequence[int | str]):
    """Raise a `ValueError` if a question has another number of answers than one, or an answer but yes and no."""
    for question_id, answers in zip(question_ids, references, strict=True):
        if len(answers) != 1:
            raise ValueError(
                f"question {question_id} has {len(answers)} answers: protocol='pope' takes one, which is yes or no"
            )
        _is_yes(answers[0], f"the answer to question {question_id}")


def _first_sentence(answer: str) -> str:
    return answer.partition(".")[0].replace(",", "")


__all__ = ["pope"]
