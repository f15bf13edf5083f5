"""BLEU-1 to BLEU-4 of captions, as in COCO's evaluation."""

import datasets
import evaluate

from blip2_hf.evaluation.metrics import bleu, tokenize_captions


_CITATION = (
    """Papineni, Roukos, Ward and Zhu: BLEU: a Method for Automatic Evaluation of Machine Translation. ACL 2002."""
)
_INPUTS = """
Args:
    predictions (`list[str]`): one caption for each picture.
    references (`list[list[str]]`): the captions that people wrote for each picture.

Returns:
    `dict`: `BLEU-1` to `BLEU-4`, between 0 and 1.

Example:

>>> metric = load_metric("bleu_coco")
>>> scores = metric.compute(predictions=["A dog.", "a cat"], references=[["a dog"], ["a cat", "cats"]])
>>> round(scores["BLEU-2"], 6)
1.0
"""


class BleuCoco(evaluate.Metric):
    """BLEU-1 to BLEU-4 of captions, as in COCO's evaluation."""

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
        return bleu(*tokenize_captions(predictions, references))
