"""Retrieval in two stages: contrast finds candidates, matching ranks them anew (section 4.4)."""

from .loading import load_retrieval_model
from .two_stage import EncodedTexts, Ranking, TwoStageRankings, TwoStageRetrieval


__all__ = ["EncodedTexts", "Ranking", "TwoStageRankings", "TwoStageRetrieval", "load_retrieval_model"]
