"""CapFilt: captions that a model proposes, ranked together with those that pictures came with (section 3.4)."""

from .captioners import ModelCaptioner, PipelineCaptioner, propose_captions
from .filters import RetrievalFilter
from .job import capfilt_dataset
from .ranking import RankedCaption, kept_captions, rank_captions
from .result import CapFiltCounts


__all__ = [
    "CapFiltCounts",
    "ModelCaptioner",
    "PipelineCaptioner",
    "RankedCaption",
    "RetrievalFilter",
    "capfilt_dataset",
    "kept_captions",
    "propose_captions",
    "rank_captions",
]
