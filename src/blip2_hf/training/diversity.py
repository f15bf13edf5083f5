"""Measures how different the output queries of an image are, logs it, and warns if they have become one vector."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils import logging


logger = logging.get_logger(__name__)

_COLLAPSED = 0.99
_PICTURES = 4  # of a batch: they cost little, and differ little in this


def query_diversity(query_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Compute how different the queries of an image are, whatever their lengths.

    Args:
        query_states (`torch.Tensor` of shape `(num_images, num_query_tokens, hidden_size)`):
            Output queries of the Q-Former, in any floating dtype.

    Returns:
        `tuple` of two `torch.Tensor` of shape `()`, means over images in float32 at least: the cosine between two
        different queries, from 1 if all are one vector; and the effective rank of the queries (Roy and Vetterli 2007:
        the exponential of the entropy of the singular values over their sum), 1 for one vector, `num_query_tokens` for
        orthogonal ones.

    Raises:
        ValueError: if the shape is another one, or there are fewer than two queries.
    """
    if query_states.dim() != 3 or query_states.shape[1] < 2:
        raise ValueError(
            f"query_states of shape {tuple(query_states.shape)} were given: (num_images, num_query_tokens, "
            "hidden_size) with two queries or more was expected."
        )
    states = query_states.to(torch.promote_types(query_states.dtype, torch.float32))
    unit = torch.nn.functional.normalize(states, dim=-1)
    cosines = unit @ unit.mT
    count = unit.shape[1]
    cosine = (cosines.sum(dim=(1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(dim=1)) / (count * (count - 1))
    shares = torch.nn.functional.normalize(torch.linalg.svdvals(unit), p=1.0, dim=-1)
    rank = torch.special.entr(shares).sum(dim=-1).exp()
    return cosine.mean(), rank.mean()


class QueryDiversityLog:
    """
    Computes how different the queries of some pictures of the last batch are, whenever a training logs. It runs the
    Q-Former again without dropout, because dropout makes equal queries differ. It warns once if the queries have
    become one vector.
    """

    def __init__(self):
        self.inputs: dict[str, torch.Tensor] = {}
        self.has_warned = False

    def keep(self, inputs: Mapping[str, Any]):
        """Keep some pictures of a batch, or their features, with the instructions that the Q-Former reads."""
        names = ("pixel_values", "image_embeds", "qformer_input_ids", "qformer_attention_mask")
        given = {name: inputs[name] for name in names if inputs.get(name) is not None}
        for name, dims in (("pixel_values", 4), ("image_embeds", 3)):
            if name in given and given[name].dim() > dims:
                # Several pictures of a row have an axis of their own, and an instruction for all of them
                rows, each = given[name].shape[:2]
                given[name] = given[name].flatten(0, -dims)
                for text in names[2:]:
                    if text in given and len(given[text]) == rows:
                        given[text] = given[text].repeat_interleave(each, dim=0)
        # Copies, because a view would keep the whole batch in memory
        self.inputs = {name: value[:_PICTURES].clone() for name, value in given.items()}

    @torch.no_grad()
    def take(self, model: nn.Module, accelerator: Any) -> dict[str, float]:
        """Return what the log is told, the mean over all processes that have pictures, and forget the pictures."""
        sums = torch.zeros(3, device=accelerator.device)
        states = self._query_states(model, accelerator)
        if states is not None and len(states) and bool(states.isfinite().all()):
            sums[:2], sums[2] = torch.stack(query_diversity(states)), 1
        cosine, rank, count = accelerator.gather(sums).view(-1, 3).sum(dim=0).tolist()
        if count == 0:
            return {}
        if cosine / count > _COLLAPSED and not self.has_warned:
            self.has_warned = True
            if accelerator.is_main_process:
                logger.warning(
                    f"The queries of an image are almost one vector (query_cosine {cosine / count:.4f}), and a "
                    "language model reads little from them. Train stage 1 from queries that start as words "
                    '(query_initialization="words", --query-initialization words), or with lower learning rates.'
                )
        return {"query_cosine": cosine / count, "query_rank": rank / count}

    def _query_states(self, model: nn.Module, accelerator: Any) -> torch.Tensor | None:
        inputs, self.inputs = self.inputs, {}
        images = {name: inputs.pop(name, None) for name in ("pixel_values", "image_embeds")}
        if all(image is None for image in images.values()) or model.config.num_query_tokens == 1:
            return None
        training = model.training
        model.eval()
        try:
            with accelerator.autocast():
                return model.encode_image(**images, **inputs)[2].last_hidden_state
        finally:
            model.train(training)


__all__ = ["QueryDiversityLog", "query_diversity"]
