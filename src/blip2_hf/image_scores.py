"""
Scores of queries against image features, without the keys of these: `q (x W)ᵀ = (q W) xᵀ` for each head.

Where a head has fewer queries than channels, that is less work than the keys of all features and their gradient, and
no keys are kept for the backward pass. Gradients are exact. Frozen features alone: no gradient flows into them.
"""

from dataclasses import dataclass

import torch


# Products of fewer rows than this do not keep a processor busy
_LEAST_ROWS = 128
# Of the multiplications that keys and their gradient take; smaller products are slower ones
_LARGEST_SHARE = 0.75


@dataclass
class Blip2ImageKeys:
    r"""
    What keys are made of, in their place.

    Args:
        hidden_states (`torch.Tensor` of shape `(num_images, features, encoder_hidden_size)`):
            Image features that need no gradient.
        weight (`torch.Tensor` of shape `(hidden_size, encoder_hidden_size)`):
            Of the projection to keys.
        bias (`torch.Tensor` of shape `(hidden_size,)`):
            Of the projection: it adds the same to all scores of a query, which a softmax does not see.
    """

    hidden_states: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    def scores(self, query: torch.Tensor) -> torch.Tensor:
        """
        Products of queries with the keys, up to a number for each query.

        Args:
            query (`torch.Tensor` of shape `(num_images, heads, query_length, head_dim)`):
                As it is scaled for attention.

        Returns:
            `torch.Tensor` of shape `(num_images, heads, query_length, features)`.
        """
        weight = self.weight.view(query.shape[1], query.shape[3], -1)
        return _Scores.apply(query, self.hidden_states, weight, self.bias)


def is_faster_without_keys(hidden_states: torch.Tensor, heads: int, head_dim: int, query_length: int) -> bool:
    """
    Whether [`Blip2ImageKeys`] make a training step faster. Known of CPUs in full precision alone.

    Args:
        hidden_states (`torch.Tensor` of shape `(num_images, features, encoder_hidden_size)`):
            Image features.
        heads, head_dim, query_length (`int`):
            Sizes of the attention.

    Returns:
        `bool`.
    """
    features = hidden_states.shape[1]
    with_keys = 2 * features * head_dim
    without = query_length * (2 * features + 3 * head_dim)
    return (
        hidden_states.device.type == "cpu"
        and hidden_states.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and not hidden_states.requires_grad
        and min(heads * query_length, features) >= _LEAST_ROWS
        and without <= _LARGEST_SHARE * with_keys
    )


class _Scores(torch.autograd.Function):
    """Image by image: what belongs to one stays in the cache, and products of one are faster than batched ones."""

    @staticmethod
    def forward(ctx, query, hidden_states, weight, bias):
        ctx.save_for_backward(query, hidden_states, weight, bias)
        scores = query.new_empty(*query.shape[:3], hidden_states.shape[1])
        # Memory that is new costs more than what is computed into it
        weighted = query.new_empty(*query.shape[1:3], weight.shape[2])
        for own_query, states, own_scores in zip(query, hidden_states, scores, strict=True):
            torch.bmm(own_query, weight, out=weighted)
            torch.mm(weighted.flatten(0, 1), states.t(), out=own_scores.flatten(0, 1))
        return scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_scores):
        query, hidden_states, weight, bias = ctx.saved_tensors
        grad_query, grad_weight = query.new_empty(query.shape), torch.zeros_like(weight)
        grad = query.new_empty(*query.shape[1:3], weight.shape[2])
        for index, (own_query, states) in enumerate(zip(query, hidden_states, strict=True)):
            torch.mm(grad_scores[index].flatten(0, 1), states, out=grad.flatten(0, 1))
            torch.baddbmm(grad_weight, own_query.transpose(1, 2), grad, out=grad_weight)
            torch.bmm(grad, weight.transpose(1, 2), out=grad_query[index])
        return grad_query, None, grad_weight, torch.zeros_like(bias)
