"""Objectives of BLIP-2, as pure functions of tensors."""

import torch
from torch.nn.functional import cross_entropy


def language_modeling_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """
    Language-modelling loss of stage 2 (section 3.3): the negative log-likelihood of the text given the image.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, length, vocab_size)`):
            Scores, each at the position that predicts the label at the same index.
        labels (`torch.Tensor` of shape `(batch_size, length)`):
            Token ids; -100 is not learned.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*):
            Number of labels in the whole batch, over accumulation steps and processes: what `Trainer` passes.

    Returns:
        `torch.Tensor` of shape `()`, in float32: the mean over labels, or their sum over `num_items_in_batch`.
    """
    reduction = "mean" if num_items_in_batch is None else "sum"
    labels = labels.to(logits.device)
    loss = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction=reduction)
    return loss if num_items_in_batch is None else loss / torch.as_tensor(num_items_in_batch, device=loss.device)
