"""BLIP-2: a vision tower and a language model, both frozen, joined by a Q-Former."""

import copy
import inspect
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, Seq2SeqLMOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.models.blip_2.modeling_blip_2 import BaseModelOutputWithVisionQformerOutputs
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging

from ._compat import CACHE_NAME, CACHE_NAMES, cached_length
from .backbones import image_token_id, language_model_class, load_language_model, load_whole
from .configuration_blip2 import Blip2Config
from .frozen import checkpoint_in_eval_mode, is_frozen, keep_weights
from .generation_blip2 import Blip2GenerationMixin, generating_part
from .image_text_merging import Blip2ImageTextMergingMixin
from .losses import language_modeling_loss
from .modeling_base import Blip2Model, Blip2PreTrainedModel, image_side_from_parts
from .modeling_qformer import Blip2TextEmbeddings
from .scoring_blip2 import Blip2ScoringMixin
from .text_inputs import count_images, decoder_inputs, text_positions


logger = logging.get_logger(__name__)

_STAGE1 = "A BLIP-2, with its tower, its queries and its Q-Former,"


@dataclass
class Blip2ForConditionalGenerationModelOutput(Seq2SeqLMOutput):
    r"""
    Output of [`Blip2ForConditionalGeneration`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned when `labels` is given):
            Language-modelling loss: the sum over labels, divided by `num_items_in_batch` or by their number.
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`):
            Scores of the next token, at the positions of `input_ids` (or of `decoder_input_ids`).
        cache (`Cache`, *optional*):
            Keys and values of the language model; `past_key_values` in transformers before 5.24.
        hidden_states, attentions, decoder_hidden_states, decoder_attentions, cross_attentions (`tuple`, *optional*):
            Those of the language model.
        encoder_last_hidden_state (`torch.Tensor`, *optional*):
            Output of the language model's encoder, if it has one.
        vision_outputs (`ModelOutput`, *optional*):
            Output of the vision tower, if it has run.
        qformer_outputs (`ModelOutput`, *optional*):
            Output of the Q-Former, if it has run.
        language_model_outputs (`ModelOutput`, *optional*):
            All that the language model returned.
    """

    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    vision_outputs: ModelOutput | None = None
    qformer_outputs: ModelOutput | None = None
    language_model_outputs: ModelOutput | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in super().to_tuple())


