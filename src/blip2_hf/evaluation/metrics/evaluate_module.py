"""The metrics as modules of `evaluate`: one class, and a table of what each metric takes and computes."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from datasets import Features, List, Value
from evaluate import Metric, MetricInfo

from ..recall import retrieval_recall
from . import bleu, caption_metrics, chair, cider_d, gqa_accuracy, pope, rouge_l, tokenize_captions, vqa_accuracy


_CAPTIONS = """
Args:
    predictions (`list[str]`): one caption for each picture.
    references (`list[list[str]]`): the captions that people wrote for each picture.

Returns:
    `dict[str, float]`: {}.
"""


class _Row(NamedTuple):
    description: str
    citation: str
    inputs: str
    compute: Callable
    predictions: Any = Value("string")
    references: Any = List(Value("string"))


def _score_words(score: Callable) -> Callable:
    return lambda predictions, references: score(*tokenize_captions(predictions, references))


def _score_similarities(predictions: list, references: list, k: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """
    Compute recall at k, in both directions.

    Args:
        predictions (`list[list[float]]`): for each image, how alike each text is to it; the higher, the more alike.
        references (`list[list[bool]]`): for each image, which texts belong to it.
        k (`tuple[int, ...]`, *optional*, defaults to `(1, 5, 10)`): how many of the first count.

    Returns:
        `dict[str, float]`: `image_to_text_r1`, `text_to_image_r1` and so on, between 0 and 1.
    """
    return retrieval_recall(torch.tensor(predictions), torch.tensor(references), k)


MODULES = {
    "bleu_coco": _Row(
        "BLEU-1 to BLEU-4 of captions, as in COCO's evaluation.",
        "Papineni, Roukos, Ward and Zhu: BLEU: a Method for Automatic Evaluation of Machine Translation. ACL 2002.",
        _CAPTIONS.format("`BLEU-1` to `BLEU-4`, between 0 and 1"),
        _score_words(bleu),
    ),
    "caption_metrics": _Row(
        "CIDEr-D, BLEU-1 to BLEU-4 and ROUGE-L of captions, as in COCO's evaluation.",
        "Chen et al.: Microsoft COCO Captions: Data Collection and Evaluation Server. arXiv 1504.00325.",
        _CAPTIONS.format("`CIDEr-D`, `BLEU-1` to `BLEU-4` and `ROUGE-L`"),
        caption_metrics,
    ),
    "chair": _Row(
        "CHAIR: the share of captions, and of the objects that they name, with what is not in the picture.",
        "Rohrbach, Hendricks, Burns, Darrell and Saenko: Object Hallucination in Image Captioning. EMNLP 2018.",
        inspect.getdoc(chair),
        chair,
    ),
    "cider_d": _Row(
        "CIDEr-D of captions, as in COCO's evaluation.",
        "Vedantam, Zitnick and Parikh: CIDEr: Consensus-based Image Description Evaluation. CVPR 2015.",
        _CAPTIONS.format("`CIDEr-D`, between 0 and 10"),
        _score_words(cider_d),
    ),
    "gqa_accuracy": _Row(
        "GQA's accuracy: the share of answers that are the right one.",
        "Hudson and Manning: GQA: A New Dataset for Real-World Visual Reasoning. CVPR 2019.",
        inspect.getdoc(gqa_accuracy),
        gqa_accuracy,
        references=Value("string"),
    ),
    "pope": _Row(
        "POPE: accuracy, precision, recall and F1 of answers whether an object is in a picture.",
        "Li et al.: Evaluating Object Hallucination in Large Vision-Language Models. EMNLP 2023.",
        inspect.getdoc(pope),
        pope,
        references=Value("string"),
    ),
    "retrieval_recall": _Row(
        "Recall at k of retrieval between images and texts, in both directions.",
        "Li, Li, Savarese and Hoi: BLIP-2. ICML 2023, section 4.4.",
        inspect.getdoc(_score_similarities),
        _score_similarities,
        predictions=List(Value("float64")),
        references=List(Value("bool")),
    ),
    "rouge_l": _Row(
        "ROUGE-L of captions, as in COCO's evaluation.",
        "Lin: ROUGE: A Package for Automatic Evaluation of Summaries. ACL workshop 2004.",
        _CAPTIONS.format("`ROUGE-L`, between 0 and 1"),
        _score_words(rouge_l),
    ),
    "vqa_accuracy": _Row(
        "VQA accuracy of answers, for VQAv2 and OK-VQA.",
        "Antol et al.: VQA: Visual Question Answering. ICCV 2015.",
        inspect.getdoc(vqa_accuracy),
        vqa_accuracy,
    ),
}


class Blip2Metric(Metric):
    """One of `MODULES`: the one that `config_name` names."""

    @property
    def name(self) -> str:
        """Return the name of the metric."""
        return self.config_name

    def _info(self) -> MetricInfo:
        row = MODULES[self.config_name]
        return MetricInfo(
            description=row.description,
            citation=row.citation,
            inputs_description=row.inputs,
            features=Features(predictions=row.predictions, references=row.references),
        )

    def _compute(self, **kwargs: Any) -> dict:
        return MODULES[self.config_name].compute(**kwargs)
