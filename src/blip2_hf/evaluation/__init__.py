"""Evaluation."""

from .generated_text import GeneratedTextMetrics, exact_match, word_f1
from .retrieval import contrastive_retrieval_metrics, retrieval_recall
from .two_stage import EncodedTexts, Ranking, TwoStageRankings, TwoStageRetrieval


__all__ = [
    "EncodedTexts",
    "GeneratedTextMetrics",
    "Ranking",
    "TwoStageRankings",
    "TwoStageRetrieval",
    "contrastive_retrieval_metrics",
    "exact_match",
    "retrieval_recall",
    "word_f1",
]
