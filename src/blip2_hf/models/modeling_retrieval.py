"""BLIP-2 for retrieval: features of images and texts that are compared, and scores of pairs (sections 3.2 and 4.4)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .configuration_blip2 import Blip2Config
from .image_states import Blip2ImageStates
from .losses import image_text_similarity
from .modeling_base import Blip2PreTrainedModel, check_texts, pad_right
from .modeling_qformer import ImageKeyValues


class Blip2Temperature(nn.Module):
    """The learned temperature of the contrastive objective; of one dimension, for FSDP takes no scalars."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 0.07, dtype=torch.float32))

    def forward(self, similarity: torch.Tensor) -> torch.Tensor:
        return similarity / self.weight


class Blip2ImageTextPreTrainedModel(Blip2PreTrainedModel):
    """What the models that compare images with texts share: their heads, features and scores."""

    _parts_not_in_transformers = ("temperature",)

    def _build_image_text_heads(self, config: Blip2Config):
        # In float32 whatever the rest is made in: in half precision near scores would be the same
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

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module):
        self.embeddings.word_embeddings = value

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        # transformers sets the vocab_size of a language model's configuration
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
        What texts are compared with.

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
        _, vision_outputs, qformer_outputs = self._query_image(
            pixel_values, image_embeds, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs
        )
        queries = qformer_outputs.last_hidden_state
        return BaseModelOutputWithPooling(
            last_hidden_state=queries,
            pooler_output=unit_length(self.vision_projection(queries.to(self.vision_projection.weight.dtype))),
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
        What images are compared with.

        Args:
            input_ids (`torch.LongTensor` of shape `(num_texts, text_length)`):
                Texts; the first token is [CLS]. Placeholders of images are left out.
            attention_mask (`torch.Tensor` of shape `(num_texts, text_length)`, *optional*):
                0 at padding, which may stand on either side.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: `pooler_output` of shape
            `(num_texts, image_text_hidden_size)`, the projected [CLS], each of length 1; `last_hidden_state` of shape
            `(num_texts, text_length, hidden_size)`, padding behind the texts.
        """
        input_ids, attention_mask = self._texts(input_ids, attention_mask)
        embeds = self.embeddings(input_ids=input_ids)
        outputs = self.qformer(query_embeds=embeds, query_length=0, attention_mask=attention_mask, **kwargs)
        first = outputs.last_hidden_state[:, 0].to(self.text_projection.weight.dtype)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=unit_length(self.text_projection(first)),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def get_image_key_values(self, image_embeds: torch.Tensor) -> ImageKeyValues:
        r"""
        What matching reads of images: keys and values of each cross-attention. Compute them once, and give them to
        [`~Blip2ForImageTextRetrieval.get_matching_logits`], however many texts an image is matched with.

        Args:
            image_embeds (`torch.Tensor` of shape `(num_images, features, vision hidden_size)`):
                What [`~Blip2PreTrainedModel.get_image_embeds`] returned.

        Returns:
            `tuple` of (key, value), one for each layer with cross-attention, each a `torch.Tensor` of shape
            `(num_images, num_attention_heads, features, head_dim)`.
        """
        return self.qformer.project_image(
            Blip2ImageStates.after_layernorm(image_embeds, self.vision_model.post_layernorm)
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
        Do image and text belong together (ITM)? Each image is matched with as many texts as the others, next to one
        another: with `num_images` images, text `i` goes with image `i // (num_pairs / num_images)`.

        Args:
            input_ids (`torch.LongTensor` of shape `(num_pairs, text_length)`):
                Texts; the first token is [CLS]. Placeholders of images are left out.
            attention_mask (`torch.Tensor` of shape `(num_pairs, text_length)`, *optional*):
                0 at padding, which may stand on either side.
            image_key_values (`tuple`, *optional*):
                What [`~Blip2ForImageTextRetrieval.get_image_key_values`] returned.
            image_embeds (`torch.Tensor` of shape `(num_images, features, vision hidden_size)`, *optional*):
                In place of `image_key_values`: what [`~Blip2PreTrainedModel.get_image_embeds`] returned.
            pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`, *optional*):
                In place of both: images.

        Returns:
            `torch.Tensor` of shape `(num_pairs, 2)`: scores of no and yes, in float32 at least.

        Raises:
            ValueError: if images are not given in one form, or their number does not divide that of the texts.
        """
        return self._match(input_ids, attention_mask, image_key_values, image_embeds, pixel_values, **kwargs)[0]

    def _match(self, input_ids, attention_mask, image_key_values, image_embeds, pixel_values, **kwargs):
        """`(logits, outputs of the Q-Former)`."""
        if sum(given is not None for given in (image_key_values, image_embeds, pixel_values)) != 1:
            raise ValueError("Give one of image_key_values, image_embeds and pixel_values.")
        if pixel_values is not None:
            image_embeds = self.get_image_embeds(pixel_values)
        if image_key_values is None:
            image_key_values = self.get_image_key_values(image_embeds)
        num_images = len(image_key_values[0][0])
        if len(input_ids) % num_images:
            raise ValueError(
                f"There are {len(input_ids)} texts for {num_images} images: as many texts for each image were "
                "expected. For all pairs, call the model itself; for others, repeat the texts."
            )
        input_ids, attention_mask = self._texts(input_ids, attention_mask)
        query_length = self.config.num_query_tokens
        embeds = self.embeddings(input_ids=input_ids, query_embeds=self.query_tokens(len(input_ids)))
        mask = torch.cat([attention_mask.new_ones(len(attention_mask), query_length), attention_mask], dim=1)
        outputs = self.qformer(
            query_embeds=embeds,
            query_length=query_length,
            # Without padding everything sees everything
            attention_mask=None if bool(mask.all()) else mask,
            encoder_key_values=image_key_values,
            output_length=query_length,
            **kwargs,
        )
        return self._matching_logits(outputs.last_hidden_state), outputs

    def _matching_logits(self, queries: torch.Tensor) -> torch.Tensor:
        """The mean over queries of what the head says of each."""
        return at_least_float32(self.itm_head(queries.to(self.itm_head.weight.dtype)).mean(dim=1))

    def _texts(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, min_length: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same texts without placeholders of images, all their padding behind them."""
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


@dataclass
class Blip2ForImageTextRetrievalOutput(ModelOutput):
    r"""
    Output of [`Blip2ForImageTextRetrieval`].

    Args:
        logits_per_image (`torch.Tensor`):
            By contrast (ITC), of shape `(num_images, num_texts)`: the highest of the cosines of an image's queries
            with a text, over the temperature if that was asked for. By matching (ITM), scores of no and yes: of shape
            `(num_pairs, 2)` for pairs, `(num_images, num_texts, 2)` for all pairs.
        logits_per_text (`torch.Tensor`):
            The same from the texts' side: `(num_texts, num_images)`, `(2, num_pairs)` or `(num_texts, num_images, 2)`.
        text_embeds (`torch.Tensor`):
            By contrast, of shape `(num_texts, image_text_hidden_size)`: the texts' features, of length 1. By matching,
            of shape `(num_pairs, num_query_tokens, hidden_size)`: the queries, having read image and text.
        image_embeds (`torch.Tensor`):
            By contrast, of shape `(num_images, num_query_tokens, image_text_hidden_size)`: the images' features, of
            length 1. By matching, of shape `(num_images, features, vision hidden_size)`: the tower's output.
        text_model_output (`ModelOutput`, *optional*):
            Output of the Q-Former for the texts, or for the pairs.
        vision_model_output (`ModelOutput`, *optional*):
            Output of the vision tower, where it has run.
    """

    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_model_output: ModelOutput | None = None
    vision_model_output: ModelOutput | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in super().to_tuple())


class Blip2HfForImageTextRetrieval(Blip2ImageTextPreTrainedModel):
    r"""
    BLIP-2 for retrieval (section 4.4): which texts fit an image, and which images a text? By contrast (ITC), which
    compares features that are computed once for each image and text, and by matching (ITM), which reads both together.

    It loads what [`Blip2ForPreTraining`] has learned, transformers' own `Blip2ForImageTextRetrieval`, and LAVIS's
    checkpoints ([`load_lavis_checkpoint`]). A checkpoint of transformers has no temperature: it is then 0.07, where
    training begins. To fine-tune it, train a [`Blip2ForPreTraining`].

    For a collection, see [`~evaluation.TwoStageRetrieval`]: contrast finds candidates, matching ranks them.

    Args:
        config ([`Blip2Config`]):
            Its configuration, with `qformer_config.use_qformer_text_input=True`. A `text_config` is not used.
        vision_model ([`~transformers.PreTrainedModel`], *optional*):
            The tower; made from the configuration, with random weights, if it is not given.

    Example:

    ```python
    >>> from blip2_hf import Blip2ForImageTextRetrieval, Blip2Processor

    >>> processor = Blip2Processor.from_pretrained("Salesforce/blip2-itm-vit-g")
    >>> model = Blip2ForImageTextRetrieval.from_pretrained("Salesforce/blip2-itm-vit-g")
    >>> pixel_values = processor(images=["cat.jpg", "dog.jpg"], return_tensors="pt")["pixel_values"]
    >>> texts = processor.tokenizer(["a cat", "a dog", "a bus"], padding=True, return_tensors="pt")
    >>> similarity = model(pixel_values, texts.input_ids, texts.attention_mask).logits_per_image  # (2, 3)
    >>> matching = {"use_image_text_matching_head": True, "all_pairs": True}
    >>> logits = model(pixel_values, texts.input_ids, texts.attention_mask, **matching).logits_per_image
    >>> probability = logits.softmax(-1)[..., 1]  # (2, 3)
    ```"""

    main_input_name = "pixel_values"
    _keys_to_ignore_on_load_unexpected = [r"^language_model\.", r"^language_projection\.", r"^lm_head\."]
    _keep_in_fp32_modules_strict = ["vision_projection", "text_projection", "itm_head", "temperature"]
    # Learned before, or 0.07
    _keys_to_ignore_on_load_missing = [r"^temperature\.weight$"]

    def __init__(self, config: Blip2Config, vision_model: PreTrainedModel | None = None):
        if not config.qformer_config.use_qformer_text_input:
            raise ValueError(
                "Blip2ForImageTextRetrieval reads text with the Q-Former: make its configuration with "
                "Blip2QFormerConfig(use_qformer_text_input=True)."
            )
        super().__init__(config)
        self._build_image_side(config, vision_model)
        self._build_image_text_heads(config)
        self.post_init()
        self.freeze()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        use_image_text_matching_head: bool = False,
        image_embeds: torch.Tensor | None = None,
        all_pairs: bool | None = None,
        use_temperature: bool = False,
        interpolate_pos_encoding: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | Blip2ForImageTextRetrievalOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`, *optional*):
                Images.
            input_ids (`torch.LongTensor` of shape `(num_texts, text_length)`):
                Texts, in the Q-Former's tokens, [CLS] first. Placeholders of images are left out.
            attention_mask (`torch.Tensor` of shape `(num_texts, text_length)`, *optional*):
                0 at padding, which may stand on either side.
            use_image_text_matching_head (`bool`, *optional*, defaults to `False`):
                Whether to score by matching (ITM), or by contrast (ITC).
            image_embeds (`torch.Tensor` of shape `(num_images, features, vision hidden_size)`, *optional*):
                In place of `pixel_values`: what [`~Blip2PreTrainedModel.get_image_embeds`] returned.
            all_pairs (`bool`, *optional*):
                For matching: whether every image is matched with every text, or image `i` with text `i`. If it is not
                given: the latter where there are as many images as texts, as in transformers.
            use_temperature (`bool`, *optional*, defaults to `False`):
                For contrast: whether the cosines are divided by the temperature, as softmax wants them.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `True`):
                Whether position embeddings are interpolated to the size of the images.
            kwargs:
                `output_hidden_states` and `output_attentions`.

        Returns:
            [`Blip2ForImageTextRetrievalOutput`].

        Raises:
            ValueError: if not exactly one of `pixel_values` and `image_embeds` is given, there is no text or no image,
                a text is longer than the Q-Former's positions, or an option is given that says nothing.
        """
        if (pixel_values is None) == (image_embeds is None):
            raise ValueError("Give either pixel_values or image_embeds, the tower's output in their place.")
        if input_ids is None or len(input_ids) == 0:
            raise ValueError("Give input_ids, the texts. For images alone there is get_image_features.")
        if len(image_embeds if pixel_values is None else pixel_values) == 0:
            raise ValueError("There are no images. For texts alone there is get_text_features.")
        if use_temperature and use_image_text_matching_head:
            raise ValueError("use_temperature=True is for contrast: matching has no temperature.")
        if all_pairs is not None and not use_image_text_matching_head:
            raise ValueError("all_pairs is for matching: contrast always compares all pairs.")
        vision_outputs = None
        if pixel_values is not None:
            vision_outputs = self._run_tower(pixel_values, interpolate_pos_encoding, **kwargs)
            image_embeds = vision_outputs.last_hidden_state
        run = self._forward_matching if use_image_text_matching_head else self._forward_contrast
        option = all_pairs if use_image_text_matching_head else use_temperature
        outputs = run(image_embeds, input_ids, attention_mask, option, **kwargs)
        outputs["vision_model_output"] = vision_outputs
        return Blip2ForImageTextRetrievalOutput(**outputs)

    def _forward_contrast(self, image_embeds, input_ids, attention_mask, use_temperature, **kwargs) -> dict[str, Any]:
        image_features = self.get_image_features(image_embeds=image_embeds, return_dict=True).pooler_output
        text_outputs = self.get_text_features(input_ids, attention_mask, **{**kwargs, "return_dict": True})
        similarity = image_text_similarity(image_features, text_outputs.pooler_output)
        if use_temperature:
            similarity = self.temperature(similarity)
        return {
            "logits_per_image": similarity,
            "logits_per_text": similarity.T,
            "text_embeds": text_outputs.pooler_output,
            "image_embeds": image_features,
            "text_model_output": text_outputs,
        }

    def _forward_matching(self, image_embeds, input_ids, attention_mask, all_pairs, **kwargs) -> dict[str, Any]:
        num_images, num_texts = len(image_embeds), len(input_ids)
        if all_pairs is None:
            all_pairs = num_images != num_texts
        if not all_pairs and num_images != num_texts:
            raise ValueError(f"all_pairs=False with {num_images} images and {num_texts} texts: as many were expected.")
        if all_pairs:
            input_ids = input_ids.repeat(num_images, 1)
            attention_mask = None if attention_mask is None else attention_mask.repeat(num_images, 1)
        logits, outputs = self._match(input_ids, attention_mask, None, image_embeds, None, **kwargs)
        if all_pairs:
            logits = logits.view(num_images, num_texts, 2)
        return {
            "logits_per_image": logits,
            "logits_per_text": logits.transpose(0, 1),
            "text_embeds": outputs.last_hidden_state,
            "image_embeds": image_embeds,
            "text_model_output": outputs,
        }


Blip2ForImageTextRetrieval = Blip2HfForImageTextRetrieval


def unit_length(features: torch.Tensor) -> torch.Tensor:
    """Of length 1; not in half precision, in which near similarities would be the same."""
    return normalize(at_least_float32(features), dim=-1)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The same, in float32 if it is in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


__all__ = ["Blip2ForImageTextRetrieval", "Blip2ForImageTextRetrievalOutput"]
