"""The two halves of retrieval by contrast alone: features of images, and features of texts without a vision tower."""

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.models.blip_2.modeling_blip_2 import Blip2TextModelOutput, Blip2VisionModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_blip2 import Blip2Config
from .modeling_base import Blip2PreTrainedModel
from .modeling_image_text import l2_normalize
from .modeling_qformer import Blip2QFormerModel, Blip2TextEmbeddings
from .text_inputs import check_options, check_texts, pad_right


class Blip2HfVisionModelWithProjection(Blip2PreTrainedModel):
    r"""
    The image side of [`Blip2ForImageTextRetrieval`]: features with which texts are compared. It takes the checkpoints
    of that class and of [`Blip2ForPreTraining`].

    Args:
        config ([`Blip2Config`]):
            Its configuration.
        vision_model ([`~transformers.PreTrainedModel`], *optional*):
            The tower; made from the configuration, with random weights, if it is not given.
    """

    input_modalities = ("image",)
    main_input_name = "pixel_values"
    _parts_not_in_transformers = ("embeddings",)
    _keys_to_ignore_on_load_unexpected = [
        r"^(language_model|language_projection|lm_head|text_projection|itm_head|temperature)\."
    ]
    _keep_in_fp32_modules_strict = ["vision_projection"]

    def __init__(self, config: Blip2Config, vision_model: PreTrainedModel | None = None):
        super().__init__(config)
        self._build_image_side(config, vision_model)
        sizes = config.qformer_config.hidden_size, config.image_text_hidden_size
        self.vision_projection = nn.Linear(*sizes, dtype=torch.float32)
        self.post_init()
        self.freeze()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.get_input_embeddings()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | Blip2VisionModelOutput:
        r"""
        Compute the features of images.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`, *optional*):
                Images.
            image_embeds (`torch.Tensor` of shape `(num_images, features, vision hidden_size)`, *optional*):
                In place of `pixel_values`: what [`~Blip2PreTrainedModel.get_image_embeds`] returned.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `True`):
                Whether position embeddings are interpolated to the size of the images.
            kwargs:
                `output_hidden_states` and `output_attentions`.

        Returns:
            [`~transformers.models.blip_2.modeling_blip_2.Blip2VisionModelOutput`]: `image_embeds` of shape
            `(num_images, num_query_tokens, image_text_hidden_size)`, the projected queries, each of length 1, and the
            tower's `last_hidden_state`, `hidden_states` and `attentions`.

        Raises:
            TypeError: if an argument is not known.
            ValueError: if not exactly one of `pixel_values` and `image_embeds` is given.
        """
        check_options(kwargs, "pixel_values or image_embeds")
        image_embeds, vision_outputs, outputs = self.encode_image(
            pixel_values, image_embeds, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs
        )
        queries = outputs.last_hidden_state.to(self.vision_projection.weight.dtype)
        return Blip2VisionModelOutput(
            image_embeds=l2_normalize(self.vision_projection(queries)),
            last_hidden_state=image_embeds,
            hidden_states=None if vision_outputs is None else vision_outputs.hidden_states,
            attentions=None if vision_outputs is None else vision_outputs.attentions,
        )


class Blip2HfTextModelWithProjection(Blip2PreTrainedModel):
    r"""
    The text side of [`Blip2ForImageTextRetrieval`], without a vision tower: features with which images are compared.
    It takes the checkpoints of that class and of [`Blip2ForPreTraining`].

    Args:
        config ([`Blip2Config`]):
            Its configuration, with `qformer_config.use_qformer_text_input=True`.

    Raises:
        ValueError: if the Q-Former reads no text.
    """

    input_modalities = ("text",)
    main_input_name = "input_ids"
    _keys_to_ignore_on_load_unexpected = [
        r"^(vision_model|query_tokens|language_model|language_projection|lm_head|vision_projection|itm_head|temperature)\b"
    ]
    _keep_in_fp32_modules_strict = ["text_projection"]

    def __init__(self, config: Blip2Config):
        if not config.qformer_config.use_qformer_text_input:
            raise ValueError(
                "Blip2TextModelWithProjection reads text with the Q-Former, and this one reads none. Give a "
                "checkpoint of stage 1 or of retrieval."
            )
        super().__init__(config)
        self.embeddings = Blip2TextEmbeddings(config.qformer_config)
        self.qformer = Blip2QFormerModel._from_config(config.qformer_config)
        sizes = config.qformer_config.hidden_size, config.image_text_hidden_size
        self.text_projection = nn.Linear(*sizes, dtype=torch.float32)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module):
        self.embeddings.word_embeddings = value

    def freeze(self) -> "Blip2HfTextModelWithProjection":
        """Return the model, which has no part that is frozen."""
        return self

    def _tower_parts(self) -> list[nn.Module]:
        return []

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | Blip2TextModelOutput:
        r"""
        Compute the features of texts.

        Args:
            input_ids (`torch.LongTensor` of shape `(num_texts, text_length)`):
                Texts, in the Q-Former's tokens, [CLS] first.
            attention_mask (`torch.Tensor` of shape `(num_texts, text_length)`, *optional*):
                0 at padding, which may stand on either side.
            position_ids (`torch.LongTensor` of shape `(num_texts, text_length)`, *optional*):
                Positions. Defaults to 0, 1, 2, ...
            kwargs:
                `output_hidden_states` and `output_attentions`.

        Returns:
            [`~transformers.models.blip_2.modeling_blip_2.Blip2TextModelOutput`]: `text_embeds` of shape
            `(num_texts, text_length, image_text_hidden_size)`, the projected tokens, each of length 1, and the
            Q-Former's `last_hidden_state`, `hidden_states` and `attentions`, with padding after the texts. Images are
            compared with `text_embeds[:, 0]`.

        Raises:
            TypeError: if an argument is not known.
            ValueError: if there are no texts, or one is longer than the Q-Former's positions.
        """
        check_options(kwargs, "input_ids, attention_mask and position_ids")
        if input_ids is None or len(input_ids) == 0:
            raise ValueError("There are no texts. Give input_ids.")
        input_ids, attention_mask = pad_right(input_ids, attention_mask)
        check_texts(input_ids, attention_mask, self.config, "input_ids")
        embeds = self.embeddings(input_ids=input_ids, position_ids=position_ids)
        outputs = self.qformer(query_embeds=embeds, query_length=0, attention_mask=attention_mask, **kwargs)
        features = self.text_projection(outputs.last_hidden_state.to(self.text_projection.weight.dtype))
        return Blip2TextModelOutput(
            text_embeds=l2_normalize(features),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


Blip2VisionModelWithProjection = Blip2HfVisionModelWithProjection
Blip2TextModelWithProjection = Blip2HfTextModelWithProjection


__all__ = ["Blip2TextModelWithProjection", "Blip2VisionModelWithProjection"]
