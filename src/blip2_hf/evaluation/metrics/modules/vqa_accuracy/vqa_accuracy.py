"""VQA accuracy of answers, for VQAv2 and OK-VQA."""

import datasets
import evaluate

from blip2_hf.evaluation.metrics import vqa_accuracy


_CITATION = """Antol et al.: VQA: Visual Question Answering. ICCV 2015."""
_INPUTS = """
Args:
    predictions (`list[str]`): one answer for each question.
    references (`list[list[str]]`): the annotators' answers to each question, ten in VQAv2 and OK-VQA.
    answer_types (`list[str]`, *optional*): the type of each answer, to have the accuracy of each type.
    question_types (`list[str]`, *optional*): likewise.
    protocol (`str`, *optional*, defaults to `"official"`): `"official"`, `"lavis"`, or `"exact"` for any number of
        accepted answers.

Returns:
    `dict`: `vqa_accuracy`, between 0 and 1; with types, also `per_answer_type` and `per_question_type`.

Example:

>>> metric = load_metric("vqa_accuracy")
>>> metric.compute(predictions=["Two dogs."], references=[["2 dogs"] * 2 + ["2"] * 8])
{'vqa_accuracy': 0.6}
"""


class VqaAccuracy(evaluate.Metric):
    """VQA accuracy of answers, for VQAv2 and OK-VQA."""

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

    def _compute(self, predictions, references, answer_types=None, question_types=None, protocol="official"):
        return vqa_accuracy(predictions, references, answer_types, question_types, protocol)
