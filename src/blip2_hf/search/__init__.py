"""
Search in a folder of pictures. Their features for contrast (ITC) are computed once and stored. A text is compared with
them, and matching (ITM) re-ranks the best (section 4.4).
"""

from ..retrieval.loading import load_retrieval_model
from .index import SearchIndex, SearchResult
from .update import find_pictures


__all__ = ["SearchIndex", "SearchResult", "find_pictures", "load_retrieval_model"]
