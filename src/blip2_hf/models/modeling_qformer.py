"""The Querying Transformer (Q-Former): a BERT whose learned queries attend to an image."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.functional import layer_norm, linear
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.bert.modeling_bert import BertIntermediate, BertOutput, BertSelfOutput
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings as TransformersBlip2TextEmbeddings
from transformers.models.blip_2.modeling_blip_2 import eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .bert_weights import copy_bert_weights, load_bert, qformer_config_from_bert
from .configuration_blip2 import Blip2QFormerConfig


KeyValues = tuple[torch.Tensor, torch.Tensor]
ImageKeyValues = tuple[KeyValues, ...]


@dataclass
class QFormerTextCache:
    """
    Keys and values of the queries and of the text so far, to generate the next token (see [`Blip2QFormerModel`]).

    Args:
        query_key_values (`torch.Tensor` of shape `(batch_size, layers, 2, heads, num_query_tokens, head_dim)`):
            Keys and values of the queries in the self-attention.
        cache (`Cache`):
            Keys and values of the text.
    """

    query_key_values: torch.Tensor
    cache: Cache

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> KeyValues:
        key, value = self.cache.update(key, value, layer_idx)
        query_key, query_value = self.query_key_values[:, layer_idx].unbind(1)
        return torch.cat([query_key, key], dim=2), torch.cat([query_value, value], dim=2)


class Blip2TextEmbeddings(TransformersBlip2TextEmbeddings):
    """Embeddings of words and positions."""

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        query_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return embedded text, after the queries if they are given."""
        # transformers' own moves the tokens to the device of the weights, which is meta if they are offloaded
        if position_ids is None:
            position_ids = self.position_ids[:, : input_ids.shape[1]]
        embeds = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)
        return embeds if query_embeds is None else torch.cat([query_embeds.to(embeds.dtype), embeds], dim=1)