class Blip2HfForConditionalGeneration(
    Blip2PreTrainedModel, Blip2ImageTextMergingMixin, Blip2ScoringMixin, Blip2GenerationMixin
):
    r"""
    BLIP-2 for captioning, visual question answering and stage-2 training (section 3.3): the Q-Former's output queries,
    projected to the language model's width, stand in the text as soft visual prompts.

    Images stand where `input_ids` have `config.image_token_index` (`num_query_tokens` of them for each image). Without
    such placeholders, images are put in front of the text, one image for each sample.

    The vision tower and the language model are frozen: they are in eval mode, and the tower runs without autograd.

    Args:
        config ([`Blip2Config`]):
            Its configuration, with a `text_config`.
        vision_model ([`~transformers.PreTrainedModel`], *optional*):
            The tower; made from the configuration, with random weights, if it is not given.
        language_model ([`~transformers.PreTrainedModel`], *optional*):
            The language model; likewise.

    Example:

    ```python
    >>> from PIL import Image
    >>> from blip2_hf import Blip2ForConditionalGeneration, Blip2Processor

    >>> processor = Blip2Processor.from_pretrained("Salesforce/blip2-opt-2.7b")
    >>> model = Blip2ForConditionalGeneration.from_pretrained("Salesforce/blip2-opt-2.7b", device_map="auto")
    >>> inputs = processor(images=Image.open("cats.jpg"), text="a photo of", return_tensors="pt").to(model.device)
    >>> processor.post_process_image_text_to_text(model.generate(**inputs), input_ids=inputs["input_ids"])
    ```"""

    _can_compile_fullgraph = True
    _keep_in_fp32_modules = [*Blip2PreTrainedModel._keep_in_fp32_modules, "language_projection"]

    def __init__(
        self,
        config: Blip2Config,
        vision_model: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        if config.text_config is None:
            raise ValueError(
                "Blip2ForConditionalGeneration needs a language model: give Blip2Config a `text_config` "
                "(a stage-1 configuration has none; see `from_pretrained_parts`)."
            )
        super().__init__(config)
        self._build_image_side(config, vision_model)
        if language_model is not None:
            config.text_config = language_model.config
            keep_weights(language_model)
        else:
            language_model = language_model_class(config.text_config).from_config(config.text_config)
        # Width of the embeddings, which in some models (OPT-350m) are narrower than the hidden states
        embeddings = language_model.get_input_embeddings().weight
        # Under ZeRO-3 the weight itself is empty
        width: int = tuple(getattr(embeddings, "ds_shape", embeddings.shape))[1]
        self.language_projection = nn.Linear(config.qformer_config.hidden_size, width)
        self.language_model = language_model
        # PEFT asks the whole model whether its layers are quantised
        for name in ("is_loaded_in_8bit", "is_loaded_in_4bit"):
            if getattr(language_model, name, False):
                setattr(self, name, True)
        self.generation_config = copy.deepcopy(language_model.generation_config)
        # Of the model inside wrappers such as PEFT's, whose forward names no arguments
        accepted = inspect.signature(generating_part(language_model).forward).parameters
        self.accepts_position_ids, self.accepts_logits_to_keep = (
            name in accepted for name in ("position_ids", "logits_to_keep")
        )
        self.post_init()
        self.freeze()

    def check_that_it_can_be_saved(self):
        """
        Refuse a model that would not load again once it is saved.

        Raises:
            ValueError: if the language model was quantised on its own, or a 4-bit model has run on a CPU.
        """
        super().check_that_it_can_be_saved()
        # transformers sets this on models that it has quantised
        own, of_language_model = (getattr(part, "hf_quantizer", None) for part in (self, self.language_model))
        if own is None and of_language_model is not None:
            raise ValueError(
                "The language model was quantised on its own, and would not load again as a part of this model. Train "
                "and save adapters (PEFT, the presets lora_...), or give the language model in bfloat16."
            )

    def freeze(self) -> "Blip2ForConditionalGeneration":
        self.language_model.requires_grad_(False)
        super().freeze()
        return self

    def freeze_unused_parameters(self):
        super().freeze_unused_parameters()
        if self.config.qformer_config.use_qformer_text_input:
            last = self.qformer.encoder.layer[-1]
            last.intermediate.requires_grad_(False)
            last.output.requires_grad_(False)

    def _freezable_parts(self) -> list[nn.Module]:
        return [*super()._freezable_parts(), self.language_model]

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.language_model.set_output_embeddings(new_embeddings)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        if modality is None and self.config.is_encoder_decoder:
            return self.language_model.get_encoder()
        return self.vision_model if modality == "image" else self

    @property
    def base_model(self) -> "Blip2ForConditionalGeneration | _WithoutHead":
        """
        The model without the language model's head: called with the arguments of `forward`, it returns an output with
        `last_hidden_state` of shape `(batch_size, sequence_length, hidden_size)`, from which TRL's trainers compute
        log-probabilities. An encoder-decoder, which TRL does not train, is returned as it is.
        """
        return self if self.config.is_encoder_decoder else _WithoutHead(self)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = True,
        **kwargs,
    ) -> tuple | BaseModelOutputWithVisionQformerOutputs:
        r"""
        Compute the Q-Former's output queries in the language model's space. `forward` and `generate` take them as
        `image_features`, for any number of questions about an image.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`, *optional*):
                Images.
            image_embeds (`torch.Tensor` of shape `(num_images, features, vision hidden_size)`, *optional*):
                In place of `pixel_values`: what [`~Blip2PreTrainedModel.get_image_embeds`] returned.
            qformer_input_ids (`torch.Tensor` of shape `(num_images, text_length)`, *optional*):
                An instruction for the Q-Former, if it reads text (`use_qformer_text_input`).
            qformer_attention_mask (`torch.Tensor` of shape `(num_images, text_length)`, *optional*):
                0 at its padding.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `True`):
                Whether position embeddings are interpolated to the size of the images.

        Returns:
            `BaseModelOutputWithVisionQformerOutputs`: `pooler_output` of shape
            `(num_images, num_query_tokens, language model hidden_size)` is the input of the language model;
            `last_hidden_state` is the tower's output; `vision_outputs` and `qformer_outputs` are the parts'.

        Raises:
            ValueError: if not exactly one of `pixel_values` and `image_embeds` is given, or there is an instruction
                but the Q-Former reads no text.
        """
        image_embeds, vision_outputs, qformer_outputs = self.encode_image(
            pixel_values,
            image_embeds,
            qformer_input_ids,
            qformer_attention_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
            **kwargs,
        )
        return BaseModelOutputWithVisionQformerOutputs(
            last_hidden_state=image_embeds,
            pooler_output=self._project_queries(qformer_outputs.last_hidden_state),
            hidden_states=None if vision_outputs is None else vision_outputs.hidden_states,
            attentions=None if vision_outputs is None else vision_outputs.attentions,
            vision_outputs=vision_outputs,
            qformer_outputs=qformer_outputs,
        )

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Compute the language model's hidden states of texts, or those of its encoder if it has one, as `Blip2Model` of
        transformers does.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, text_length)`):
                Texts without placeholders of images.
            attention_mask (`torch.Tensor` of shape `(batch_size, text_length)`, *optional*):
                0 at padding.
            kwargs:
                Arguments of the language model, such as `output_hidden_states`.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: `last_hidden_state` of shape
            `(batch_size, text_length, text hidden_size)`, `hidden_states` and `attentions`.
        """
        if (self.config.image_token_index or 0) >= self.get_input_embeddings().num_embeddings:
            # Placeholders that have no embedding
            self._check_text_without_image(input_ids)
        language_model = self.language_model
        part = language_model.get_encoder() if self.config.is_encoder_decoder else language_model.base_model
        outputs = part(input_ids=input_ids, attention_mask=attention_mask, **{**kwargs, "return_dict": True})
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _project_queries(self, queries: torch.Tensor) -> torch.Tensor:
        weight = self.language_projection.weight
        return self.language_projection(queries.to(weight.dtype) if weight.is_floating_point() else queries)

    def _images_given(self, image_features, pixel_values, image_embeds) -> tuple[int, int, torch.device] | None:
        """Return the number of images, the number of features of each in the text, and their device, if any."""
        given = [x for x in (image_features, pixel_values, image_embeds) if x is not None]
        if len(given) > 1:
            raise ValueError("Give only one of pixel_values, image_embeds and image_features.")
        if not given:
            return None
        if image_features is None:
            return count_images(pixel_values, image_embeds), self.config.num_query_tokens, given[0].device
        if image_features.dim() < 3:
            raise ValueError(
                f"image_features of shape {tuple(image_features.shape)} were given; (num_images, num_query_tokens, "
                "hidden_size) was expected, as get_image_features(...).pooler_output has."
            )
        return image_features.shape[:-2].numel(), image_features.shape[-2], image_features.device

    def _image_features(self, image_features, pixel_values, image_embeds, **kwargs):
        """Return `(image_features, outputs of the parts)`, given or computed; `(None, None)` without an image."""
        if self._images_given(image_features, pixel_values, image_embeds) is None:
            return None, None
        if image_features is not None:
            return image_features.flatten(0, -3), None
        self._check_instruction(kwargs.get("qformer_input_ids"))
        outputs = self.get_image_features(pixel_values=pixel_values, image_embeds=image_embeds, **kwargs)
        return outputs.pooler_output, outputs

    def _check_instruction(self, qformer_input_ids: torch.Tensor | None):
        reads_text = self.config.qformer_config.use_qformer_text_input
        if reads_text and qformer_input_ids is None and not torch.compiler.is_compiling():
            logger.warning_once(
                "The Q-Former of this model reads the question too, but qformer_input_ids were not given. "
                "Blip2Processor(..., qformer_tokenizer=AutoTokenizer.from_pretrained(...)) makes them."
            )

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        encoder_outputs: ModelOutput | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = True,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | Blip2ForConditionalGenerationModelOutput:
        r"""
        Compute scores of the next token and, with labels, the loss.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)` or \
