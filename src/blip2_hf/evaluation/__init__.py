"""Evaluation."""

from .retrieval import contrastive_retrieval_metrics, retrieval_recall


__all__ = ["contrastive_retrieval_metrics", "retrieval_recall"]