class FoldedLinear(nn.Linear):
    """
    A projection of image features with the LayerNorm before it folded in: `(x * g + b) W = x (W * g) + b W`.

    If the tower is frozen, its features `x` need no gradient, and only the LayerNorm's weight `g` and bias `b` are
    trained. Folding saves the gradient of `x * g + b`: one of the three matrix products of forward and backward.
    FSDP wraps this module by itself, because it is called outside its layer.
    """

    def forward(
        self, features: torch.Tensor, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Project `features * scale + shift`, or the features as they are."""
        if scale is None:
            return super().forward(features)
        return linear(features, self.weight * scale, linear(shift, self.weight, self.bias))


def fold_layernorm(
    image_embeds: torch.Tensor, layernorm: nn.LayerNorm
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """
    Normalize image features. If only the LayerNorm is trained, leave its weight and bias to [`FoldedLinear`].

    Args:
        image_embeds (`torch.Tensor` of shape `(num_images, num_features, hidden_size)`):
            The tower's output.
        layernorm (`nn.LayerNorm`):
            The LayerNorm that follows the tower.

    Returns:
        `tuple`: the arguments of [`FoldedLinear`], of which `scale` and `shift` are `None` if nothing is left to it.
    """
    image_embeds = image_embeds.to(layernorm.weight.dtype)
    # accelerate loads offloaded weights only for a call of their own module
    is_trained = torch.is_grad_enabled() and layernorm.weight.requires_grad and not layernorm.weight.is_meta
    if not is_trained or image_embeds.requires_grad:
        return layernorm(image_embeds), None, None
    return layer_norm(image_embeds, layernorm.normalized_shape, eps=layernorm.eps), layernorm.weight, layernorm.bias


class Blip2QFormerMultiHeadAttention(nn.Module):
    """Base class of self-attention and cross-attention."""

    def __init__(self, config: Blip2QFormerConfig):
        super().__init__()
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"hidden_size ({config.hidden_size}) must be a multiple of num_attention_heads "
                f"({config.num_attention_heads})."
            )
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        # Never called: a module, because TRL and others turn off dropout in modules
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.query = nn.Linear(config.hidden_size, config.hidden_size)

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """Turn `(batch_size, length, hidden_size)` into `(batch_size, heads, length, head_dim)`."""
        return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return `(output, probabilities)`; `output` has the shape `(batch_size, length, hidden_size)`."""
        if attention_mask is not None:
            # Flex attention indexes the mask by query, and the mask may have rows for more queries than there are
            attention_mask = attention_mask[:, :, : query.shape[2]].expand(-1, -1, query.shape[2], -1)
        name = self._attn_implementation(query, attention_mask, kwargs.get("output_attentions"))
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        dropout = self.dropout.p if self.training else 0.0
        if name == "sdpa" and dropout > 0 and query.device.type == "cpu":
            # No kernel for a CPU has dropout: the backward pass computes probabilities again, in place of three copies
            attention_interface = partial(checkpoint, attention_interface, use_reentrant=False)
        kwargs |= {"dropout": dropout, "scaling": self.scaling}
        output, probabilities = attention_interface(self, query, key, value, attention_mask, **kwargs)
        return output.reshape(*output.shape[:2], -1), probabilities

    def _attn_implementation(
        self, query: torch.Tensor, attention_mask: torch.Tensor | None, output_attentions: bool | None
    ) -> str:
        if output_attentions:
            # Only eager returns probabilities. For this call alone, because other threads may use the model too
            return "eager"
        name = self.config._attn_implementation
        # Flash kernels take neither float32 nor a mask between queries and text: SDPA computes the same
        if "flash" in name and (attention_mask is not None or query.dtype == torch.float32):
            return "sdpa"
        return name


class Blip2QFormerSelfAttention(Blip2QFormerMultiHeadAttention):
    """Queries and text attend to each other, as far as the mask allows."""

    def __init__(self, config: Blip2QFormerConfig, layer_idx: int):
        super().__init__(config)
        self.layer_idx = layer_idx
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: "QFormerTextCache | Cache | None" = None,
        output_length: int | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = self.split_heads(self.query(hidden_states[:, :output_length]))
        key, value = self.split_heads(self.key(hidden_states)), self.split_heads(self.value(hidden_states))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        return self.attend(query, key, value, attention_mask, **kwargs)


class Blip2QFormerCrossAttention(Blip2QFormerMultiHeadAttention):
    """Queries attend to images, whose keys and values [`~Blip2QFormerModel.project_image`] has computed."""

    def __init__(self, config: Blip2QFormerConfig):
        super().__init__(config)
        self.key = FoldedLinear(config.encoder_hidden_size, config.hidden_size)
        self.value = FoldedLinear(config.encoder_hidden_size, config.hidden_size)

    def project_image(self, *features: torch.Tensor) -> KeyValues:
        """Return the key and the value of image features, which are the arguments of [`FoldedLinear`]."""
        return self.split_heads(self.key(*features)), self.split_heads(self.value(*features))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        key_values: tuple[KeyValues, ...] = (),
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend to one set of images, or divide the rows evenly among several sets."""
        query = self.split_heads(self.query(hidden_states))
        if len(key_values) == 1:
            return self._attend_to_images(query, *key_values[0], attention_mask, **kwargs)
        if attention_mask is not None:
            raise ValueError(
                f"encoder_attention_mask was given with {len(key_values)} sets of images: one set was expected."
            )
        pairs = zip(query.chunk(len(key_values)), key_values, strict=True)
        return torch.cat([self._attend_to_images(rows, *images, **kwargs)[0] for rows, images in pairs]), None

    def _attend_to_images(self, query, key, value, attention_mask=None, **kwargs):
        """Attend to images: with `n` rows for each, the first image serves the first `n` rows, and so on."""
        (rows, heads, query_length, head_dim), images = query.shape, key.shape[0]
        if images == rows:
            return self.attend(query, key, value, attention_mask, **kwargs)
        if rows % images or attention_mask is not None:
            mask = "" if attention_mask is None else " and an encoder_attention_mask"
            expected = "the same number of rows for each image" if attention_mask is None else "one image for each row"
            raise ValueError(f"{rows} rows were given with {images} images{mask}: {expected} was expected.")
        # The rows of an image become one row of more queries, so that its keys are not repeated
        query = query.view(images, -1, heads, query_length, head_dim).transpose(1, 2).flatten(2, 3)
        output, _ = self.attend(query, key, value, **kwargs)
        return output.reshape(rows, query_length, -1), None


class Blip2QFormerAttention(nn.Module):
    """An attention, its output projection, and the LayerNorm over their sum with what went in."""

    def __init__(self, config: Blip2QFormerConfig, attention: Blip2QFormerMultiHeadAttention):
        super().__init__()
        self.attention = attention
        self.output = BertSelfOutput(config)

    def forward(self, hidden_states, attention_mask=None, **kwargs) -> torch.Tensor:
        attention_output, _ = self.attention(hidden_states, attention_mask, **kwargs)
        return self.output(attention_output, hidden_states[:, : attention_output.shape[1]])


class Blip2QFormerLayer(GradientCheckpointingLayer):
    """Self-attention over queries and text; cross-attention of the queries; a feed-forward network for each kind."""

    def __init__(self, config: Blip2QFormerConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.attention = Blip2QFormerAttention(config, Blip2QFormerSelfAttention(config, layer_idx))
        self.has_cross_attention = layer_idx % config.cross_attention_frequency == 0
        if self.has_cross_attention:
            self.crossattention = Blip2QFormerAttention(config, Blip2QFormerCrossAttention(config))
        if config.use_qformer_text_input:
            self.intermediate = BertIntermediate(config)
            self.output = BertOutput(config)
        self.intermediate_query = BertIntermediate(config)
        self.output_query = BertOutput(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        query_length: int = 0,
        past_key_values: QFormerTextCache | Cache | None = None,
        output_length: int | None = None,
        # One by one, because reentrant activation checkpointing does not look into tuples
        *image_keys_and_values: torch.Tensor,
        **kwargs,
    ) -> torch.Tensor:
        hidden_states = self.attention(
            hidden_states, attention_mask, past_key_values=past_key_values, output_length=output_length, **kwargs
        )
        queries, text = hidden_states[:, :query_length], hidden_states[:, query_length:]
        outputs = []
        if query_length > 0:
            if self.has_cross_attention:
                key_values = tuple(zip(image_keys_and_values[::2], image_keys_and_values[1::2], strict=True))
                queries = self.crossattention(queries, encoder_attention_mask, key_values=key_values, **kwargs)
            outputs.append(self._feed_forward(self.intermediate_query, self.output_query, queries))
        if text.shape[1] > 0:
            outputs.append(self._feed_forward(self.intermediate, self.output, text))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def attach_text_network(self, trained: "Blip2QFormerLayer"):
        """Copy another layer's feed-forward network for text, which is trained if that of the queries is."""
        like = self.intermediate_query.dense.weight
        for name, network in (("intermediate", BertIntermediate(self.config)), ("output", BertOutput(self.config))):
            network.load_state_dict(getattr(trained, name).state_dict())
            setattr(self, name, network.to(like).train(self.training).requires_grad_(like.requires_grad))
        # In the order of a layer that is made with it
        for name in ("intermediate_query", "output_query"):
            self._modules[name] = self._modules.pop(name)

    def _feed_forward(self, intermediate: BertIntermediate, output: BertOutput, states: torch.Tensor) -> torch.Tensor:
        """Apply a network, and keep only the wide states before their activation, which is cheap to compute again."""
        wide = intermediate.dense(states)
        if not (self.training and wide.requires_grad):
            return output(intermediate.intermediate_act_fn(wide), states)

        def narrow(wide):
            return output.dense(intermediate.intermediate_act_fn(wide))

        narrowed = checkpoint(narrow, wide, use_reentrant=False)
        return output.LayerNorm(output.dropout(narrowed) + states)


class Blip2QFormerEncoder(nn.Module):
    def __init__(self, config: Blip2QFormerConfig):
        super().__init__()
        self.layer = nn.ModuleList([Blip2QFormerLayer(config, index) for index in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False


class Blip2HfQFormerModel(PreTrainedModel):
    r"""
    The Q-Former (section 3.1): queries and text share the self-attention; queries attend to the image in every
    `cross_attention_frequency`-th layer; queries and text have feed-forward networks of their own.

    Args:
        config ([`Blip2QFormerConfig`]):
            Its configuration.
    """

    config: Blip2QFormerConfig
    config_class = Blip2QFormerConfig
    base_model_prefix = ""
    main_input_name = "query_embeds"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["Blip2QFormerLayer", "FoldedLinear"]
    _can_record_outputs = {
        "hidden_states": Blip2QFormerLayer,
        "attentions": OutputRecorder(Blip2QFormerSelfAttention, index=1),
        "cross_attentions": OutputRecorder(Blip2QFormerCrossAttention, index=1),
    }

    def __init__(self, config: Blip2QFormerConfig):
        super().__init__(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.encoder = Blip2QFormerEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> None:
        # Queries and embedded text come from outside
        return None

    def set_input_embeddings(self, value):
        raise NotImplementedError("Blip2QFormerModel has no input embeddings: it is given `query_embeds`.")

    def project_image(
        self, encoder_hidden_states: torch.Tensor, layernorm: nn.LayerNorm | None = None
    ) -> ImageKeyValues:
        r"""
        Compute the image's keys and values for each cross-attention layer, once for any number of texts.

        Args:
            encoder_hidden_states (`torch.Tensor` of shape `(num_images, num_features, encoder_hidden_size)`):
                Image features.
            layernorm (`nn.LayerNorm`, *optional*):
                The LayerNorm that follows the tower, if the features have not been through it.

        Returns:
            `tuple` of (key, value), one for each layer with cross-attention, each a `torch.Tensor` of shape
            `(num_images, num_attention_heads, num_features, head_dim)`: the argument `encoder_key_values` of
            `forward`.
        """
        attentions = [layer.crossattention.attention for layer in self.encoder.layer if layer.has_cross_attention]
        scale, shift = None, None
        if layernorm is None:
            features = encoder_hidden_states
        elif all(isinstance(projection, FoldedLinear) for a in attentions for projection in (a.key, a.value)):
            features, scale, shift = fold_layernorm(encoder_hidden_states, layernorm)
        else:
            # An adapter, a quantised layer or FSDP has taken the place of a projection
            features = layernorm(encoder_hidden_states.to(layernorm.weight.dtype))
        kind, dtype = features.device.type, self.layernorm.weight.dtype
        # Cast once for all projections, of which each would keep a copy of its own
        features = features.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype)
        if scale is None:
            return tuple(attention.project_image(features) for attention in attentions)
        return tuple(attention.project_image(features, scale.to(dtype), shift.to(dtype)) for attention in attentions)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        query_embeds: torch.Tensor,
        query_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        encoder_key_values: ImageKeyValues | list[ImageKeyValues] | None = None,
        past_key_values: Cache | QFormerTextCache | None = None,
        output_length: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPoolingAndCrossAttentions:
        r"""
        Run queries and text through the layers.

        Args:
            query_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`):
                The queries, then the embedded text; either may be missing.
            query_length (`int`, *optional*):
                Number of queries among them. Defaults to all; 0 for text alone.
            attention_mask (`torch.Tensor`, *optional*):
                1 at positions that may be attended to: of shape `(batch_size, sequence_length)`, or, for each query
                position, `(batch_size, sequence_length, sequence_length)` (see [`block_attention_mask`]), or 4-D with
                a head axis. A 4-D mask of floats is added to the scores as it is.
            encoder_hidden_states (`torch.Tensor` of shape `(num_images, num_features, encoder_hidden_size)`, \
*optional*):
                Image features, after the LayerNorm that follows the tower. Queries need them, or
                `encoder_key_values`.
            encoder_attention_mask (`torch.Tensor` of shape `(batch_size, features)`, *optional*):
                0 at image features that are padding.
            encoder_key_values (`tuple`, *optional*):
                What [`~Blip2QFormerModel.project_image`] returned, in place of `encoder_hidden_states`; or a list of
                such, among which the rows of the batch are divided evenly. Each image serves the same number of rows,
                one after the other: `batch_size` may be a multiple of the number of images.
            past_key_values (`Cache` or `QFormerTextCache`, *optional*):
                Cache to which the keys and values of the self-attention are added.
            output_length (`int`, *optional*):
                Number of the first positions that the last layer computes. Defaults to all.
            kwargs:
                `output_hidden_states` and `output_attentions`, for which this call computes attention eagerly.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPoolingAndCrossAttentions`]: `last_hidden_state` of
            shape `(batch_size, output_length, hidden_size)`; `pooler_output` is its first position.

        Raises:
            ValueError: if queries have no image to attend to, or text has no feed-forward network to go through.
        """
        query_length = query_embeds.shape[1] if query_length is None else query_length
        self._check_inputs(query_embeds, query_length, encoder_hidden_states, encoder_key_values)
        if query_length > 0 and encoder_key_values is None:
            encoder_key_values = self.project_image(encoder_hidden_states)
        hidden_states = self.dropout(self.layernorm(query_embeds.to(self.layernorm.weight.dtype)))
        attention_mask = additive_mask(attention_mask, hidden_states.dtype)
        encoder_attention_mask = additive_mask(encoder_attention_mask, hidden_states.dtype)
        image_sets = encoder_key_values if isinstance(encoder_key_values, list) else [encoder_key_values or ()]
        # For each layer with cross-attention, its (key, value) of each set of images
        key_values_of_layers = zip(*image_sets, strict=True)
        for index, layer in enumerate(self.encoder.layer):
            key_values = next(key_values_of_layers) if layer.has_cross_attention and query_length > 0 else ()
            hidden_states = layer(
                hidden_states,
                attention_mask,
                encoder_attention_mask,
                query_length,
                past_key_values,
                output_length if index == len(self.encoder.layer) - 1 else None,
                *(tensor for key_value in key_values for tensor in key_value),
                **kwargs,
            )
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden_states, pooler_output=hidden_states[:, 0]
        )

    def _check_inputs(self, query_embeds, query_length, encoder_hidden_states, encoder_key_values):
        if query_length > 0 and encoder_hidden_states is None and encoder_key_values is None:
            raise ValueError(
                f"There are {query_length} queries but no image: pass encoder_hidden_states or encoder_key_values "
                "(or query_length=0 for text alone)."
            )
        if query_embeds.shape[1] > query_length and not self.config.use_qformer_text_input:
            raise ValueError(
                f"The input has {query_embeds.shape[1] - query_length} text positions after {query_length} queries, "
                "but this Q-Former has no feed-forward networks for text: make it with "
                "Blip2QFormerConfig(use_qformer_text_input=True)."
            )

    @classmethod
    def from_bert_pretrained(
        cls, text_encoder: str | os.PathLike | PreTrainedModel, encoder_hidden_size: int, **config_kwargs
    ) -> "Blip2QFormerModel":
        r"""
        Make a Q-Former that starts from a BERT, as in the paper (section 3.1): the feed-forward network for queries
        starts as a copy of that for text, the cross-attention from N(0, `initializer_range`).

        Args:
            text_encoder (`str`, `os.PathLike` or [`~transformers.BertModel`]):
                Any BERT checkpoint (a folder or an id on the Hub), or the model itself, with or without a head.
            encoder_hidden_size (`int`):
                Width of the image features.
            config_kwargs (`dict`):
                Other fields of [`Blip2QFormerConfig`], such as `cross_attention_frequency`.

        Returns:
            [`Blip2QFormerModel`]: in the dtype of the BERT.

        Raises:
            ValueError: if the checkpoint is not a BERT, or lacks weights.
        """
        bert = load_bert(text_encoder)
        config = qformer_config_from_bert(bert.config, encoder_hidden_size=encoder_hidden_size, **config_kwargs)
        qformer = cls(config).to(bert.dtype)
        copy_bert_weights(bert, qformer)
        return qformer


Blip2QFormerModel = Blip2HfQFormerModel


def additive_mask(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """
    Return a mask as every attention implementation takes it.

    Args:
        mask (`torch.Tensor`, *optional*):
            1 or `True` where attention is allowed, of shape `(batch_size, key_length)`,
            `(batch_size, query_length, key_length)` or `(batch_size, 1 or heads, query_length, key_length)`. A 4-D
            mask of floats is returned as it is.
        dtype (`torch.dtype`):
            The dtype of the hidden states.

    Returns:
        `torch.Tensor` of 4 dimensions, 0 where attention is allowed and the lowest finite number elsewhere, or `None`.
    """
    if mask is None or (mask.dim() == 4 and mask.is_floating_point()):
        return mask
    if mask.dim() == 2:
        mask = mask[:, None, None, :]
    elif mask.dim() == 3:
        mask = mask[:, None]
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(~mask.bool(), torch.finfo(dtype).min)


def block_attention_mask(query_length: int, attention_mask: torch.Tensor) -> torch.Tensor:
    """
    Return the mask of `[queries | text with [CLS] | text with [DEC]]`, with which one pass serves the contrastive and
    the generative objective (section 3.2, figure 2). Queries see queries; the `[CLS]` copy sees itself; the `[DEC]`
    copy sees the queries and, causally, itself.

    Args:
        query_length (`int`):
            Number of queries.
        attention_mask (`torch.Tensor` of shape `(batch_size, text_length)`):
            1 at the tokens of the text, 0 at its padding.

    Returns:
        `torch.BoolTensor` of shape `(batch_size, length, length)`, `length` being `query_length + 2 * text_length`.
    """
    tokens = attention_mask.bool()
    batch_size, text_length = tokens.shape
    cls, dec = query_length, query_length + text_length
    mask = tokens.new_zeros(batch_size, dec + text_length, dec + text_length)
    mask[:, :cls, :cls] = True
    mask[:, cls:dec, cls:dec] = tokens[:, None, :]
    mask[:, dec:, :cls] = True
    mask[:, dec:, dec:] = tokens[:, None, :] & torch.ones_like(mask[0, dec:, dec:]).tril()
    return mask


__all__ = ["Blip2QFormerModel", "Blip2TextEmbeddings", "block_attention_mask"]
