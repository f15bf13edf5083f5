"""Captions from the Q-Former alone, as it learned them by image-grounded text generation (section 3.2, ITG)."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from ._compat import CACHE_NAME
from .modeling_qformer import Blip2QFormerModel, QFormerTextCache
from .text_inputs import check_one_image_input


class Blip2QFormerDecoder(PreTrainedModel, GenerationMixin):
    """
    The text side of a Q-Former as a language model whose text sees the queries. It shares the model's own modules.

    Args:
        qformer ([`Blip2QFormerModel`]):
            The Q-Former.
        embeddings (`nn.Module`):
            Text embeddings.
        lm_head (`nn.Module`):
            Head from hidden states to scores of tokens.
    """

    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, qformer: Blip2QFormerModel, embeddings: nn.Module, lm_head: nn.Module):
        super().__init__(qformer.config)
        self.qformer = qformer
        self.embeddings = embeddings
        self.lm_head = lm_head
        self.eval()

    def prepare_inputs_for_generation(self, input_ids, attention_mask: torch.Tensor | None = None, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)
        # super() may have made the mask of a plain decoder, but here the text also sees the queries
        return {**inputs, "attention_mask": attention_mask}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        query_key_values: torch.Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool = True,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        r"""
        Compute scores of the next tokens.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, new_length)`):
                The tokens that follow the text of `cache`.
            attention_mask (`torch.Tensor` of shape `(batch_size, length)`, *optional*):
                0 at padding, for the whole text.
            query_key_values (`torch.Tensor` of shape `(batch_size, layers, 2, heads, num_query_tokens, head_dim)`):
                Keys and values of the queries in the self-attention.
            cache, past_key_values (`Cache`, *optional*):
                Keys and values of the text before, under the newer or the older of transformers' names.
            position_ids (`torch.LongTensor` of shape `(batch_size, new_length)`, *optional*):
                Positions of `input_ids`.
        """
        cache = past_key_values if cache is None else cache
        cache = DynamicCache() if cache is None else cache
        past_length, new_length = cache.get_seq_length(), input_ids.shape[1]
        length = past_length + new_length
        mask = torch.ones(len(input_ids), new_length, length, dtype=torch.bool, device=input_ids.device)
        sees_text = mask.tril(past_length)
        if attention_mask is not None:
            sees_text &= attention_mask[:, None, :length].bool()
        sees_queries = mask.new_ones(len(input_ids), new_length, query_key_values.shape[-2])
        hidden_states = self.qformer(
            query_embeds=self.embeddings(input_ids=input_ids, position_ids=position_ids),
            query_length=0,
            attention_mask=torch.cat([sees_queries, sees_text], dim=2),
            past_key_values=QFormerTextCache(query_key_values, cache),
        ).last_hidden_state
        outputs: dict[str, Any] = {"logits": self.lm_head(hidden_states), CACHE_NAME: cache if use_cache else None}
        return CausalLMOutputWithPast(**outputs)


class Blip2QFormerGenerationMixin:
    """`generate` of [`Blip2ForPreTraining`]."""

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = True,
        **generate_kwargs,
    ) -> torch.Tensor | ModelOutput:
        r"""
        Generate captions without a language model. The image is read once for any number of tokens and beams.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`, *optional*):
                Images.
            image_embeds (`torch.Tensor` of shape `(num_images, features, vision hidden_size)`, *optional*):
                In place of `pixel_values`: what [`~Blip2PreTrainedModel.get_image_embeds`] returned.
            input_ids, attention_mask (`torch.Tensor` of shape `(num_images, prompt_length)`, *optional*):
                Beginning of each text, as the tokenizer gives it: [CLS] is replaced by [DEC], and [SEP] is removed.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `True`):
                Whether position embeddings are interpolated to the size of the images.
            generate_kwargs (`dict`):
                Arguments of [`~transformers.GenerationMixin.generate`].

        Returns:
            `torch.LongTensor` of shape `(num_images * num_return_sequences, length)`, or a `ModelOutput` with it as
            `sequences`: [DEC], the prompt and the new tokens. The tokenizer's `batch_decode` with
            `skip_special_tokens=True` gives the text.

        Raises:
            ValueError: if it is not known which token ends a text, or there is not one prompt for each image.
        """
        check_one_image_input(pixel_values, image_embeds)
        if image_embeds is None:
            image_embeds = self.get_image_embeds(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        config = self.config.qformer_config
        given = generate_kwargs.get("generation_config") or GenerationConfig()
        eos_token_id = generate_kwargs.get("eos_token_id") or given.eos_token_id or config.eos_token_id
        if eos_token_id is None:
            raise ValueError(
                "Which token ends a text is not known: set config.qformer_config.eos_token_id to the tokenizer's "
                "sep_token_id, or pass eos_token_id."
            )
        if input_ids is None:
            input_ids = torch.full((len(image_embeds), 1), config.bos_token_id, device=image_embeds.device)
            attention_mask = torch.ones_like(input_ids)
        else:
            if len(input_ids) != len(image_embeds):
                raise ValueError(
                    f"{len(image_embeds)} images and {len(input_ids)} prompts: give one prompt for each image."
                )
            input_ids, attention_mask = self._prepare_prompt(input_ids, attention_mask, eos_token_id)
        training = self.training
        self.eval()
        try:
            decoder = Blip2QFormerDecoder(self.qformer, self.embeddings, self.lm_head)
            decoder.generation_config = GenerationConfig(
                bos_token_id=config.bos_token_id, eos_token_id=eos_token_id, pad_token_id=config.pad_token_id
            )
            return decoder.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                query_key_values=self._query_key_values(image_embeds),
                **generate_kwargs,
            )
        finally:
            self.train(training)

    def _query_key_values(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Compute keys and values of the queries in every layer's self-attention."""
        cache = DynamicCache()
        self.qformer(
            query_embeds=self.query_tokens(len(image_embeds)),
            encoder_key_values=self.get_image_key_values(image_embeds),
            past_key_values=cache,
        )
        key_values: list[Any] = [(layer.keys, layer.values) for layer in cache.layers]
        return torch.stack([torch.stack(pair, dim=1) for pair in key_values], dim=1)

    def _prepare_prompt(
        self, input_ids, attention_mask, eos_token_id: int | list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return [DEC] and the prompt, with padding in front of shorter ones."""
        input_ids, attention_mask = self._prepare_texts(input_ids, attention_mask)
        is_token = ~torch.isin(input_ids, torch.tensor(eos_token_id, device=input_ids.device)) & attention_mask.bool()
        if not bool(is_token.any(dim=1).all()):
            row = int(is_token.any(dim=1).int().argmin())
            raise ValueError(f"Prompt {row} has no token except the one that ends a text: [CLS] first was expected.")
        order = is_token.int().argsort(dim=1, stable=True)
        order = order[:, -int(is_token.sum(dim=1).max()) :]
        input_ids, is_token = input_ids.gather(1, order), is_token.gather(1, order)
        first = is_token.int().argmax(dim=1, keepdim=True)
        input_ids = input_ids.scatter(1, first, self.config.qformer_config.bos_token_id)
        return input_ids.masked_fill(~is_token, self.config.qformer_config.pad_token_id), is_token.long()