`(batch_size, images_each, channels, height, width)`, *optional*):
                Images, in the order of their placeholders.
            input_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                Text, with or without placeholders; for an encoder-decoder, that of its encoder.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                0 at padding, which may stand on either side.
            image_embeds (`torch.Tensor` of shape `(num_images, features, vision hidden_size)`, *optional*):
                In place of `pixel_values`: the tower's output (see [`~Blip2PreTrainedModel.get_image_embeds`]).
            image_features (`torch.Tensor` of shape `(num_images, num_query_tokens, hidden_size)`, *optional*):
                In place of both: the projected queries (see [`~Blip2ForConditionalGeneration.get_image_features`]).
            qformer_input_ids, qformer_attention_mask (`torch.Tensor` of shape `(num_images, text_length)`, \
*optional*):
                An instruction for the Q-Former, if it reads text.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embedded text, in place of `input_ids`. Images stand where it equals the embedding of `<image>`, or
                in front of it; without an image, it may hold image features already.
            position_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions; made from `attention_mask` if they are not given.
            encoder_outputs (`ModelOutput`, *optional*):
                Outputs of the language model's encoder, in place of its inputs.
            decoder_input_ids, decoder_attention_mask (`torch.Tensor` of shape `(batch_size, target_length)`, \
*optional*):
                For an encoder-decoder; made from `labels` if they are not given.
            labels (`torch.Tensor` of shape `(batch_size, sequence_length)` or `(batch_size, target_length)`, \
*optional*):
                Token ids to learn; -100 is ignored. For a decoder-only language model, of the shape of `input_ids` or
                of the text without the placeholders before it. For an encoder-decoder, the target.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `True`):
                Whether position embeddings are interpolated to the size of the images.
            skip_logits (`bool`, *optional*):
                Whether to compute scores at labels alone, for the loss, and return `None` as `logits`. Defaults to
                `True` in training steps of `Trainer`, which passes `num_items_in_batch`, and to `False` otherwise.
            kwargs:
                Passed to the language model.

        Returns:
            [`Blip2ForConditionalGenerationModelOutput`].

        Raises:
            ValueError: if images and placeholders do not match, or there are labels but no text.
        """
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        num_items_in_batch, shift_labels = (kwargs.pop(name, None) for name in ("num_items_in_batch", "shift_labels"))
        # Values of the text are read before the tower runs, because reading waits for all that a GPU has to do
        images, past_length = self._images_given(image_features, pixel_values, image_embeds), cached_length(cache) or 0
        text, labels = self._place_text(images, input_ids, inputs_embeds, attention_mask, labels, past_length)
        self._check_padding(text["attention_mask"])
        if skip_logits is None:
            skip_logits = self.training and num_items_in_batch is not None
        if labels is not None:
            shift_labels, of_head = self._shift_labels(labels, shift_labels, skip_logits)
            # The cache is for generation
            kwargs = {"use_cache": False, **kwargs, **of_head}
        image_features, image_outputs = self._image_features(
            image_features,
            pixel_values,
            image_embeds,
            qformer_input_ids=qformer_input_ids,
            qformer_attention_mask=qformer_attention_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        if image_features is not None:
            text = self._fill_in(text, image_features) | {"input_ids": None}
        text = {name: text[name] for name in ("input_ids", "inputs_embeds", "attention_mask")}
        if self.config.is_encoder_decoder:
            if labels is not None and decoder_input_ids is None:
                decoder_input_ids = decoder_inputs(self.language_model, labels)
            kwargs |= {
                "encoder_outputs": encoder_outputs,
                "decoder_input_ids": decoder_input_ids,
                "decoder_attention_mask": decoder_attention_mask,
            }
        elif self.accepts_position_ids:
            kwargs["position_ids"] = text_positions(**text) if position_ids is None else position_ids
        outputs = self.language_model(**text, **kwargs, return_dict=True)
        loss = None
        if labels is not None:
            logits = outputs.logits[:, -shift_labels.shape[1] :]
            loss = language_modeling_loss(logits, shift_labels, num_items_in_batch)
            if skip_logits:
                outputs["logits"] = None
        return Blip2ForConditionalGenerationModelOutput(
            loss=loss,
            **{name: outputs.get(name) for name in LANGUAGE_MODEL_OUTPUTS},
            vision_outputs=None if image_outputs is None else image_outputs.vision_outputs,
            qformer_outputs=None if image_outputs is None else image_outputs.qformer_outputs,
            language_model_outputs=outputs,
        )

    def _place_text(
        self, images, input_ids, inputs_embeds, attention_mask, labels, past_length: int
    ) -> tuple[dict[str, Any], torch.Tensor | None]:
        """Return the text, with places for the images if there are any, and labels of the same shape."""
        labels = self._match_labels(labels, input_ids)
        if labels is not None and input_ids is None and inputs_embeds is not None:
            self._check_labels_of_embeddings(labels, inputs_embeds)
        if images is None:
            if input_ids is not None:
                self._check_text_without_image(input_ids)
            return {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}, labels
        if input_ids is None and inputs_embeds is None:
            if labels is not None and not self.config.is_encoder_decoder:
                raise ValueError(
                    f"labels of shape {tuple(labels.shape)} were given without input_ids, from which a decoder-only "
                    "language model learns. Blip2Processor(images, text_target=...) makes both."
                )
            input_ids = self._start_tokens(*images)
        num_images, image_length, _ = images
        text = self._place_images(
            num_images, image_length, input_ids, attention_mask, labels, inputs_embeds, past_length
        )
        return text, text["labels"]

    def _shift_labels(
        self, labels: torch.Tensor, shift_labels: torch.Tensor | None, skip_logits: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Return the label that each position predicts. With `skip_logits`, only positions at which some row has a label
        are kept, and the language model is told to run its head, as wide as the vocabulary, at these alone.
        """
        if shift_labels is None:
            shift_labels = labels if self.config.is_encoder_decoder else _shift(labels)
        if not skip_logits or not self.accepts_logits_to_keep or torch.compiler.is_compiling():
            return shift_labels, {}
        positions = shift_labels.ne(-100).any(dim=0).nonzero().squeeze(1)
        # Counted from the end, because images and a cache may come first
        from_end = positions - shift_labels.shape[1]
        if any(weight.device != shift_labels.device for weight in self.language_model.parameters()):
            # The hidden states may be on another device than the labels, and an index on the CPU serves any
            from_end = from_end.cpu()
        return shift_labels[:, positions], {"logits_to_keep": from_end}

    def attach_text_networks(
        self, stage1: "str | os.PathLike | Blip2PreTrainedModel"
    ) -> "Blip2ForConditionalGeneration":
        r"""
        Let the Q-Former read the question too, as in the paper's fine-tuning for VQA (appendix). The word embeddings
        and the feed-forward networks for text, which stage 2 does without, are copied from stage 1. They are trained
        if the Q-Former is. Everything else stays.

        Args:
            stage1 (`str`, `os.PathLike` or [`Blip2ForPreTraining`]):
                The stage-1 model from which this one was made.

        Returns:
            The model.

        Raises:
            ValueError: if `stage1` has no such networks, is of another shape, or lacks weights.
        """
        source: Any = stage1 if isinstance(stage1, PreTrainedModel) else load_whole(Blip2Model, stage1, _STAGE1)
        given, own = source.config.qformer_config, self.config.qformer_config
        if not given.use_qformer_text_input:
            raise ValueError(f"{stage1} has no feed-forward networks for text. Give the checkpoint of stage 1.")
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "cross_attention_frequency")
        if differing := [name for name in sizes if getattr(given, name) != getattr(own, name)]:
            raise ValueError(
                f"The Q-Former of stage1 differs in {', '.join(differing)}: give the stage-1 model of this one."
            )
        own.use_qformer_text_input, own.vocab_size = True, given.vocab_size
        own.max_position_embeddings = given.max_position_embeddings
        for layer, trained in zip(self.qformer.encoder.layer, source.qformer.encoder.layer, strict=True):
            layer.attach_text_network(trained)
        like = next(self.qformer.parameters())
        self.embeddings = Blip2TextEmbeddings(own)
        self.embeddings.load_state_dict(source.embeddings.state_dict())
        self.embeddings.to(like).train(self.training).requires_grad_(like.requires_grad)
        # In the order of a model that is made with them, because an optimizer's states go by the order of weights
        for name in ("qformer", "language_projection", "language_model"):
            self._modules[name] = self._modules.pop(name)
        self.freeze_unused_parameters()
        return self

    def train(self, mode: bool = True):
        super().train(mode)
        if mode and is_frozen(self.language_model):
            checkpoint_in_eval_mode(self.language_model)
        return self

    @classmethod
    def from_pretrained_parts(
        cls,
        stage1: "str | os.PathLike | Blip2PreTrainedModel | None" = None,
        language_model: "str | os.PathLike | PreTrainedModel | None" = None,
        *,
        vision_model: "str | os.PathLike | PreTrainedModel | None" = None,
        text_encoder: "str | os.PathLike | PreTrainedModel | None" = None,
        image_token_index: int | None = None,
        vision_feature_layer: int | None = None,
        num_query_tokens: int | None = None,
        instruction_aware: bool | None = None,
        query_initialization: str | None = None,
        language_model_kwargs: dict[str, Any] | None = None,
        **qformer_kwargs,
    ) -> "Blip2ForConditionalGeneration":
        r"""
        Join a language model to a trained Q-Former and its tower, or to a tower and a Q-Former that starts from BERT.

        Args:
            stage1 (`str`, `os.PathLike` or a BLIP-2 model, *optional*):
                A BLIP-2 whose tower, queries and Q-Former are taken: a [`Blip2ForPreTraining`], or a
                [`Blip2ForConditionalGeneration`] whose Q-Former is to be aligned to another language model (see
                [`~training.train_only`]). Its tower is shared, not copied.
            language_model (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`]):
                Any causal or sequence-to-sequence language model.
            vision_model (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`], *optional*):
                Without `stage1`, or if it has no tower: any tower of `AutoModel`, or a model that has one in it
                (CLIP, SigLIP, LLaVA, BLIP-2).
            text_encoder (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`], *optional*):
                Without `stage1`: any BERT, from which the Q-Former starts.
            image_token_index (`int`, *optional*):
                Token id of `<image>`. If `language_model` is a folder or an id, it defaults to the id that
                [`Blip2Processor`] gives `<image>` in the language model's tokenizer.
            vision_feature_layer (`int`, *optional*):
                Without `stage1`: index into the tower's `hidden_states`.
            num_query_tokens (`int`, *optional*):
                Without `stage1`: number of queries, 32 if it is not given.
            instruction_aware (`bool`, *optional*):
                Whether the Q-Former reads the question or instruction, next to the queries (appendix; InstructBLIP),
                with the feed-forward networks for text of stage 1 (or of BERT). Defaults to `True` if `stage1` is a
                [`Blip2ForConditionalGeneration`] whose Q-Former does.
            query_initialization (`str`, *optional*):
                Without `stage1`: how the queries start, `"words"` (the default) or `"normal"`, as in
                [`Blip2ForPreTraining.from_encoders_pretrained`].
            language_model_kwargs (`dict`, *optional*):
                Arguments for loading the language model: `dtype`, `quantization_config` (8 or 4 bits), `device_map`.
            qformer_kwargs (`dict`):
                Without `stage1`: fields of [`Blip2QFormerConfig`], such as `cross_attention_frequency`.

        Returns:
            [`Blip2ForConditionalGeneration`]: the tower and the language model frozen, all in eval mode.

        Raises:
            ValueError: if the parts do not make a whole, or one lacks weights.

        Example:

        ```python
        >>> model = Blip2ForConditionalGeneration.from_pretrained_parts(
        ...     vision_model="facebook/dinov2-small",
        ...     text_encoder="google-bert/bert-base-uncased",
        ...     language_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        ... )
        ```"""
        if language_model is None:
            raise ValueError("from_pretrained_parts needs a language_model.")
        if (stage1 is None) == (text_encoder is None) or (stage1 is None and vision_model is None):
            raise ValueError("Give either stage1, or vision_model and text_encoder.")
        own: dict[str, Any] = {
            "vision_feature_layer": vision_feature_layer,
            "num_query_tokens": num_query_tokens,
            "query_initialization": query_initialization,
            **qformer_kwargs,
        }
        if stage1 is not None and any(value is not None for value in own.values()):
            given = sorted(name for name, value in own.items() if value is not None)
            raise ValueError(f"{', '.join(given)}: stage1 has its own. Leave them out, or leave out stage1.")
        if image_token_index is None and isinstance(language_model, (str, os.PathLike)):
            image_token_index = image_token_id(AutoTokenizer.from_pretrained(language_model))
        language_model = load_language_model(language_model, **(language_model_kwargs or {}))
        if stage1 is None:
            if instruction_aware is not None:
                qformer_kwargs["use_qformer_text_input"] = instruction_aware
            image_side = image_side_from_parts(
                vision_model,
                text_encoder,
                vision_feature_layer,
                num_query_tokens or 32,
                query_initialization=query_initialization or "words",
                **qformer_kwargs,
            )
        else:
            image_side = stage1 if isinstance(stage1, PreTrainedModel) else load_whole(Blip2Model, stage1, _STAGE1)
            _attach_tower_if_missing(image_side, vision_model)
        # A copy, because a configuration sets the attention implementation of the parts that it is made of
        source = copy.deepcopy(image_side.config)
        config = Blip2Config(
            vision_config=source.vision_config,
            qformer_config=source.qformer_config,
            text_config=copy.deepcopy(language_model.config),
            num_query_tokens=source.num_query_tokens,
            image_text_hidden_size=source.image_text_hidden_size,
            image_token_index=image_token_index,
            vision_feature_layer=source.vision_feature_layer,
            vision_position_embedding=source.vision_position_embedding,
        )
        if stage1 is not None:
            config.qformer_config.use_qformer_text_input = _reads_instructions(source, instruction_aware)
        model = cls(config, vision_model=image_side.vision_model, language_model=language_model)
        for name, part in model.named_children():
            if name in ("query_tokens", "qformer", "embeddings"):
                trained = getattr(image_side, name)
                # Not strict, because without instructions the networks for text of stage 1 are left out
                part.to(next(trained.parameters())).load_state_dict(trained.state_dict(), strict=False)
        return model.freeze().eval()


