"""
Image features as the cross-attention reads them: with the LayerNorm behind the tower folded into the projections, and,
for a few queries on a CPU, without keys.

`q (x W)ᵀ = (q W) xᵀ` for each head: where a head has fewer queries than channels, that is less work than the keys of
all features and their gradient, and no keys are kept for the backward pass. Gradients are exact. Frozen features
alone: no gradient flows into them.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import layer_norm, linear


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


@dataclass
class Blip2ImageStates:
    r"""
    Image features after the LayerNorm that follows the tower, as the keys and values of the cross-attention need them.

    A frozen tower leaves that LayerNorm's weight and bias as all that its output is differentiated for. They are then
    folded into the key and value weights, for `(x * g + b) W' = x (W * g)' + b W'`: no gradient flows into the
    features, and one product of three in the backward of each projection falls away.

    Args:
        hidden_states (`torch.Tensor` of shape `(num_images, features, encoder_hidden_size)`):
            The features.
        weight, bias (`torch.Tensor` of shape `(encoder_hidden_size,)`, *optional*):
            What is left to be done to them: multiplied and added.
    """

    hidden_states: torch.Tensor
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @classmethod
    def after_layernorm(cls, image_embeds: torch.Tensor, layernorm: nn.LayerNorm) -> "Blip2ImageStates":
        """Of the tower's output, and the LayerNorm that follows it."""
        image_embeds = image_embeds.to(layernorm.weight.dtype)
        # accelerate keeps offloaded weights elsewhere, and brings them for a call of their module alone
        can_fold = layernorm.weight.requires_grad and not layernorm.weight.is_meta
        if torch.is_grad_enabled() and can_fold and not image_embeds.requires_grad:
            normalized = layer_norm(image_embeds, layernorm.normalized_shape, eps=layernorm.eps)
            return cls(normalized, layernorm.weight, layernorm.bias)
        return cls(layernorm(image_embeds))

    def to(self, dtype: torch.dtype) -> "Blip2ImageStates":
        tensors = (self.hidden_states, self.weight, self.bias)
        return Blip2ImageStates(*(tensor if tensor is None else tensor.to(dtype) for tensor in tensors))

    def unfolded(self) -> "Blip2ImageStates":
        """With nothing left to be done to the features."""
        return self if self.weight is None else Blip2ImageStates(self.hidden_states * self.weight + self.bias)

    def autocast(self) -> "Blip2ImageStates":
        """With features in the type that autocast multiplies in: cast once, not for each projection."""
        kind = self.hidden_states.device.type
        if not torch.is_autocast_enabled(kind):
            return self
        return Blip2ImageStates(self.hidden_states.to(torch.get_autocast_dtype(kind)), self.weight, self.bias)

    def project(self, projection: nn.Module) -> torch.Tensor:
        """What a linear map makes of the features."""
        if self.weight is None:
            return projection(self.hidden_states)
        return projection(self.hidden_states, self.weight, self.bias)

    def keys(self, projection: nn.Linear) -> Blip2ImageKeys:
        """What `project` would make keys of. A shift of all features alike makes no difference to attention."""
        weight = projection.weight if self.weight is None else projection.weight * self.weight
        return Blip2ImageKeys(self.hidden_states, weight, projection.bias)


class Blip2ImageProjection(nn.Linear):
    """From image features to keys or values; FSDP wraps it by itself, for it is called outside its layer."""

    def forward(
        self, hidden_states: torch.Tensor, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Of `hidden_states * scale + shift`, without a gradient into `hidden_states` if they need none."""
        if scale is None:
            return super().forward(hidden_states)
        return linear(hidden_states, self.weight * scale, linear(shift, self.weight, self.bias))


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
