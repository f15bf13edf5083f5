"""The base class of the models of stage 1 and of retrieval: features of images and texts, and scores of pairs."""

import json
import os
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import normalize
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_blip2 import Blip2Config
from .modeling_base import Blip2PreTrainedModel
from .modeling_qformer import ImageKeyValues
from .text_inputs import check_texts, count_images, pad_right


# What sentence-transformers opens a folder by, as a model whose vectors are compared by late interaction
_MULTI_VECTOR_FILES = {
    "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "blip2_hf.multi_vector.ImageTextVectors"}],
    "config_sentence_transformers.json": {"model_type": "MultiVectorEncoder", "similarity_fn_name": "maxsim"},
}


class Blip2Temperature(nn.Module):
    """The learned temperature of the contrastive objective, 1-D because FSDP cannot shard scalars."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 0.07, dtype=torch.float32))

    def forward(self, similarity: torch.Tensor) -> torch.Tensor:
        return similarity / self.weight


class Blip2ImageTextPreTrainedModel(Blip2PreTrainedModel):
    """Base class of the models that compare images with texts: their heads, features and scores."""

    _parts_not_in_transformers = ("temperature",)

    def _build_image_text_heads(self, config: Blip2Config):
        # In float32 for any dtype of the rest, because half precision rounds close scores to the same number
        sizes, dtype = (config.qformer_config.hidden_size, config.image_text_hidden_size), torch.float32
        self.vision_projection = nn.Linear(*sizes, dtype=dtype)
        self.text_projection = nn.Linear(*sizes, dtype=dtype)
        self.itm_head = nn.Linear(sizes[0], 2, dtype=dtype)
        self.temperature = Blip2Temperature()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, Blip2Temperature):
            init.constant_(module.weight, 0.07)

    def _save_beside(self, save_directory: str | os.PathLike):
        for name, content in _MULTI_VECTOR_FILES.items():
            path = Path(save_directory) / name
            # sentence-transformers has written its own with what a user has set
            if not path.exists():
                path.write_text(json.dumps(content, indent=2) + "\n")

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module):
        self.embeddings.word_embeddings = value

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        # transformers sets vocab_size in a language model's configuration only
        self.config.qformer_config.vocab_size = embeddings.num_embeddings
        return embeddings

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Compute the features of images, with which texts are compared.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`, *optional*):
                Images.
            image_embeds (`torch.Tensor` of shape `(num_images, features, vision hidden_size)`, *optional*):
                In place of `pixel_values`: what [`~Blip2PreTrainedModel.get_image_embeds`] returned.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `True`):
                Whether position embeddings are interpolated to the size of the images.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: `pooler_output` of shape
            `(num_images, num_query_tokens, image_text_hidden_size)`, the projected queries, each of length 1;
            `last_hidden_state` of shape `(num_images, num_query_tokens, hidden_size)`, the queries before;
            `hidden_states` and `attentions` are the tower's.
        """
        _, vision_outputs, qformer_outputs = self.encode_image(
            pixel_values, image_embeds, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs
        )
        queries = qformer_outputs.last_hidden_state
        return BaseModelOutputWithPooling(
            last_hidden_state=queries,
            pooler_output=l2_normalize(self.vision_projection(queries.to(self.vision_projection.weight.dtype))),
            hidden_states=None if vision_outputs is None else vision_outputs.hidden_states,
            attentions=None if vision_outputs is None else vision_outputs.attentions,
        )

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Compute the features of texts, with which images are compared.

        Args:
            input_ids (`torch.LongTensor` of shape `(num_texts, text_length)`):
                Texts; the first token is [CLS]. Placeholders of images are left out.
            attention_mask (`torch.Tensor` of shape `(num_texts, text_length)`, *optional*):
                0 at padding, which may stand on either side.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: `pooler_output` of shape
            `(num_texts, image_text_hidden_size)`, the projected [CLS], each of length 1; `last_hidden_state` of shape
            `(num_texts, text_length, hidden_size)`, with padding after the texts.
        """
        input_ids, attention_mask = self._prepare_texts(input_ids, attention_mask)
        embeds = self.embeddings(input_ids=input_ids)
        outputs = self.qformer(query_embeds=embeds, query_length=0, attention_mask=attention_mask, **kwargs)
        first = outputs.last_hidden_state[:, 0].to(self.text_projection.weight.dtype)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=l2_normalize(self.text_projection(first)),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def get_matching_logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_key_values: ImageKeyValues | None = None,
        image_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        r"""
        Score whether image and text belong together (ITM). Each image is matched with the same number of texts, which
        follow each other: text `i` goes with image `i // (num_pairs / num_images)`.

        Args:
            input_ids (`torch.LongTensor` of shape `(num_pairs, text_length)`):
                Texts; the first token is [CLS]. Placeholders of images are left out.
            attention_mask (`torch.Tensor` of shape `(num_pairs, text_length)`, *optional*):
                0 at padding, which may stand on either side.
            image_key_values (`tuple`, *optional*):
                What [`~Blip2PreTrainedModel.get_image_key_values`] returned.
            image_embeds (`torch.Tensor` of shape `(num_images, features, vision hidden_size)`, *optional*):
                In place of `image_key_values`: what [`~Blip2PreTrainedModel.get_image_embeds`] returned.
            pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`, *optional*):
                In place of both: images.

        Returns:
            `torch.Tensor` of shape `(num_pairs, 2)`: scores of no and yes, in float32 at least.

        Raises:
            ValueError: if images are not given in exactly one form, or their number does not divide that of the texts.
        """
        return self._match(input_ids, attention_mask, image_key_values, image_embeds, pixel_values, **kwargs)[0]

    def _match(self, input_ids, attention_mask, image_key_values, image_embeds, pixel_values, **kwargs):
        """Return `(logits, outputs of the Q-Former)`."""
        if sum(given is not None for given in (image_key_values, image_embeds, pixel_values)) != 1:
            raise ValueError("Give exactly one of image_key_values, image_embeds and pixel_values.")
        if image_key_values is None:
            num_images = count_images(pixel_values, image_embeds)
        else:
            num_images = len(image_key_values[0][0])
        if len(input_ids) % num_images:
            raise ValueError(
                f"There are {len(input_ids)} texts for {num_images} images: the same number of texts for each image "
                "was expected. For all pairs, call the model itself; for others, repeat the texts."
            )
        # Values of the text are read before the tower runs, because reading waits for all that a GPU has to do
        input_ids, attention_mask = self._prepare_texts(input_ids, attention_mask)
        has_padding = not bool(attention_mask.all())
        if pixel_values is not None:
            image_embeds = self.get_image_embeds(pixel_values)
        if image_key_values is None:
            image_key_values = self.get_image_key_values(image_embeds)
        query_length = self.config.num_query_tokens
        embeds = self.embeddings(input_ids=input_ids, query_embeds=self.query_tokens(len(input_ids)))
        mask = torch.cat([attention_mask.new_ones(len(attention_mask), query_length), attention_mask], dim=1)
        outputs = self.qformer(
            query_embeds=embeds,
            query_length=query_length,
            # Without padding, everything attends to everything
            attention_mask=mask if has_padding else None,
            encoder_key_values=image_key_values,
            output_length=query_length,
            **kwargs,
        )
        return self._matching_logits(outputs.last_hidden_state), outputs

    def _matching_logits(self, queries: torch.Tensor) -> torch.Tensor:
        """Return the mean over queries of the matching head's scores."""
        return upcast_to_float32(self.itm_head(queries.to(self.itm_head.weight.dtype)).mean(dim=1))

    def _prepare_texts(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, min_length: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same texts without placeholders of images, with all padding after them."""
        image_token = self.config.image_token_index
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if image_token is not None:
            attention_mask = attention_mask * input_ids.ne(image_token)
        input_ids, attention_mask = pad_right(input_ids, attention_mask)
        if image_token is not None:
            length = max(int(attention_mask.sum(dim=1).max()), 1)
            input_ids, attention_mask = input_ids[:, :length], attention_mask[:, :length]
            input_ids = input_ids.masked_fill(attention_mask.eq(0), self.config.qformer_config.pad_token_id or 0)
        check_texts(input_ids, attention_mask, self.config, "input_ids", min_length)
        return input_ids, attention_mask


def l2_normalize(features: torch.Tensor) -> torch.Tensor:
    """Scale features to length 1, in float32 at least because half precision rounds close similarities alike."""
    return normalize(upcast_to_float32(features), dim=-1)


def upcast_to_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of half precision in float32, and any other as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


__all__ = ["Blip2ImageTextPreTrainedModel", "l2_normalize", "upcast_to_float32"]
