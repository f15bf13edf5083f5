"""CIDEr-D, BLEU-1 to BLEU-4 and ROUGE-L of captions, as in COCO's evaluation."""

import datasets
import evaluate

from blip2_hf.evaluation.metrics import caption_metrics


_CITATION = """Chen et al.: Microsoft COCO Captions: Data Collection and Evaluation Server. arXiv 1504.00325."""
_INPUTS = """
Args:
    predictions (`list[str]`): one caption for each picture.
    references (`list[list[str]]`): the captions that people wrote for each picture.

Returns:
    `dict`: `CIDEr-D`, `BLEU-1` to `BLEU-4`, `ROUGE-L`.

Example:

>>> metric = load_metric("caption_metrics")
>>> scores = metric.compute(predictions=["A dog.", "a cat"], references=[["a dog"], ["a cat", "cats"]])
>>> sorted(scores)
['BLEU-1', 'BLEU-2', 'BLEU-3', 'BLEU-4', 'CIDEr-D', 'ROUGE-L']
"""


class CaptionMetrics(evaluate.Metric):
    """CIDEr-D, BLEU-1 to BLEU-4 and ROUGE-L of captions, as in COCO's evaluation."""

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
        return caption_metrics(predictions, references)
