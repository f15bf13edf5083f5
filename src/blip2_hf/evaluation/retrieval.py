"""Retrieval: how often the right text is among the first that an image finds, and the right image for a text."""

import numpy as np
import torch
from transformers.trainer_utils import EvalPrediction

from ..models.losses import image_text_similarity


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
    recall = {}
    directions = {"image_to_text": (similarity, is_match), "text_to_image": (similarity.T, is_match.T)}
    for name, (scores, right) in directions.items():
        ranked = right.gather(1, scores.argsort(dim=1, descending=True, stable=True))[right.any(dim=1)]
        for count in k:
            recall[f"{name}_r{count}"] = ranked[:, :count].any(dim=1).double().mean().item()
    return recall


def contrastive_retrieval_metrics(prediction: EvalPrediction) -> dict[str, float]:
    r"""
    `compute_metrics` of a `Trainer` for [`Blip2ForPreTraining`]: retrieval by ITC alone, over all held-out data. Needs
    `label_names=["image_ids"]`, as [`~training.Stage1Arguments`] has it: rows with the same id are texts of one image.

    Args:
        prediction ([`~transformers.EvalPrediction`]):
            The model's `image_features` and `text_features` as the last two `predictions`; `label_ids` are the ids.

    Returns:
        `dict[str, float]`: that of [`retrieval_recall`].
    """
    image_features, text_features = (torch.from_numpy(features) for features in prediction.predictions[-2:])
    text_ids = np.asarray(prediction.label_ids)
    image_ids, first = np.unique(text_ids, return_index=True)
    parts = [image_text_similarity(chunk, text_features) for chunk in image_features[first].split(256)]
    is_match = torch.from_numpy(image_ids[:, None] == text_ids[None, :])
    return retrieval_recall(torch.cat(parts), is_match)


__all__ = ["contrastive_retrieval_metrics", "retrieval_recall"]
