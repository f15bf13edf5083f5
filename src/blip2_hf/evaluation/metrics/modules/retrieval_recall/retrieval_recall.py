"""Recall at k of retrieval between images and texts, both ways."""

import datasets
import evaluate
import torch

from blip2_hf.evaluation import retrieval_recall


_CITATION = """Li, Li, Savarese and Hoi: BLIP-2. ICML 2023, section 4.4."""
_INPUTS = """
Args:
    predictions (`list[list[float]]`): for each image, how alike each text is to it; the higher, the more.
    references (`list[list[bool]]`): for each image, which texts belong to it.
    k (`tuple[int, ...]`, *optional*, defaults to `(1, 5, 10)`): how many of the first count.

Returns:
    `dict`: `image_to_text_r1`, `text_to_image_r1` and so on, between 0 and 1.

Example:

>>> metric = load_metric("retrieval_recall")
>>> metric.compute(predictions=[[0.9, 0.1], [0.8, 0.3]], references=[[True, False], [False, True]], k=(1,))
{'image_to_text_r1': 0.5, 'text_to_image_r1': 1.0}
"""


class RetrievalRecall(evaluate.Metric):
    """Recall at k of retrieval between images and texts, both ways."""

    def _info(self):
        features = {
            "predictions": datasets.List(datasets.Value("float64")),
            "references": datasets.List(datasets.Value("bool")),
        }
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references, k=(1, 5, 10)):
        return retrieval_recall(torch.tensor(predictions), torch.tensor(references), k)
