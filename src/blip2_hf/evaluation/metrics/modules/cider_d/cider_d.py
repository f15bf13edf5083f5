"""CIDEr-D of captions, as in COCO's evaluation."""

import datasets
import evaluate

from blip2_hf.evaluation.metrics import cider_d, tokenize_captions


_CITATION = """Vedantam, Zitnick and Parikh: CIDEr: Consensus-based Image Description Evaluation. CVPR 2015."""
_INPUTS = """
Args:
    predictions (`list[str]`): one caption for each picture.
    references (`list[list[str]]`): the captions that people wrote for each picture.

Returns:
    `dict`: `CIDEr-D`, between 0 and 10.

Example:

>>> metric = load_metric("cider_d")
>>> metric.compute(predictions=["A dog.", "a cat"], references=[["a dog"], ["a cat", "cats"]])
{'CIDEr-D': 3.75}
"""


class CiderD(evaluate.Metric):
    """CIDEr-D of captions, as in COCO's evaluation."""

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
        return cider_d(*tokenize_captions(predictions, references))
