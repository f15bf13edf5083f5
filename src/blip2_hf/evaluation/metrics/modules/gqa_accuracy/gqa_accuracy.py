"""GQA's accuracy: the share of answers that are the right one."""

import datasets
import evaluate

from blip2_hf.evaluation.metrics import gqa_accuracy


_CITATION = """Hudson and Manning: GQA: A New Dataset for Real-World Visual Reasoning. CVPR 2019."""
_INPUTS = """
Args:
    predictions (`list[str]`): one answer for each question.
    references (`list[str]`): the right answer to each question.
    protocol (`str`, *optional*, defaults to `"normalized"`): `"normalized"`, or `"strict"` for GQA's own comparison.

Returns:
    `dict`: `gqa_accuracy`, between 0 and 1.

Example:

>>> metric = load_metric("gqa_accuracy")
>>> metric.compute(predictions=["Yes.", "a table"], references=["yes", "table"])
{'gqa_accuracy': 1.0}
"""


class GqaAccuracy(evaluate.Metric):
    """GQA's accuracy: the share of answers that are the right one."""

    def _info(self):
        features = {
            "predictions": datasets.Value("string"),
            "references": datasets.Value("string"),
        }
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references, protocol="normalized"):
        return gqa_accuracy(predictions, references, protocol)
