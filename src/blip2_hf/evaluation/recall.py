"""Retrieval: how often the right text is among the first that an image finds, and the right image for a text."""

import numpy as np
import torch
from transformers.trainer_utils import EvalPrediction

from ..retrieval.two_stage import Ranking, TwoStageRankings, rank_by_contrast


def retrieval_recall(similarity: torch.Tensor, is_match: torch.Tensor, k: tuple[int, ...] = (1, 5, 10)) -> dict:
    r"""
    Compute recall at k, both ways: the share of images with a text of theirs among the k most alike, and of texts.

    Args:
        similarity (`torch.Tensor` of shape `(num_images, num_texts)`):
            The higher, the more alike.
        is_match (`torch.BoolTensor` of shape `(num_images, num_texts)`):
            Which belong together. Images without any text, and texts without any image, do not count.
        k (`tuple[int, ...]`, *optional*, defaults to `(1, 5, 10)`):
            How many of the first count.

    Returns:
        `dict[str, float]`: `image_to_text_r1`, `text_to_image_r1` and so on, between 0 and 1.
    """
    best = [scores.sort(dim=1, descending=True, stable=True) for scores in (similarity, similarity.T)]
    return TwoStageRankings(*(Ranking(ranked.indices, ranked.values) for ranked in best)).recall(is_match, k)


def contrastive_retrieval_metrics(prediction: EvalPrediction) -> dict[str, float]:
    r"""
    Compute the recall of retrieval by ITC alone, over all held-out data: `compute_metrics` of a `Trainer` for
    [`Blip2ForPreTraining`]. It needs `label_names=["image_ids"]`, as [`~training.Stage1Arguments`] has it: rows with
    the same id are texts of one image.

    Args:
        prediction ([`~transformers.EvalPrediction`]):
            The model's `image_features` and `text_features` as the last two `predictions`; `label_ids` are the ids.

    Returns:
        `dict[str, float]`: that of [`retrieval_recall`], and `mean_recall`, the mean of its values.
    """
    image_features, text_features = (torch.from_numpy(features) for features in prediction.predictions[-2:])
    text_ids = np.asarray(prediction.label_ids)
    _, first, owners = np.unique(text_ids, return_index=True, return_inverse=True)
    # Not all similarities, which are too many for memory if tens of thousands of images are held out
    rankings = rank_by_contrast(image_features[first], text_features, k=10, batch_size=256)
    recall = rankings.recall(torch.from_numpy(owners))
    return recall | {"mean_recall": sum(recall.values()) / len(recall)}


__all__ = ["contrastive_retrieval_metrics", "retrieval_recall"]
