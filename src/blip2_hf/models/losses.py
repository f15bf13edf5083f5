"""Objectives of BLIP-2, as pure functions of tensors."""

import torch
from torch.nn.functional import cross_entropy, log_softmax


def language_modeling_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """
    Compute the language-modelling loss of stage 2 (section 3.3): the negative log-likelihood of text given an image.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, length, vocab_size)`):
            Scores, each at the position that predicts the label of the same index.
        labels (`torch.Tensor` of shape `(batch_size, length)`):
            Token ids. -100 is ignored.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*):
            Number of labels in the whole batch, over accumulation steps and processes: what `Trainer` passes.

    Returns:
        `torch.Tensor` of shape `()`, in float32 at least: the sum over labels, divided by `num_items_in_batch` or
        otherwise by their number; 0 if there are no labels.
    """
    labels = labels.to(logits.device)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    count = labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device).clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1))


def image_text_similarity(image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
    """
    Compute similarities of images and texts (section 3.2, ITC): the highest cosine of an image's queries with a text.

    Args:
        image_features (`torch.Tensor` of shape `(num_images, num_query_tokens, dim)`):
            Projected queries, of length 1.
        text_features (`torch.Tensor` of shape `(num_texts, dim)`):
            Projected [CLS] of the texts, of length 1.

    Returns:
        `torch.Tensor` of shape `(num_images, num_texts)`.
    """
    # Half precision would round close similarities to the same number
    with torch.autocast(image_features.device.type, enabled=False):
        return (image_features @ text_features.T).amax(dim=1)


def image_text_contrastive_loss(
    logits_per_image: torch.Tensor,
    logits_per_text: torch.Tensor,
    is_match: torch.Tensor,
    label_smoothing: float = 0.1,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    Compute the image-text contrastive loss, ITC (section 3.2): each image has to find its text among those of the
    batch, and each text its image. All matches of a row share the target probability evenly, except for
    `label_smoothing` of it, which is spread evenly over the whole row.

    Args:
        logits_per_image (`torch.Tensor` of shape `(batch_size, num_texts)`):
            Similarities of images with all texts, over the temperature.
        logits_per_text (`torch.Tensor` of shape `(batch_size, num_images)`):
            Similarities of texts with all images, over the temperature.
        is_match (`torch.BoolTensor` of shape `(batch_size, num_texts)`):
            Which pairs belong together, at least one in every row.
        label_smoothing (`float`, *optional*, defaults to 0.1):
            As in [`torch.nn.functional.cross_entropy`].
        num_items (`torch.Tensor` or `int`, *optional*):
            Divisor of the sum over rows, by default their number.

    Returns:
        `torch.Tensor` of shape `()`: the mean of both directions.
    """
    targets = is_match.to(logits_per_image.dtype)
    targets = targets / targets.sum(dim=1, keepdim=True)
    targets = (1 - label_smoothing) * targets + label_smoothing / targets.shape[1]
    per_row = sum(-(targets * log_softmax(logits, dim=1)).sum(dim=1) for logits in (logits_per_image, logits_per_text))
    return per_row.sum() / 2 / (len(per_row) if num_items is None else num_items)


@torch.no_grad()
def draw_hard_negatives(logits: torch.Tensor, is_match: torch.Tensor) -> torch.Tensor:
    """
    Draw one hard negative for each row (section 3.2, ITM): a candidate that does not match, with a probability that
    grows with its similarity.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_candidates)`):
            Similarities over the temperature.
        is_match (`torch.BoolTensor` of shape `(batch_size, num_candidates)`):
            Which pairs belong together. They are drawn only in a row without any other.

    Returns:
        `torch.LongTensor` of shape `(batch_size,)`: index of the candidate.
    """
    has_negative = ~is_match.all(dim=1, keepdim=True)
    weights = logits.masked_fill(is_match & has_negative, float("-inf")).softmax(dim=1)
    # NaN is told by the loss; here it would be an error that stops the GPU
    return torch.multinomial(weights.nan_to_num(1.0), 1).squeeze(1)


def image_text_matching_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """
    Compute the image-text matching loss, ITM (section 3.2): do image and text belong together?

    Args:
        logits (`torch.Tensor` of shape `(num_pairs, 2)`):
            Scores of no (0) and yes (1), each the mean over queries of a linear map of the query.
        labels (`torch.LongTensor` of shape `(num_pairs,)`):
            1 for pairs that belong together, 0 for others. -100 is ignored.
        num_items (`torch.Tensor` or `int`, *optional*):
            Divisor of the sum over pairs, by default the number of those that are not ignored.

    Returns:
        `torch.Tensor` of shape `()`: the cross-entropy.
    """
    loss = cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return loss / ((labels != -100).sum() if num_items is None else num_items)


def image_grounded_text_generation_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.1,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    Compute the image-grounded text generation loss, ITG (section 3.2): the next token has to be predicted from the
    queries and the tokens before it.

    Args:
        logits (`torch.Tensor` of shape `(num_labels, vocab_size)`):
            Scores of the next token, at label positions alone.
        labels (`torch.LongTensor` of shape `(num_labels,)`):
            Token ids.
        label_smoothing (`float`, *optional*, defaults to 0.1):
            As in [`torch.nn.functional.cross_entropy`]. The paper does not mention it; the authors' code has it.
        num_items (`torch.Tensor` or `int`, *optional*):
            Divisor of the sum over labels, by default their number.

    Returns:
        `torch.Tensor` of shape `()`: the cross-entropy.
    """
    loss = cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
    return loss / (len(labels) if num_items is None else num_items)
