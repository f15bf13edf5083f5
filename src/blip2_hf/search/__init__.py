"""
Search in a folder of pictures: their features for contrast (ITC) are computed once and stored; a text is compared with
them, and matching (ITM) ranks the best anew (section 4.4).
"""

from .index import SearchIndex, SearchResult
from .model import load_retrieval_model
from .pictures import find_pictures


__all__ = ["SearchIndex", "SearchResult", "find_pictures", "load_retrieval_model"]
