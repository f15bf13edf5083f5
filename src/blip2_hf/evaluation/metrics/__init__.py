"""Captions, answers and retrieval scored as the benchmarks do: pure Python functions, and modules of `evaluate`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .bleu import bleu
from .captions import tokenize_captions
from .chair import chair, find_objects
from .cider_d import cider_d, cider_d_scores, inverse_document_frequencies
from .gqa import gqa_accuracy
from .lemmas import lemmatize_answers
from .pope import pope
from .ptb import ptb_tokenize
from .rouge_l import rouge_l, rouge_l_scores
from .vqa import choose_vqa_protocol, normalize_vqa_answer, vqa_accuracy, vqa_accuracy_scores


if TYPE_CHECKING:
    from evaluate import EvaluationModule

METRICS = (
    "bleu_coco",
    "caption_metrics",
    "chair",
    "cider_d",
    "gqa_accuracy",
    "pope",
    "retrieval_recall",
    "rouge_l",
    "vqa_accuracy",
)


def caption_metrics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    r"""
    Compute the scores of COCO's caption evaluation for texts. Each text is cut into words once.

    Args:
        predictions (`list[str]`):
            One caption for each picture; it may be empty.
        references (`list[list[str]]`):
            The captions that people wrote for each picture.

    Returns:
        `dict[str, float]`: `CIDEr-D`, `BLEU-1` to `BLEU-4` and `ROUGE-L`.

    Raises:
        `ValueError`: if there is nothing to score, or a prediction without references.

    Example:

    ```python
    >>> scores = caption_metrics(
    ...     ["A dog runs.", "Two cats."], [["A dog runs fast.", "The dog is running."], ["Two cats sleep.", "2 cats"]]
    ... )
    >>> round(scores["BLEU-1"], 3)
    0.819
    ```"""
    words = tokenize_captions(predictions, references)
    return {**cider_d(*words), **bleu(*words), **rouge_l(*words)}


def load_metric(name: str, **kwargs: Any) -> "EvaluationModule":
    r"""
    Load a metric as a module of `evaluate`. Nothing is fetched.

    Args:
        name (`str`):
            One of `METRICS`: `"bleu_coco"`, `"caption_metrics"`, `"chair"`, `"cider_d"`, `"gqa_accuracy"`, `"pope"`,
            `"retrieval_recall"`, `"rouge_l"`, `"vqa_accuracy"`.
        kwargs:
            As for `evaluate.Metric`, such as `num_process` and `process_id`.

    Returns:
        `evaluate.EvaluationModule`: with `compute`, `add_batch` and so on.

    Raises:
        `ValueError`: if there is no such metric.
        `ImportError`: if `evaluate` is not installed.

    Example:

    ```python
    >>> metric = load_metric("vqa_accuracy")
    >>> metric.compute(predictions=["two"], references=[["2"]], protocol="exact")
    {'vqa_accuracy': 1.0}
    ```"""
    if name not in METRICS:
        raise ValueError(f"there is no metric {name!r}; there are {', '.join(METRICS)}")
    try:
        from .evaluate_module import Blip2Metric
    except ImportError as error:
        raise ImportError('Modules of evaluate need it: pip install "blip2-hf[evaluation]".') from error

    return Blip2Metric(config_name=name, **kwargs)


__all__ = [
    "METRICS",
    "bleu",
    "caption_metrics",
    "chair",
    "choose_vqa_protocol",
    "cider_d",
    "cider_d_scores",
    "find_objects",
    "gqa_accuracy",
    "inverse_document_frequencies",
    "lemmatize_answers",
    "load_metric",
    "normalize_vqa_answer",
    "pope",
    "ptb_tokenize",
    "rouge_l",
    "rouge_l_scores",
    "tokenize_captions",
    "vqa_accuracy",
    "vqa_accuracy_scores",
]