Blip2ForConditionalGeneration = Blip2HfForConditionalGeneration


class _WithoutHead:
    """A view of a model that shares its parts, but for the head of its language model. Attributes are the model's."""

    def __init__(self, model: Blip2HfForConditionalGeneration):
        self._model = model

    def __call__(self, *args, **kwargs) -> ModelOutput:
        body = copy.copy(self._model)
        headless = generating_part(body.language_model).base_model
        body._modules = body._modules | {"language_model": headless}
        # Not that of the instance, which TRL replaces by one that calls this
        outputs = type(body).forward(body, *args, **kwargs).language_model_outputs
        ids = kwargs.get("input_ids")
        if ids is not None:
            # Without those of images that were put in front, as labels are
            outputs["last_hidden_state"] = outputs.last_hidden_state[:, -ids.shape[1] :]
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


LANGUAGE_MODEL_OUTPUTS = (
    "logits",
    CACHE_NAME,
    "hidden_states",
    "attentions",
    "decoder_hidden_states",
    "decoder_attentions",
    "cross_attentions",
    "encoder_last_hidden_state",
    "encoder_hidden_states",
    "encoder_attentions",
)


def _shift(labels: torch.Tensor) -> torch.Tensor:
    """Return the label that each position predicts, which is that of the next one."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


def _reads_instructions(source: Blip2Config, instruction_aware: bool | None) -> bool:
    """Return whether the Q-Former is to read instructions, with the feed-forward networks for text that it has."""
    has_text_networks = source.qformer_config.use_qformer_text_input
    if instruction_aware is None:
        # The Q-Former of stage 1, which has no language model, reads captions
        return has_text_networks and source.text_config is not None
    if instruction_aware and not has_text_networks:
        raise ValueError(
            "instruction_aware=True, but the Q-Former of stage1 reads no text: give the checkpoint of stage 1 itself, "
            "which has the feed-forward networks for text."
        )
    return instruction_aware


def _attach_tower_if_missing(stage1: Blip2PreTrainedModel, vision_model):
    if stage1.config.has_vision_tower and vision_model is not None:
        raise ValueError("vision_model was given, but stage1 has its own tower: leave vision_model out.")
    if not stage1.config.has_vision_tower:
        if vision_model is None:
            raise ValueError("stage1 was trained from stored features and has no tower: give its vision_model.")
        stage1.attach_vision_tower(vision_model)


__all__ = ["Blip2ForConditionalGeneration", "Blip2ForConditionalGenerationModelOutput"]
