"""A language model's head, at the positions that have a label: the scores of all others are never computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import PreTrainedModel

from .frozen import is_frozen
from .losses import linear_cross_entropy, rows_at_a_time


def can_score_labels_alone(language_model: PreTrainedModel) -> bool:
    """Whether the head can be run by itself: its weight is there as a whole, not sharded with the language model."""
    head = language_model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    return type(weight) in (torch.Tensor, nn.Parameter) and weight.dim() == 2 and len(weight) > 0


class LabelStates:
    """
    What goes into the head of a language model where there is a label.

    Args:
        shift_labels (`torch.LongTensor` of shape `(batch_size, length)`):
            What each of the last `length` positions predicts; -100 is not learned.
        with_probe (`bool`, *optional*, defaults to `False`):
            Whether one position is left to the head, to see what else happens to its scores.
    """

    def __init__(self, shift_labels: torch.Tensor, with_probe: bool = False):
        self.with_probe = with_probe
        self.length = shift_labels.shape[1]
        self.index = shift_labels.ne(-100).nonzero(as_tuple=True)
        self.labels = shift_labels[self.index]
        self.hidden_states: torch.Tensor | None = None
        self.probe: torch.Tensor | None = None

    def take(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[torch.Tensor]:
        """Hook before the head: keeps the states, and leaves it none of them."""
        (hidden_states,) = args
        row, position = (index.to(hidden_states.device) for index in self.index)
        self.hidden_states = hidden_states[row, position + hidden_states.shape[1] - self.length]
        self.labels = self.labels.to(hidden_states.device)
        self.probe = hidden_states[:1, : int(self.with_probe)].detach()
        return (self.probe,)

    @torch.no_grad()
    def are_all(self, head: nn.Module, logits: torch.Tensor) -> bool:
        """With a probe: whether the language model does nothing more to its scores (some scale or bound them)."""
        return self.probe is not None and torch.equal(head(self.probe).to(logits), logits)


@contextmanager
def states_at_labels(
    language_model: PreTrainedModel, shift_labels: torch.Tensor, with_probe: bool = False
) -> Iterator[LabelStates]:
    """
    Inside, `language_model(...)` keeps what goes into its head, and computes no scores.

    Args:
        language_model ([`~transformers.PreTrainedModel`]):
            Any that has output embeddings.
        shift_labels (`torch.LongTensor` of shape `(batch_size, length)`):
            What each of the last `length` positions predicts; -100 is not learned.
        with_probe (`bool`, *optional*, defaults to `False`):
            Whether it computes those of one position.

    Yields:
        [`LabelStates`]: with `hidden_states` of shape `(num_labels, hidden_size)` for its `labels`, once the language
        model has run.
    """
    states = LabelStates(shift_labels, with_probe)
    hook = language_model.get_output_embeddings().register_forward_pre_hook(states.take)
    try:
        yield states
    finally:
        hook.remove()


def loss_at_labels(head: nn.Module, hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    The language-modelling loss from what goes into the head, a part of the labels at a time.

    Args:
        head (`nn.Module`):
            The output embeddings.
        hidden_states (`torch.Tensor` of shape `(num_labels, hidden_size)`):
            What goes into them.
        labels (`torch.LongTensor` of shape `(num_labels,)`):
            Token ids.

    Returns:
        `torch.Tensor` of shape `()`: the sum over labels.
    """
    if _is_plain_and_frozen(head):
        return linear_cross_entropy(hidden_states, head.weight, labels, head.bias)

    def chunk_loss(hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = head(hidden_states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return nn.functional.cross_entropy(logits, labels, reduction="sum")

    # A head that is trained, adapted, quantised or spread out: scores are made again in the backward pass
    total = hidden_states.new_zeros((), dtype=torch.promote_types(hidden_states.dtype, torch.float32))
    weight: Any = head.weight
    rows = rows_at_a_time(len(weight))
    for chunk, chunk_labels in zip(hidden_states.split(rows), labels.split(rows), strict=True):
        total = total + checkpoint(chunk_loss, chunk, chunk_labels, use_reentrant=False)
    return total


def _is_plain_and_frozen(head: nn.Module) -> bool:
    """Whether the head is a product with a weight that is there, and no gradient of it is wanted."""
    # accelerate's hook brings weight and input to one device
    return type(head) is nn.Linear and is_frozen(head) and not hasattr(head, "_hf_hook")
