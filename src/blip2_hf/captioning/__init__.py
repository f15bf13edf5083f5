"""Captions of whole collections of pictures, in one process or many, safe to interrupt."""

from ..jobs.errors import CollectionError
from .captions import PictureCaption, caption_images
from .collection import CaptionCounts, caption_dataset
from .pictures import FolderPictures, Pictures, RowPictures, TarPictures


__all__ = [
    "CaptionCounts",
    "CollectionError",
    "FolderPictures",
    "PictureCaption",
    "Pictures",
    "RowPictures",
    "TarPictures",
    "caption_dataset",
    "caption_images",
]
