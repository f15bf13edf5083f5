"""Captions of whole collections of pictures, in one process or many, safe to interrupt; answers about pictures."""

from ..jobs.errors import CollectionError
from .answers import PictureAnswers, answer_questions
from .captions import PictureCaption, caption_images
from .collection import CaptionCounts, caption_dataset
from .pictures import FolderPictures, Pictures, RowPictures, TarPictures


__all__ = [
    "CaptionCounts",
    "CollectionError",
    "FolderPictures",
    "PictureAnswers",
    "PictureCaption",
    "Pictures",
    "RowPictures",
    "TarPictures",
    "answer_questions",
    "caption_dataset",
    "caption_images",
]
