"""Evaluation."""

from ..retrieval.two_stage import EncodedTexts, Ranking, TwoStageRankings, TwoStageRetrieval
from .benchmarks import evaluate_captioning, evaluate_chair, evaluate_multiple_choice, evaluate_vqa
from .generated_text import GeneratedTextMetrics, exact_match, score_answers, word_f1
from .readers import (
    read_aokvqa,
    read_caption_rows,
    read_coco_objects,
    read_gqa,
    read_karpathy,
    read_nocaps,
    read_pope,
    read_question_rows,
    read_synonyms,
    read_vqa,
)
from .recall import contrastive_retrieval_metrics, retrieval_recall
from .retrieval_benchmark import evaluate_retrieval
from .samples import CaptionSample, QuestionSample


__all__ = [
    "CaptionSample",
    "EncodedTexts",
    "GeneratedTextMetrics",
    "QuestionSample",
    "Ranking",
    "TwoStageRankings",
    "TwoStageRetrieval",
    "contrastive_retrieval_metrics",
    "evaluate_captioning",
    "evaluate_chair",
    "evaluate_multiple_choice",
    "evaluate_retrieval",
    "evaluate_vqa",
    "exact_match",
    "read_aokvqa",
    "read_caption_rows",
    "read_coco_objects",
    "read_gqa",
    "read_karpathy",
    "read_nocaps",
    "read_pope",
    "read_question_rows",
    "read_synonyms",
    "read_vqa",
    "retrieval_recall",
    "score_answers",
    "word_f1",
]
