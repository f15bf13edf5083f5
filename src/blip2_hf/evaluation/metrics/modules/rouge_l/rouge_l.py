"""ROUGE-L of captions, as in COCO's evaluation."""

import datasets
import evaluate

from blip2_hf.evaluation.metrics import rouge_l, tokenize_captions


_CITATION = """Lin: ROUGE: A Package for Automatic Evaluation of Summaries. ACL workshop 2004."""
_INPUTS = """
Args:
    predictions (`list[str]`): one caption for each picture.
    references (`list[list[str]]`): the captions that people wrote for each picture.

Returns:
    `dict`: `ROUGE-L`, between 0 and 1.

Example:

>>> metric = load_metric("rouge_l")
>>> metric.compute(predictions=["A dog.", "a cat"], references=[["a dog"], ["a cat", "cats"]])
{'ROUGE-L': 1.0}
"""


class RougeL(evaluate.Metric):
    """ROUGE-L of captions, as in COCO's evaluation."""

    def _info(self):
        features = {
            "predictions": datasets.Value("string"),
            "references": datasets.List(datasets.Value("string")),
        }
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references):
        return rouge_l(*tokenize_captions(predictions, references))
