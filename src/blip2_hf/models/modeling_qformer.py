"""The Querying Transformer (Q-Former): a BERT whose learned queries attend to an image."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModel
from transformers.models.bert.modeling_bert import BertForMaskedLM, BertIntermediate, BertOutput, BertSelfOutput
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings as TransformersBlip2TextEmbeddings
from transformers.models.blip_2.modeling_blip_2 import eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .backbones import load_whole
from .configuration_blip2 import Blip2QFormerConfig
from .image_states import Blip2ImageKeys, Blip2ImageProjection, Blip2ImageStates, is_faster_without_keys


KeyValues = tuple[torch.Tensor, torch.Tensor]
ImageKeyValues = tuple[KeyValues, ...]


@dataclass
class Blip2QFormerText:
    """
    What text already written has left behind, for the next token (see [`Blip2QFormerModel`]).

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
        """Return embedded text, behind the queries if they are given."""
        # transformers' own brings the tokens to the device of the weights, which is none if they are offloaded
        if position_ids is None:
            position_ids = self.position_ids[:, : input_ids.shape[1]]
        embeds = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)
        return embeds if query_embeds is None else torch.cat([query_embeds.to(embeds.dtype), embeds], dim=1)


class Blip2QFormerMultiHeadAttention(nn.Module):
    """Self-attention, or cross-attention to keys and values that [`~Blip2QFormerModel.project_image`] computed."""

    def __init__(self, config: Blip2QFormerConfig, layer_idx: int, is_cross_attention: bool = False):
        super().__init__()
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"hidden_size ({config.hidden_size}) must be a multiple of num_attention_heads "
                f"({config.num_attention_heads})."
            )
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.attention_dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        if is_cross_attention:
            self.key = Blip2ImageProjection(config.encoder_hidden_size, config.hidden_size)
            self.value = Blip2ImageProjection(config.encoder_hidden_size, config.hidden_size)
        else:
            self.key = nn.Linear(config.hidden_size, config.hidden_size)
            self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    @property
    def image_projections(self) -> tuple[nn.Module, nn.Module]:
        return self.key, self.value

    def project_image(self, image_states: Blip2ImageStates) -> KeyValues:
        return self._project(image_states, self.key), self._project(image_states, self.value)

    def project_image_for(
        self, image_states: Blip2ImageStates, query_length: int
    ) -> tuple[torch.Tensor | Blip2ImageKeys, torch.Tensor]:
        """For one pass alone, of as many rows as there are images."""
        sizes = (self.config.num_attention_heads, self.head_dim, query_length)
        is_learned = self.training and _is_plain(self.key) and self.key.weight.requires_grad
        if not is_learned or not is_faster_without_keys(image_states.hidden_states, *sizes):
            return self.project_image(image_states)
        return image_states.keys(self.key), self._project(image_states, self.value)

    def _project(self, image_states: Blip2ImageStates, projection: nn.Module) -> torch.Tensor:
        states = self.split_heads(image_states.project(projection))
        # Products on a CPU want a head in one piece: brought there once, not in each pass
        return states.contiguous() if self.training and states.device.type == "cpu" else states

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        key_values: tuple[KeyValues, ...] | None = None,
        past_key_values: Blip2QFormerText | Cache | None = None,
        output_length: int | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = self.split_heads(self.query(hidden_states[:, :output_length]))
        if key_values is None:
            key, value = self.split_heads(self.key(hidden_states)), self.split_heads(self.value(hidden_states))
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx)
            attention_output, attention_weights = self._attend(query, key, value, attention_mask, **kwargs)
        else:
            # Each set of images serves as many rows as the others
            queries = (query,) if len(key_values) == 1 else query.chunk(len(key_values))
            masks = _chunk_mask(attention_mask, len(key_values))
            attended = [
                self._attend_to_images(rows, key, value, mask, **kwargs)
                for rows, (key, value), mask in zip(queries, key_values, masks, strict=True)
            ]
            attention_output = torch.cat([output for output, _ in attended]) if len(attended) > 1 else attended[0][0]
            attention_weights = attended[0][1] if len(attended) == 1 else None
        return attention_output.reshape(*attention_output.shape[:2], -1), attention_weights

    def _attend_to_images(self, query, key, value, attention_mask, **kwargs):
        """Attention of rows, of which each image serves as many as the others, next to one another."""
        if isinstance(key, Blip2ImageKeys):
            return self._attend_without_keys(query, key, value), None
        rows, heads, query_length, head_dim = query.shape
        if key.shape[0] == rows:
            return self._attend(query, key, value, attention_mask, **kwargs)
        if attention_mask is not None:
            raise ValueError("encoder_attention_mask needs keys and values of one image for each row of the batch.")
        images, per_image = key.shape[0], rows // key.shape[0]
        query = query.view(images, per_image, heads, query_length, head_dim).transpose(1, 2)
        output, _ = self._attend(query.reshape(images, heads, -1, head_dim), key, value, None, **kwargs)
        return output.reshape(rows, query_length, heads, head_dim), None

    def _attend_without_keys(self, query: torch.Tensor, key: Blip2ImageKeys, value: torch.Tensor) -> torch.Tensor:
        attend = partial(_attend_by_scores, dropout=self.attention_dropout)
        # Kept for the backward pass are scores alone: probabilities, with dropout and without, are made of them again
        return checkpoint(attend, key.scores(query * self.scaling), value, use_reentrant=False)

    def _attend(self, query, key, value, attention_mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        if attention_mask is not None:
            # Flex attention looks the mask up by query; there may be fewer of these than the mask was made for
            attention_mask = attention_mask[:, :, : query.shape[2]].expand(-1, -1, query.shape[2], -1)
        name = self._attn_implementation(query, attention_mask, kwargs.get("output_attentions"))
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        if name == "sdpa" and dropout > 0 and query.device.type == "cpu" and torch.is_grad_enabled():
            # No kernel for a CPU has dropout: SDPA scales and copies the keys, and keeps the probabilities three times
            attend = partial(_attend_eagerly, self, dropout=dropout)
            return checkpoint(attend, query, key, value, attention_mask, use_reentrant=False), None
        kwargs |= {"dropout": dropout, "scaling": self.scaling}
        return attention_interface(self, query, key, value, attention_mask, **kwargs)

    def _attn_implementation(
        self, query: torch.Tensor, attention_mask: torch.Tensor | None, output_attentions: bool | None
    ) -> str:
        if output_attentions:
            # No other implementation returns probabilities. Of this call alone: other threads may use the model too
            return "eager"
        name = self.config._attn_implementation
        # Flash kernels take neither float32 nor a mask between queries and text: SDPA computes the same
        if "flash" in name and (attention_mask is not None or query.dtype == torch.float32):
            return "sdpa"
        return name


def _is_plain(projection: nn.Module) -> bool:
    """Whether nothing but a product with its weight happens when it is called: no adapter, no hook, no sharding."""
    return (
        type(projection) is Blip2ImageProjection
        and type(projection.weight) is nn.Parameter
        and not projection._forward_pre_hooks
        and not projection._forward_hooks
        # accelerate's hooks stand in its place
        and "forward" not in vars(projection)
    )


def _attend_eagerly(module: nn.Module, query, key, value, attention_mask, dropout: float) -> torch.Tensor:
    # Scaled before, for there are fewer queries than scores
    query = query * module.scaling
    return eager_attention_forward(module, query, key, value, attention_mask, scaling=1.0, dropout=dropout)[0]


def _attend_by_scores(scores: torch.Tensor, value: torch.Tensor, dropout: float) -> torch.Tensor:
    probabilities = nn.functional.dropout(scores.softmax(dim=-1), dropout)
    return (probabilities @ value).transpose(1, 2).contiguous()


def _chunk_mask(attention_mask: torch.Tensor | None, chunks: int) -> tuple[torch.Tensor | None, ...]:
    if attention_mask is None or chunks == 1 or attention_mask.shape[0] == 1:
        return (attention_mask,) * chunks
    return attention_mask.chunk(chunks)


class Blip2QFormerAttention(nn.Module):
    def __init__(self, config: Blip2QFormerConfig, layer_idx: int, is_cross_attention: bool = False):
        super().__init__()
        self.attention = Blip2QFormerMultiHeadAttention(config, layer_idx, is_cross_attention)
        self.output = BertSelfOutput(config)

    def forward(self, hidden_states, attention_mask=None, **kwargs) -> torch.Tensor:
        attention_output, _ = self.attention(hidden_states, attention_mask, **kwargs)
        return self.output(attention_output, hidden_states[:, : attention_output.shape[1]])


class Blip2QFormerLayer(GradientCheckpointingLayer):
    """Self-attention over queries and text; cross-attention of the queries; a feed-forward network for each kind."""

    def __init__(self, config: Blip2QFormerConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.attention = Blip2QFormerAttention(config, layer_idx)
        self.has_cross_attention = layer_idx % config.cross_attention_frequency == 0
        if self.has_cross_attention:
            self.crossattention = Blip2QFormerAttention(config, layer_idx, is_cross_attention=True)
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
        past_key_values: Blip2QFormerText | Cache | None = None,
        output_length: int | None = None,
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
        """Takes over another layer's feed-forward network for text; it is trained where that of the queries is."""
        like = self.intermediate_query.dense.weight
        for name, network in (("intermediate", BertIntermediate(self.config)), ("output", BertOutput(self.config))):
            network.load_state_dict(getattr(trained, name).state_dict())
            setattr(self, name, network.to(like).train(self.training).requires_grad_(like.requires_grad))
        # As in a layer that is made with it
        for name in ("intermediate_query", "output_query"):
            self._modules[name] = self._modules.pop(name)

    def _feed_forward(self, intermediate: BertIntermediate, output: BertOutput, states: torch.Tensor) -> torch.Tensor:
        """The wide states are kept once, before their activation, which costs little to compute again."""
        wide = intermediate.dense(states)
        if not (self.training and wide.requires_grad):
            return output(intermediate.intermediate_act_fn(wide), states)

        def narrow(wide):
            return output.dense(intermediate.intermediate_act_fn(wide))

        narrowed = checkpoint(narrow, wide, use_reentrant=False, preserve_rng_state=False)
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
    _no_split_modules = ["Blip2QFormerLayer", "Blip2ImageProjection"]
    _can_record_outputs = {
        "hidden_states": Blip2QFormerLayer,
        "attentions": OutputRecorder(Blip2QFormerMultiHeadAttention, index=1, layer_name=".attention.attention"),
        "cross_attentions": OutputRecorder(Blip2QFormerMultiHeadAttention, index=1, layer_name=".crossattention"),
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

    def project_image(self, encoder_hidden_states: torch.Tensor | Blip2ImageStates) -> ImageKeyValues:
        r"""
        The image's keys and values for each cross-attention layer: computed once, used with any number of texts.

        Args:
            encoder_hidden_states (`torch.Tensor` of shape `(num_images, features, encoder_hidden_size)` or \
`Blip2ImageStates`):
                Image features, after the LayerNorm that follows the tower.

        Returns:
            `tuple` of (key, value), one for each layer with cross-attention, each a `torch.Tensor` of shape
            `(num_images, num_attention_heads, features, head_dim)`: the argument `encoder_key_values` of `forward`.
        """
        states = self._image_states(encoder_hidden_states)
        return tuple(attention.project_image(states) for attention in self._cross_attentions)

    def _project_image_for(
        self,
        query_embeds: torch.Tensor,
        query_length: int,
        encoder_hidden_states: torch.Tensor | Blip2ImageStates,
        encoder_attention_mask: torch.Tensor | None,
        output_attentions: bool | None,
    ) -> tuple[tuple[torch.Tensor | Blip2ImageKeys, torch.Tensor], ...]:
        """The same for these queries alone: without keys, where that is faster."""
        states = self._image_states(encoder_hidden_states)
        # Sizes are compared in training alone, for a graph for serving has them open; SDPA returns no probabilities;
        # activation checkpointing may look for gradients in tensors alone
        is_one_pass = (
            self.training
            and not output_attentions
            and self.config._attn_implementation == "sdpa"
            and not self.encoder.gradient_checkpointing
            and encoder_attention_mask is None
            and len(states.hidden_states) == len(query_embeds)
        )
        return tuple(
            attention.project_image_for(states, query_length) if is_one_pass else attention.project_image(states)
            for attention in self._cross_attentions
        )

    @property
    def _cross_attentions(self) -> list[Blip2QFormerMultiHeadAttention]:
        return [layer.crossattention.attention for layer in self.encoder.layer if layer.has_cross_attention]

    def _image_states(self, encoder_hidden_states: torch.Tensor | Blip2ImageStates) -> Blip2ImageStates:
        """As the projections of all layers take them."""
        states = encoder_hidden_states
        if isinstance(states, torch.Tensor):
            states = Blip2ImageStates(states)
        states = states.to(self.layernorm.weight.dtype)
        projections = [part for attention in self._cross_attentions for part in attention.image_projections]
        if not all(isinstance(projection, Blip2ImageProjection) for projection in projections):
            # An adapter, a quantised map or FSDP stands in the place of one
            states = states.unfolded()
        return states.autocast()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        query_embeds: torch.Tensor,
        query_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | Blip2ImageStates | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        encoder_key_values: ImageKeyValues | list[ImageKeyValues] | None = None,
        past_key_values: Cache | Blip2QFormerText | None = None,
        output_length: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPoolingAndCrossAttentions:
        r"""
        Args:
            query_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`):
                The queries, then the embedded text; either may be missing.
            query_length (`int`, *optional*):
                How many of them are queries. All, if it is not given; 0 for text alone.
            attention_mask (`torch.Tensor`, *optional*):
                1 where there is something to attend to: of shape `(batch_size, sequence_length)`, or, to say who sees
                whom, `(batch_size, sequence_length, sequence_length)` (see [`block_attention_mask`]), or 4-D with a
                head axis; a 4-D mask of floats is added to the scores as it is.
            encoder_hidden_states (`torch.Tensor` of shape `(num_images, features, encoder_hidden_size)` or \
`Blip2ImageStates`, *optional*):
                Image features. Needed, if there are queries, unless `encoder_key_values` is given.
            encoder_attention_mask (`torch.Tensor` of shape `(batch_size, features)`, *optional*):
                0 at image features that are padding.
            encoder_key_values (`tuple`, *optional*):
                What [`~Blip2QFormerModel.project_image`] returned, in place of `encoder_hidden_states`; or a list of
                such, among which the rows of the batch are divided evenly. Each image serves as many rows as the
                others, next to one another: `batch_size` may be a multiple of the number of images.
            past_key_values (`Cache` or `Blip2QFormerText`, *optional*):
                Takes the keys and values of the self-attention, and gives those before them.
            output_length (`int`, *optional*):
                How many of the first positions the last layer computes. All, if it is not given.
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
            encoder_key_values = self._project_image_for(
                query_embeds,
                query_length,
                encoder_hidden_states,
                encoder_attention_mask,
                kwargs.get("output_attentions"),
            )
        hidden_states = self.dropout(self.layernorm(query_embeds.to(self.layernorm.weight.dtype)))
        attention_mask = additive_mask(attention_mask, hidden_states.dtype)
        encoder_attention_mask = additive_mask(encoder_attention_mask, hidden_states.dtype)
        image_sets = encoder_key_values if isinstance(encoder_key_values, list) else [encoder_key_values or ()]
        key_values = zip(*image_sets, strict=True)
        for index, layer in enumerate(self.encoder.layer):
            images = next(key_values) if layer.has_cross_attention and query_length > 0 else ()
            hidden_states = layer(
                hidden_states,
                attention_mask,
                encoder_attention_mask,
                query_length,
                past_key_values,
                output_length if index == len(self.encoder.layer) - 1 else None,
                # One by one: activation checkpointing of the older kind does not look into tuples
                *(tensor for key_value in images for tensor in key_value),
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
        A Q-Former that starts from a BERT, as in the paper (section 3.1): the feed-forward network for queries starts
        as a copy of that for text, the cross-attention from N(0, `initializer_range`).

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
    A mask as every attention implementation takes it.

    Args:
        mask (`torch.Tensor`, *optional*):
            1 or `True` where attention is allowed, of shape `(batch_size, key_length)`,
            `(batch_size, query_length, key_length)` or `(batch_size, 1 or heads, query_length, key_length)`. A 4-D
            mask of floats is returned as it is.
        dtype (`torch.dtype`):
            Of the hidden states.

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
    Who sees whom in `[queries | text with [CLS] | text with [DEC]]`: one pass that gives what the contrastive and the
    generative objective need (section 3.2, figure 2). Queries see queries; the `[CLS]` copy sees itself; the `[DEC]`
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


def load_bert(text_encoder: str | os.PathLike | PreTrainedModel) -> PreTrainedModel:
    """Load the [`~transformers.BertModel`] inside any BERT; its pooler, which is not read, may be missing."""
    if isinstance(text_encoder, PreTrainedModel):
        model, given = text_encoder, type(text_encoder).__name__
    else:
        model = load_whole(AutoModel, text_encoder, "A checkpoint of a BERT", not_needed=("pooler.",))
        given = str(text_encoder)
    bert = getattr(model, "bert", model)
    if bert.config.model_type != "bert":
        raise ValueError(f"A Q-Former starts from a BERT, but {given} is a {bert.config.model_type!r} model.")
    return bert


def load_bert_with_head(text_encoder: str | os.PathLike | PreTrainedModel) -> tuple[PreTrainedModel, nn.Module | None]:
    """Load the [`~transformers.BertModel`] inside any BERT, and its masked-language-modelling head if it has one."""
    if isinstance(text_encoder, PreTrainedModel):
        head = getattr(getattr(text_encoder, "cls", None), "predictions", None)
        return load_bert(text_encoder), head
    bert = load_bert(text_encoder)
    loaded: Any = BertForMaskedLM.from_pretrained(text_encoder, output_loading_info=True)
    model, info = loaded
    has_head = not any(name.startswith("cls.predictions.transform") for name in info["missing_keys"])
    return bert, model.cls.predictions if has_head else None


def qformer_config_from_bert(bert_config, **kwargs) -> Blip2QFormerConfig:
    """The configuration of a Q-Former of the sizes of a BERT; keyword arguments overrule."""
    names = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "max_position_embeddings",
        "layer_norm_eps",
        "pad_token_id",
    )
    # BERT has no [DEC]; who adds it to the vocabulary says so
    fields = {name: getattr(bert_config, name) for name in names} | {"bos_token_id": None}
    return Blip2QFormerConfig(**(fields | kwargs))


@torch.no_grad()
def copy_bert_weights(bert: PreTrainedModel, qformer: Blip2QFormerModel, embeddings: nn.Module | None = None):
    """
    Copies the weights of a BERT into a Q-Former of the same sizes. Token types have no place in a Q-Former.

    Args:
        bert ([`~transformers.BertModel`]):
            Where they come from.
        qformer ([`Blip2QFormerModel`]):
            Where they go: self-attention, and the feed-forward networks, those for queries as copies.
        embeddings (`Blip2TextEmbeddings`, *optional*):
            Text embeddings; rows beyond BERT's vocabulary keep what they have.
    """
    qformer.layernorm.load_state_dict(bert.embeddings.LayerNorm.state_dict())
    for source, target in zip(bert.encoder.layer, qformer.encoder.layer, strict=True):
        for name in ("query", "key", "value"):
            state = getattr(source.attention.self, name).state_dict()
            getattr(target.attention.attention, name).load_state_dict(state)
        target.attention.output.load_state_dict(source.attention.output.state_dict())
        for suffix in ("_query", "") if qformer.config.use_qformer_text_input else ("_query",):
            getattr(target, f"intermediate{suffix}").load_state_dict(source.intermediate.state_dict())
            getattr(target, f"output{suffix}").load_state_dict(source.output.state_dict())
    if embeddings is not None:
        for name in ("word_embeddings", "position_embeddings"):
            weight = getattr(bert.embeddings, name).weight
            getattr(embeddings, name).weight[: len(weight)] = weight


__all__ = ["Blip2QFormerModel", "Blip2TextEmbeddings", "block_attention_mask"]
