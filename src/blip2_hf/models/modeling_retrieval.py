"""BLIP-2 for retrieval: features with which images and texts are compared, scores of pairs (sections 3.2 and 4.4)."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .configuration_blip2 import Blip2Config
from .losses import image_text_similarity
from .modeling_image_text import Blip2ImageTextPreTrainedModel
from .text_inputs import check_one_image_input, check_options


@dataclass
class Blip2ForImageTextRetrievalOutput(ModelOutput):
    r"""
    Output of [`Blip2ForImageTextRetrieval`].

    Args:
        logits_per_image (`torch.Tensor`):
            By contrast (ITC), of shape `(num_images, num_texts)`: the highest cosine of an image's queries with a
            text, over the temperature with `use_temperature=True`. By matching (ITM), scores of no and yes: of shape
            `(num_pairs, 2)` for pairs, `(num_images, num_texts, 2)` for all pairs.
        logits_per_text (`torch.Tensor`):
            The same from the texts' side: `(num_texts, num_images)`, `(2, num_pairs)` or `(num_texts, num_images, 2)`.
        text_embeds (`torch.Tensor`):
            By contrast, of shape `(num_texts, image_text_hidden_size)`: the texts' features, of length 1. By matching,
            of shape `(num_pairs, num_query_tokens, hidden_size)`: the output queries for image and text.
        image_embeds (`torch.Tensor`):
            By contrast, of shape `(num_images, num_query_tokens, image_text_hidden_size)`: the images' features, of
            length 1. By matching, of shape `(num_images, features, vision hidden_size)`: the tower's output.
        text_model_output (`ModelOutput`, *optional*):
            Output of the Q-Former for the texts, or for the pairs.
        vision_model_output (`ModelOutput`, *optional*):
            Output of the vision tower, if it has run.
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
    checkpoints ([`load_lavis_checkpoint`]). A checkpoint of transformers has no temperature, which is then 0.07, as at
    the start of training. To fine-tune the model, train a [`Blip2ForPreTraining`].

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
    # Checkpoints of transformers lack it: it is then 0.07
    _keys_to_ignore_on_load_missing = [r"^temperature\.weight$"]

    def __init__(self, config: Blip2Config, vision_model: PreTrainedModel | None = None):
        if not config.qformer_config.use_qformer_text_input:
            raise ValueError(
                "Blip2ForImageTextRetrieval reads text with the Q-Former, and this Q-Former reads none. Load a model "
                "of stage 1 or for retrieval, such as Salesforce/blip2-itm-vit-g, because a captioner has not learned "
                "to match. For a new model, give Blip2QFormerConfig(use_qformer_text_input=True)."
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
        Score images and texts, by contrast (ITC) or by matching (ITM).

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
                For matching: whether every image is matched with every text, or image `i` with text `i`. Defaults to
                `False` if there are as many images as texts, as in transformers, otherwise to `True`.
            use_temperature (`bool`, *optional*, defaults to `False`):
                For contrast: whether the cosines are divided by the temperature, as a softmax expects.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `True`):
                Whether position embeddings are interpolated to the size of the images.
            kwargs:
                `output_hidden_states` and `output_attentions`.

        Returns:
            [`Blip2ForImageTextRetrievalOutput`].

        Raises:
            TypeError: if an argument is not known.
            ValueError: if not exactly one of `pixel_values` and `image_embeds` is given, there is no text or no image,
                a text is longer than the Q-Former's positions, or an option is given that has no effect.
        """
        check_options(kwargs, "pixel_values or image_embeds, input_ids, attention_mask and options of scores")
        check_one_image_input(pixel_values, image_embeds)
        if input_ids is None or len(input_ids) == 0:
            raise ValueError("There are no texts. Give input_ids, or call get_image_features for images alone.")
        if len(image_embeds if pixel_values is None else pixel_values) == 0:
            raise ValueError("There are no images. Give some, or call get_text_features for texts alone.")
        if use_temperature and use_image_text_matching_head:
            raise ValueError("use_temperature=True is for contrast: matching has no temperature. Leave it out.")
        if all_pairs is not None and not use_image_text_matching_head:
            raise ValueError("all_pairs is for matching: contrast always compares all pairs. Leave it out.")
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
            raise ValueError(
                f"all_pairs=False with {num_images} images and {num_texts} texts: one text an image was expected."
            )
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


__all__ = ["Blip2ForImageTextRetrieval", "Blip2ForImageTextRetrievalOutput"]
