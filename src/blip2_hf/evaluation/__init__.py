"""Evaluation."""

from .generated_text import GeneratedTextMetrics, exact_match, word_f1
from .retrieval import contrastive_retrieval_metrics, retrieval_recall


__all__ = ["GeneratedTextMetrics", "contrastive_retrieval_metrics", "exact_match", "retrieval_recall", "word_f1"]
