"""BLIP-2: a vision tower and a language model, both frozen, joined by a Q-Former."""

import copy
import inspect
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, Seq2SeqLMOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.models.blip_2.modeling_blip_2 import BaseModelOutputWithVisionQformerOutputs, Blip2TextEmbeddings
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .cache_name import CACHE_NAME, CACHE_NAMES
from .configuration_blip2 import Blip2Config, TransformersBlip2Config, tower_hidden_size
from .frozen import checkpoint_in_eval_mode, is_frozen
from .generation_blip2 import Blip2GenerationMixin
from .label_scores import can_score_labels_alone, loss_at_labels, states_at_labels
from .loss_by_rows import can_run_by_rows, loss_by_rows
from .losses import language_modeling_loss, mean_over_labels
from .modeling_qformer import (
    Blip2ImageStates,
    Blip2QFormerModel,
    copy_bert_weights,
    load_bert,
    qformer_config_from_bert,
)
from .modeling_vision import build_vision_model
from .parts import (
    image_token_id,
    language_model_class,
    load_language_model,
    load_tower,
    load_tower_config,
    measure_width,
)
from .sharing import SharedOnHub


@dataclass
class Blip2ForConditionalGenerationModelOutput(Seq2SeqLMOutput):
    r"""
    Output of [`Blip2ForConditionalGeneration`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned when `labels` is given):
            Language-modelling loss: the mean over labels, or their sum over `num_items_in_batch`.
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`):
            Scores of the next token, at the positions of `input_ids` (or of `decoder_input_ids`).
        cache (`Cache`, *optional*):
            Keys and values of the language model; `past_key_values` in transformers before 5.24.
        hidden_states, attentions, decoder_hidden_states, decoder_attentions, cross_attentions (`tuple`, *optional*):
            Those of the language model.
        encoder_last_hidden_state (`torch.Tensor`, *optional*):
            Output of the language model's encoder, where it has one.
        vision_outputs (`ModelOutput`, *optional*):
            Output of the vision tower, where it has run.
        qformer_outputs (`ModelOutput`, *optional*):
            Output of the Q-Former, where it has run.
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


class Blip2QueryTokens(nn.Module):
    """The learned queries: a module of their own, so that PEFT and FSDP can hold them."""

    def __init__(self, config: Blip2Config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, config.num_query_tokens, config.qformer_config.hidden_size))

    def forward(self, batch_size: int) -> torch.Tensor:
        return self.weight.expand(batch_size, -1, -1)


class Blip2PreTrainedModel(SharedOnHub, PreTrainedModel):
    """What all BLIP-2 models share: initialisation, frozen parts, transformers' own format, and sharing on the Hub."""

    config: Blip2Config
    config_class = Blip2Config
    base_model_prefix = ""
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = list(CACHE_NAMES)
    # Kept in float32 when the model is loaded in float16, and out of quantisation: it is what is trained
    _keep_in_fp32_modules = ["query_tokens", "qformer"]
    # What transformers' own BLIP-2 has no place for, and the class of its that takes the rest, if the names differ
    _parts_not_in_transformers: tuple[str, ...] = ()
    _class_in_transformers: str | None = None

    def _build_image_side(self, config: Blip2Config, vision_model: PreTrainedModel | None = None):
        """The tower, the queries and the Q-Former, under the names that transformers' BLIP-2 gives them."""
        qformer_config = config.qformer_config
        if vision_model is not None:
            config.vision_config = vision_model.config
        self.vision_model = build_vision_model(config, vision_model)
        self.query_tokens = Blip2QueryTokens(config)
        if qformer_config.use_qformer_text_input:
            self.embeddings = Blip2TextEmbeddings(qformer_config)
        self.qformer = Blip2QFormerModel._from_config(qformer_config)

    @classmethod
    def is_custom_code(cls) -> bool:
        # For code that does not initialise through transformers' functions; it would leave out part of T5's
        return cls.is_remote_code()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, Blip2QueryTokens):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, Blip2TextEmbeddings):
            init.copy_(module.position_ids, torch.arange(module.position_ids.shape[-1]).expand(1, -1))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        r"""
        Loads a checkpoint of this library or of transformers' own BLIP-2 (model_type `blip-2`), and freezes what
        [`~Blip2PreTrainedModel.freeze`] names. Arguments are those of
        [`~transformers.PreTrainedModel.from_pretrained`].
        """
        if isinstance(config, TransformersBlip2Config):
            config = Blip2Config.from_transformers(config)
        # transformers' BLIP-2 holds the queries as a bare parameter
        key_mapping = {r"^query_tokens$": "query_tokens.weight"} | (kwargs.pop("key_mapping", None) or {})
        loaded = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, config=config, key_mapping=key_mapping, **kwargs
        )
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze()
        return loaded

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args, transformers_compatible: bool = False, **kwargs
    ):
        r"""
        Saves the model, as [`~transformers.PreTrainedModel.save_pretrained`] does.

        Args:
            save_directory (`str` or `os.PathLike`):
                The folder.
            transformers_compatible (`bool`, *optional*, defaults to `False`):
                Whether to write a checkpoint that plain transformers loads as its own BLIP-2.
            args, kwargs:
                Those of [`~transformers.PreTrainedModel.save_pretrained`], and `with_code` (`bool`, defaults to
                `False`): whether to put the code next to the weights, so that `AutoModel...` and `pipeline` load the
                folder with `trust_remote_code=True` where this package is not installed, and a model card if there
                is none.

        Raises:
            ValueError: if `transformers_compatible` and the tower is not a [`Blip2VisionModel`] of EVA-CLIP's shape,
                or with `with_code` or `push_to_hub`.
        """
        kwargs.setdefault("save_original_format", False)
        if not transformers_compatible:
            return super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.pop("with_code", None):
            raise ValueError("with_code: what plain transformers loads (transformers_compatible) needs no code.")
        if kwargs.pop("push_to_hub", None):
            raise ValueError(
                "push_to_hub does not go with transformers_compatible. Save without it, then upload the folder: "
                "huggingface_hub.upload_folder(repo_id=..., folder_path=...)."
            )
        kwargs["with_code"] = False
        config = self.config
        state_dict = dict(kwargs.pop("state_dict", None) or self.state_dict())
        state_dict["query_tokens"] = state_dict.pop("query_tokens.weight")
        for name in [name for name in state_dict if name.partition(".")[0] in self._parts_not_in_transformers]:
            del state_dict[name]
        try:
            self.config = config.to_transformers()
            super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
            # The name of this class, which super() wrote, says nothing there
            name = self._class_in_transformers or type(self).__name__.replace("Blip2Hf", "Blip2")
            self.config.architectures = [name]
            self.config.save_pretrained(save_directory)
        finally:
            self.config = config

    def attach_vision_tower(self, vision_model: str | os.PathLike | PreTrainedModel) -> "Blip2PreTrainedModel":
        r"""
        Puts a tower into a model that was made without (`has_vision_tower=False`): one that learned from the tower's
        stored output. The LayerNorm after the tower stays.

        Args:
            vision_model (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`]):
                The tower that the output came from.

        Returns:
            The model.

        Raises:
            ValueError: if the tower has another shape than that which the model was made for.
        """
        tower = load_tower(vision_model)
        expected, given = self.config.vision_config, tower.config
        names = ("model_type", "hidden_size", "hidden_sizes", "num_hidden_layers", "patch_size")
        differing = [name for name in names if getattr(expected, name, None) != getattr(given, name, None)]
        if differing:
            wanted, found = ({name: getattr(c, name, None) for name in differing} for c in (expected, given))
            raise ValueError(f"This model was made for a tower of {wanted}, but the one given has {found}.")
        layernorm = self.vision_model.post_layernorm
        self.config.has_vision_tower = True
        self.vision_model = build_vision_model(self.config, tower.to(layernorm.weight.device))
        self.vision_model.post_layernorm = layernorm
        return self.freeze()

    def freeze(self) -> "Blip2PreTrainedModel":
        """
        Freezes the vision tower, except the LayerNorm after it, and the language model, as in both of the paper's
        stages. Undone by `requires_grad_(True)` on the part that is to be trained.

        Returns:
            The model.
        """
        self.vision_model.requires_grad_(False)
        self.vision_model.post_layernorm.requires_grad_(True)
        self.freeze_what_is_not_read()
        for part in self.frozen_parts():
            part.eval()
        return self

    def freeze_what_is_not_read(self):
        """
        Freezes what has no say in the loss, and for whose gradient `DistributedDataParallel` would wait: parts of a
        tower that its features do not come from (blocks behind `vision_feature_layer`, poolers, mask tokens), and what
        the Q-Former's last layer makes of an instruction.
        """
        trained = [p for part in self._tower_parts() for p in part.parameters() if p.requires_grad]
        if not trained:
            return
        config = self.config.vision_config
        size, training = getattr(config, "image_size", None) or 224, self.vision_model.training
        height, width = (size, size) if isinstance(size, int) else size
        picture = trained[0].new_zeros(1, getattr(config, "num_channels", 3), height, width)
        self.vision_model.eval()
        with torch.enable_grad():
            features = self.get_image_embeds(picture)
            gradients = torch.autograd.grad(features.float().sum(), trained, allow_unused=True)
        self.vision_model.train(training)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)

    def frozen_parts(self) -> list[nn.Module]:
        """The parts without a parameter that is trained: they stay in eval mode."""
        return [part for part in self._freezable_parts() if is_frozen(part)]

    def _freezable_parts(self) -> list[nn.Module]:
        return [*self._tower_parts(), self.qformer]

    def _tower_parts(self) -> list[nn.Module]:
        return [child for name, child in self.vision_model.named_children() if name != "post_layernorm"]

    def train(self, mode: bool = True):
        super().train(mode)
        if mode:
            for part in self.frozen_parts():
                part.eval()
        return self

    def get_image_embeds(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = True, **kwargs
    ) -> torch.Tensor:
        r"""
        The vision tower's output, before the LayerNorm that follows it: what can be computed once and stored, while
        the tower is frozen, and given to any of the models as `image_embeds`.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`):
                Images.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `True`):
                Whether position embeddings are interpolated to the size of the images.

        Returns:
            `torch.Tensor` of shape `(num_images, features, vision hidden_size)`.
        """
        if pixel_values.dim() == 5:
            pixel_values = pixel_values.flatten(0, 1)
        return self._run_tower(pixel_values, interpolate_pos_encoding, **kwargs).last_hidden_state

    def _run_tower(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = True, **kwargs) -> ModelOutput:
        needs_grad = pixel_values.requires_grad or not all(is_frozen(part) for part in self._tower_parts())
        with torch.set_grad_enabled(torch.is_grad_enabled() and needs_grad):
            return self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)

    def _query_image(
        self,
        pixel_values: torch.Tensor | None,
        image_embeds: torch.Tensor | None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = True,
        **kwargs,
    ) -> tuple[torch.Tensor, ModelOutput | None, ModelOutput]:
        """`(image_embeds, vision_outputs, qformer_outputs)` of images, or of the tower's output in their place."""
        if (pixel_values is None) == (image_embeds is None):
            raise ValueError("Give either pixel_values or image_embeds, the tower's output in their place.")
        vision_outputs = None
        if image_embeds is None:
            if pixel_values.dim() == 5:
                pixel_values = pixel_values.flatten(0, 1)
            vision_outputs = self._run_tower(pixel_values, interpolate_pos_encoding, **kwargs)
            image_embeds = vision_outputs.last_hidden_state
        elif image_embeds.dim() == 4:
            image_embeds = image_embeds.flatten(0, 1)
        layernorm = self.vision_model.post_layernorm
        query_embeds, attention_mask, output_length = self.query_tokens(image_embeds.shape[0]), None, None
        if qformer_input_ids is not None:
            query_embeds, attention_mask = self._add_instruction(
                query_embeds, qformer_input_ids, qformer_attention_mask
            )
            # Nobody reads what comes out at the instruction
            output_length = self.config.num_query_tokens
        qformer_outputs = self.qformer(
            query_embeds=query_embeds,
            query_length=self.config.num_query_tokens,
            attention_mask=attention_mask,
            encoder_hidden_states=Blip2ImageStates.after_layernorm(image_embeds, layernorm),
            output_length=output_length,
            **kwargs,
        )
        return image_embeds, vision_outputs, qformer_outputs

    def _add_instruction(self, query_embeds, input_ids, attention_mask):
        if not self.config.qformer_config.use_qformer_text_input:
            raise ValueError("qformer_input_ids were given, but this Q-Former reads no text (use_qformer_text_input).")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        query_mask = attention_mask.new_ones(query_embeds.shape[:2])
        embeds = self.embeddings(input_ids=input_ids, query_embeds=query_embeds)
        return embeds, torch.cat([query_mask, attention_mask], dim=1)


class Blip2HfModel(Blip2PreTrainedModel):
    r"""
    The image side of BLIP-2, without a language model: what `AutoModel` and `pipeline("image-feature-extraction")`
    load. It takes the checkpoint of any of the BLIP-2 models.

    Args:
        config ([`Blip2Config`]):
            Its configuration.
        vision_model ([`~transformers.PreTrainedModel`], *optional*):
            The tower; made from the configuration, with random weights, if it is not given.
    """

    input_modalities = ("image",)
    main_input_name = "pixel_values"
    _keys_to_ignore_on_load_unexpected = [
        r"^(language_model|language_projection|lm_head|vision_projection|text_projection|itm_head|temperature)\."
    ]

    def __init__(self, config: Blip2Config, vision_model: PreTrainedModel | None = None):
        super().__init__(config)
        self._build_image_side(config, vision_model)
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
        **kwargs,
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`, *optional*):
                Images.
            image_embeds (`torch.Tensor` of shape `(num_images, features, vision hidden_size)`, *optional*):
                In place of `pixel_values`: what [`~Blip2PreTrainedModel.get_image_embeds`] returned.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `True`):
                Whether position embeddings are interpolated to the size of the images.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: `last_hidden_state` of shape
            `(num_images, num_query_tokens, Q-Former hidden_size)`, the output queries, and `pooler_output` of shape
            `(num_images, Q-Former hidden_size)`, their mean.

        Raises:
            ValueError: if not exactly one of `pixel_values` and `image_embeds` is given.
        """
        _, _, outputs = self._query_image(
            pixel_values, image_embeds, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs
        )
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=outputs.last_hidden_state.mean(dim=1),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


Blip2Model = Blip2HfModel


class Blip2HfForConditionalGeneration(Blip2PreTrainedModel, Blip2GenerationMixin):
    r"""
    BLIP-2 for captioning, visual question answering and stage-2 training (section 3.3): the Q-Former's output queries,
    projected to the language model's width, stand in the text as soft visual prompts.

    Images stand where `input_ids` have `config.image_token_index` (`num_query_tokens` of them for each image), or, if
    they have none, in front of the text, one image a sample.

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
        else:
            language_model = language_model_class(config.text_config).from_config(config.text_config)
        # Of the embeddings, which in some models (OPT-350m) are narrower than the hidden states
        width: int = tuple(language_model.get_input_embeddings().weight.shape)[1]
        self.language_projection = nn.Linear(config.qformer_config.hidden_size, width)
        self.language_model = language_model
        self.generation_config = copy.deepcopy(language_model.generation_config)
        # Known once it has been tried: whether nothing is done to the scores that leave its head
        self._head_is_last: bool | None = None
        self.takes_position_ids = "position_ids" in inspect.signature(language_model.forward).parameters
        self.post_init()
        self.freeze()

    def save_pretrained(self, *args, **kwargs):
        # Set by transformers on what it has quantised
        quantizers = [getattr(part, "hf_quantizer", None) for part in (self, self.language_model)]
        if quantizers[0] is None and quantizers[1] is not None:
            raise ValueError(
                "The language model was quantised on its own, and would not load again as a part of this model. Save "
                "adapters (PEFT, the presets lora_...), or load the whole with "
                "from_pretrained(..., quantization_config=...)."
            )
        return super().save_pretrained(*args, **kwargs)

    def freeze(self) -> "Blip2ForConditionalGeneration":
        self.language_model.requires_grad_(False)
        super().freeze()
        return self

    def freeze_what_is_not_read(self):
        super().freeze_what_is_not_read()
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
        return self.vision_model if modality == "image" else super().get_encoder(modality=modality)

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
        The Q-Former's output queries in the language model's space. Compute them once, and give them to `forward` or
        `generate` as `image_features`, however many questions there are about an image.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`, *optional*):
                Images.
            image_embeds (`torch.Tensor` of shape `(num_images, features, vision hidden_size)`, *optional*):
                In place of `pixel_values`: what [`~Blip2PreTrainedModel.get_image_embeds`] returned.
            qformer_input_ids (`torch.Tensor` of shape `(num_images, text_length)`, *optional*):
                An instruction for the Q-Former, where it reads text (`use_qformer_text_input`).
            qformer_attention_mask (`torch.Tensor` of shape `(num_images, text_length)`, *optional*):
                0 at its padding.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `True`):
                Whether position embeddings are interpolated to the size of the images.

        Returns:
            `BaseModelOutputWithVisionQformerOutputs`: `pooler_output` of shape
            `(num_images, num_query_tokens, language model hidden_size)` is what the language model is given;
            `last_hidden_state` is the tower's output; `vision_outputs` and `qformer_outputs` are the parts'.

        Raises:
            ValueError: if not one of `pixel_values` and `image_embeds` is given, or the Q-Former reads no text.
        """
        image_embeds, vision_outputs, qformer_outputs = self._query_image(
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

    def _project_queries(self, queries: torch.Tensor) -> torch.Tensor:
        weight = self.language_projection.weight
        return self.language_projection(queries.to(weight.dtype) if weight.is_floating_point() else queries)

    def _image_features(self, image_features, pixel_values, image_embeds, **kwargs):
        """`(image_features, outputs of the parts)`: as given, or computed; `(None, None)` without an image."""
        given = [x is not None for x in (image_features, pixel_values, image_embeds)]
        if sum(given) > 1:
            raise ValueError("Give only one of pixel_values, image_embeds and image_features.")
        if image_features is not None:
            if image_features.dim() < 3:
                raise ValueError(
                    f"image_features of shape {tuple(image_features.shape)} were given; (num_images, "
                    "num_query_tokens, hidden_size) was expected, as get_image_features(...).pooler_output has."
                )
            return image_features.flatten(0, -3), None
        if not any(given):
            return None, None
        outputs = self.get_image_features(pixel_values=pixel_values, image_embeds=image_embeds, **kwargs)
        return outputs.pooler_output, outputs

    def _insert_image_features(
        self,
        image_features: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor | None]:
        """
        Puts the image features at their `<image>` placeholders, or in front of the text where there are none.

        Returns:
            `dict`: `inputs_embeds` of shape `(batch_size, length, hidden_size)`; `input_ids`, `attention_mask`,
            `labels` of shape `(batch_size, length)`; `is_image`, boolean, of the same shape.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if not self._has_placeholders(input_ids):
            batch_size, num_images = input_ids.shape[0], image_features.shape[0]
            if num_images % batch_size:
                raise ValueError(
                    f"{num_images} images for {batch_size} texts without `<image>` placeholders: as many images for "
                    "each text were expected. Let Blip2Processor make input_ids, or give one image a text."
                )
            length = num_images // batch_size * image_features.shape[1]
            image_index = self.config.image_token_index
            front = input_ids.new_full((batch_size, length), -1 if image_index is None else image_index)
            is_image = torch.cat([torch.ones_like(front), torch.zeros_like(input_ids)], dim=1).bool()
            input_ids = torch.cat([front, input_ids], dim=1)
            attention_mask = torch.cat([attention_mask.new_ones(front.shape), attention_mask], dim=1)
            if labels is not None and not self.config.is_encoder_decoder:
                labels = torch.cat([labels.new_full(front.shape, -100), labels], dim=1)
        else:
            is_image = input_ids == self.config.image_token_index
        inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
        self._check_placeholders(is_image, image_features, inputs_embeds.shape[2])
        inputs_embeds = inputs_embeds.masked_scatter(is_image[..., None].to(inputs_embeds.device), image_features)
        if self.config.is_encoder_decoder:
            # Relative positions: padding between image and text would move them apart
            order = (attention_mask == 0).int().argsort(dim=1, stable=True)
            attention_mask = attention_mask.gather(1, order)
            inputs_embeds = inputs_embeds.gather(1, order[..., None].expand_as(inputs_embeds).to(inputs_embeds.device))
        return {
            "inputs_embeds": inputs_embeds,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "is_image": is_image,
        }

    def _has_placeholders(self, input_ids: torch.Tensor) -> bool:
        index = self.config.image_token_index
        # A compiled graph can't branch on values: there, Blip2Processor's placeholders are expected
        if index is not None and (torch.compiler.is_compiling() or bool((input_ids == index).any())):
            return True
        self._check_unknown_placeholders(input_ids)
        return False

    def _match_labels(self, labels: torch.Tensor | None, input_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Labels of the shape of `input_ids`: those of the text alone are filled up at the placeholders before it."""
        if labels is None or input_ids is None or self.config.is_encoder_decoder or labels.shape == input_ids.shape:
            return labels
        front = input_ids[:, : input_ids.shape[1] - labels.shape[1]]
        index = self.config.image_token_index
        if labels.shape[1] > input_ids.shape[1] or index is None or not bool((front == index).all()):
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} for input_ids of shape {tuple(input_ids.shape)}: a "
                "decoder-only language model learns at the positions of input_ids. Make both with one "
                "Blip2Processor call, whose is_encoder_decoder must be False."
            )
        return torch.cat([labels.new_full(front.shape, -100), labels], dim=1)

    def _check_unknown_placeholders(self, input_ids: torch.Tensor):
        front = input_ids[:, : self.config.num_query_tokens]
        if torch.compiler.is_compiling() or not 2 <= self.config.num_query_tokens == front.shape[1]:
            return
        if bool((front == front[0, 0]).all()) and int(front[0, 0]) != self.config.pad_token_id:
            raise ValueError(
                f"All texts begin with {front.shape[1]} tokens of id {int(front[0, 0])}, which look like placeholders "
                f"of an image, but config.image_token_index is {self.config.image_token_index}. If a Blip2Processor "
                "made them, set model.config.image_token_index = processor.image_token_id."
            )

    def _check_placeholders(self, is_image: torch.Tensor, image_features: torch.Tensor, width: int):
        expected = image_features.shape[0] * image_features.shape[1]
        if image_features.shape[2] != width:
            raise ValueError(
                f"image_features are {image_features.shape[2]} wide, the language model's embeddings {width}: "
                "give what get_image_features(...).pooler_output returned."
            )
        if torch.compiler.is_compiling():
            torch._assert_async(is_image.sum() == expected, "as many `<image>` placeholders as image features")
            return
        found = int(is_image.sum())
        if found != expected:
            raise ValueError(
                f"input_ids have {found} `<image>` placeholders (token id {self.config.image_token_index}), but "
                f"{image_features.shape[0]} images give {image_features.shape[1]} features each, {expected} in all. "
                "Each image needs one `<image>` in the text given to Blip2Processor, whose num_query_tokens must be "
                f"{image_features.shape[1]}."
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
                An instruction for the Q-Former, where it reads text.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embedded text and image features, in place of all of these.
            position_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions; made from `attention_mask` if they are not given.
            encoder_outputs (`ModelOutput`, *optional*):
                Those of the language model's encoder, in place of all that goes into it.
            decoder_input_ids, decoder_attention_mask (`torch.Tensor` of shape `(batch_size, target_length)`, \
*optional*):
                For an encoder-decoder; made from `labels` if they are not given.
            labels (`torch.Tensor` of shape `(batch_size, sequence_length)` or `(batch_size, target_length)`, \
*optional*):
                What to learn: of the shape of `input_ids`, or, for an encoder-decoder, the target. -100 is ignored.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `True`):
                Whether position embeddings are interpolated to the size of the images.
            skip_logits (`bool`, *optional*):
                Whether the loss alone is wanted: scores are then computed at labels, some at a time, and `logits` is
                `None`. If it is not given: in the training steps of `Trainer`, which passes `num_items_in_batch`.
            kwargs:
                Passed to the language model.

        Returns:
            [`Blip2ForConditionalGenerationModelOutput`].

        Raises:
            ValueError: if images and placeholders do not match.
        """
        image_features, image_outputs = self._image_features(
            image_features,
            pixel_values,
            image_embeds,
            qformer_input_ids=qformer_input_ids,
            qformer_attention_mask=qformer_attention_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        labels = self._match_labels(labels, input_ids)
        if image_features is not None:
            if inputs_embeds is not None:
                raise ValueError("inputs_embeds hold text and image features already: give no image with them.")
            if input_ids is None:
                input_ids = self._start_tokens(image_features)
            merged = self._insert_image_features(image_features, input_ids, attention_mask, labels)
            inputs_embeds, attention_mask, labels = (merged[k] for k in ("inputs_embeds", "attention_mask", "labels"))
            input_ids = None
        if self.config.is_encoder_decoder:
            if labels is not None and decoder_input_ids is None:
                decoder_input_ids = self.language_model.prepare_decoder_input_ids_from_labels(labels=labels)
            kwargs |= {
                "encoder_outputs": encoder_outputs,
                "decoder_input_ids": decoder_input_ids,
                "decoder_attention_mask": decoder_attention_mask,
            }
        elif self.takes_position_ids:
            length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
            kwargs["position_ids"] = _position_ids(attention_mask, length) if position_ids is None else position_ids
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        shift_labels = kwargs.pop("shift_labels", None)
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask, **kwargs}
        if labels is None:
            loss, outputs = None, self.language_model(**inputs, return_dict=True)
        else:
            if shift_labels is None:
                # A decoder-only model predicts the label of the next position
                shift_labels = labels if self.config.is_encoder_decoder else _shift(labels)
            if skip_logits is None:
                skip_logits = self.training and num_items_in_batch is not None
            # Keys and values are for generation
            inputs = {"use_cache": False} | inputs
            loss, outputs = self._loss(inputs, shift_labels, num_items_in_batch, skip_logits)
        return Blip2ForConditionalGenerationModelOutput(
            loss=loss,
            **{name: outputs.get(name) for name in LANGUAGE_MODEL_OUTPUTS},
            vision_outputs=None if image_outputs is None else image_outputs.vision_outputs,
            qformer_outputs=None if image_outputs is None else image_outputs.qformer_outputs,
            language_model_outputs=outputs,
        )

    def attach_text_networks(
        self, stage1: "str | os.PathLike | Blip2PreTrainedModel"
    ) -> "Blip2ForConditionalGeneration":
        r"""
        Lets the Q-Former read the question too, as in the paper's fine-tuning for VQA (appendix): the feed-forward
        networks for text, which stage 2 does without, and the word embeddings come from stage 1. All else stays.

        Args:
            stage1 (`str`, `os.PathLike` or [`Blip2ForPreTraining`]):
                The model of stage 1 from which this one came.

        Returns:
            The model.

        Raises:
            ValueError: if `stage1` has no such networks, or is of another shape.
        """
        source: Any = stage1 if isinstance(stage1, PreTrainedModel) else Blip2Model.from_pretrained(stage1)
        given, own = source.config.qformer_config, self.config.qformer_config
        if not given.use_qformer_text_input:
            raise ValueError(f"{stage1} has no feed-forward networks for text: the checkpoint of stage 1 has.")
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "cross_attention_frequency")
        if differing := [name for name in sizes if getattr(given, name) != getattr(own, name)]:
            raise ValueError(f"stage1 has another Q-Former: {', '.join(differing)} differ.")
        own.use_qformer_text_input, own.vocab_size = True, given.vocab_size
        own.max_position_embeddings = given.max_position_embeddings
        qformer, embeddings = Blip2QFormerModel(own), Blip2TextEmbeddings(own)
        qformer.load_state_dict(source.qformer.state_dict() | self.qformer.state_dict())
        embeddings.load_state_dict(source.embeddings.state_dict())
        self.qformer = qformer.to(next(self.qformer.parameters())).train(self.training)
        self.embeddings = embeddings.to(next(self.qformer.parameters())).train(self.training)
        self.freeze_what_is_not_read()
        return self

    def _loss(
        self,
        inputs: dict[str, Any],
        shift_labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
        skip_logits: bool,
    ) -> tuple[torch.Tensor, ModelOutput]:
        """The loss, `shift_labels` being what each position predicts, and what the language model returned."""
        if skip_logits and self._scores_labels_alone():
            num_labels = shift_labels.ne(-100).sum()
            if self._head_is_last and can_run_by_rows(self.language_model, inputs, shift_labels):
                total = loss_by_rows(lambda *rows: self._sum_at_labels(*rows)[0], inputs, shift_labels)
                return mean_over_labels(total, num_labels, num_items_in_batch), ModelOutput()
            total, outputs = self._sum_at_labels(inputs, shift_labels)
            if self._head_is_last:
                return mean_over_labels(total, num_labels, num_items_in_batch), outputs
        outputs = self.language_model(**inputs, return_dict=True)
        logits = outputs.logits[:, -shift_labels.shape[1] :]
        return language_modeling_loss(logits, shift_labels, num_items_in_batch), outputs

    def _sum_at_labels(self, inputs: dict[str, Any], shift_labels: torch.Tensor) -> tuple[torch.Tensor, ModelOutput]:
        """The sum of the loss over labels, if the head is all that makes scores, and the outputs without any."""
        head = self.get_output_embeddings()
        with states_at_labels(self.language_model, shift_labels, self._head_is_last is None) as states:
            outputs = self.language_model(**inputs, return_dict=True)
        if self._head_is_last is None:
            self._head_is_last = states.are_all(head, outputs.logits)
        total = loss_at_labels(head, states.hidden_states, states.labels)
        return total, type(outputs)(**{name: value for name, value in outputs.items() if name != "logits"})

    def _scores_labels_alone(self) -> bool:
        return (
            self._head_is_last is not False
            and not torch.compiler.is_compiling()
            and can_score_labels_alone(self.language_model)
        )

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
        language_model_kwargs: dict[str, Any] | None = None,
        **qformer_kwargs,
    ) -> "Blip2ForConditionalGeneration":
        r"""
        Joins a language model to a trained Q-Former and its tower, or to a tower and a Q-Former that starts from BERT.

        Args:
            stage1 (`str`, `os.PathLike` or a BLIP-2 model, *optional*):
                A BLIP-2 whose tower, queries and Q-Former are taken: a [`Blip2ForPreTraining`], or a
                [`Blip2ForConditionalGeneration`] with another language model, to which its Q-Former is aligned anew
                (see [`~training.train_only`]). The tower is shared with it.
            language_model (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`]):
                Any causal or sequence-to-sequence language model.
            vision_model (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`], *optional*):
                Without `stage1`, or for one that has no tower: any tower of `AutoModel`. Of CLIP and SigLIP the vision
                part is taken.
            text_encoder (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`], *optional*):
                Without `stage1`: any BERT, from which the Q-Former starts.
            image_token_index (`int`, *optional*):
                Token id of `<image>`. Taken from the language model's tokenizer where `language_model` is a folder or
                an id: the id that [`Blip2Processor`] gives it.
            vision_feature_layer (`int`, *optional*):
                Without `stage1`: index into the tower's `hidden_states`.
            num_query_tokens (`int`, *optional*):
                Without `stage1`: number of queries, 32 if it is not given.
            instruction_aware (`bool`, *optional*):
                Whether the Q-Former reads the question or instruction, next to the queries (appendix; InstructBLIP),
                with the feed-forward networks for text of stage 1 (or of BERT). If it is not given: if that of a
                [`Blip2ForConditionalGeneration`] does.
            language_model_kwargs (`dict`, *optional*):
                For loading the language model: `dtype`, `quantization_config` (8 or 4 bits), `device_map`.
            qformer_kwargs (`dict`):
                Without `stage1`: fields of [`Blip2QFormerConfig`], such as `cross_attention_frequency`.

        Returns:
            [`Blip2ForConditionalGeneration`]: the tower and the language model frozen, all in eval mode.

        Raises:
            ValueError: if the parts do not make a whole.

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
        own = {"vision_feature_layer": vision_feature_layer, "num_query_tokens": num_query_tokens, **qformer_kwargs}
        if stage1 is not None and any(value is not None for value in own.values()):
            given = sorted(name for name, value in own.items() if value is not None)
            raise ValueError(f"{', '.join(given)}: stage1 has its own; they go with vision_model and text_encoder.")
        if image_token_index is None and isinstance(language_model, (str, os.PathLike)):
            image_token_index = image_token_id(AutoTokenizer.from_pretrained(language_model))
        language_model = load_language_model(language_model, **(language_model_kwargs or {}))
        if stage1 is None:
            if instruction_aware is not None:
                qformer_kwargs["use_qformer_text_input"] = instruction_aware
            image_side = image_side_from_parts(
                vision_model, text_encoder, vision_feature_layer, num_query_tokens or 32, **qformer_kwargs
            )
        else:
            image_side = stage1 if isinstance(stage1, PreTrainedModel) else Blip2Model.from_pretrained(stage1)
            _attach_tower_if_missing(image_side, vision_model)
        # Copies: a configuration sets the attention implementation of the parts that it is made of
        source = copy.deepcopy(image_side.config)
        config = Blip2Config(
            vision_config=source.vision_config,
            qformer_config=source.qformer_config,
            text_config=copy.deepcopy(language_model.config),
            num_query_tokens=source.num_query_tokens,
            image_text_hidden_size=source.image_text_hidden_size,
            image_token_index=image_token_index,
            vision_feature_layer=source.vision_feature_layer,
        )
        if stage1 is not None:
            config.qformer_config.use_qformer_text_input = _reads_instructions(source, instruction_aware)
        model = cls(config, vision_model=image_side.vision_model, language_model=language_model)
        for name, part in model.named_children():
            if name in ("query_tokens", "qformer", "embeddings"):
                trained = getattr(image_side, name)
                # Stage 1 has feed-forward networks for text; without instructions they have nothing to do
                part.to(next(trained.parameters())).load_state_dict(trained.state_dict(), strict=False)
        return model.freeze().eval()


Blip2ForConditionalGeneration = Blip2HfForConditionalGeneration


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


def _position_ids(attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """Positions of the last `length` tokens, that count tokens and not padding, as `generate` makes them."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return None
    return (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)[:, -length:]


def _shift(labels: torch.Tensor) -> torch.Tensor:
    """What each position predicts: the label of the next one."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


def _reads_instructions(source: Blip2Config, instruction_aware: bool | None) -> bool:
    """Whether the Q-Former is to read instructions, with the feed-forward networks for text that it has."""
    has_text_networks = source.qformer_config.use_qformer_text_input
    if instruction_aware is None:
        # Stage 1 has no language model, and reads captions
        return has_text_networks and source.text_config is not None
    if instruction_aware and not has_text_networks:
        raise ValueError(
            "instruction_aware=True, but the Q-Former of stage1 reads no text: give the checkpoint of stage 1 itself, "
            "which has the feed-forward networks for text."
        )
    return instruction_aware


def _attach_tower_if_missing(stage1: Blip2PreTrainedModel, vision_model):
    if stage1.config.has_vision_tower and vision_model is not None:
        raise ValueError("vision_model: stage1 has its own tower.")
    if not stage1.config.has_vision_tower:
        if vision_model is None:
            raise ValueError("stage1 was trained from stored features and has no tower: give its vision_model.")
        stage1.attach_vision_tower(vision_model)


def image_side_from_parts(
    vision_model,
    text_encoder,
    vision_feature_layer: int | None,
    num_query_tokens: int,
    *,
    model_class: type[Blip2PreTrainedModel] = Blip2Model,
    load_vision_tower: bool = True,
    image_text_hidden_size: int = 256,
    **qformer_kwargs,
) -> Blip2PreTrainedModel:
    """A tower, or what its configuration tells of it, and a Q-Former that starts from BERT."""
    tower, bert = load_tower(vision_model) if load_vision_tower else None, load_bert(text_encoder)
    vision_config = load_tower_config(vision_model) if tower is None else tower.config
    width = tower_hidden_size(vision_config, vision_feature_layer)
    if width is None:
        width = measure_width(load_tower(vision_model) if tower is None else tower, vision_feature_layer)
    config = Blip2Config(
        vision_config=copy.deepcopy(vision_config),
        qformer_config=qformer_config_from_bert(bert.config, encoder_hidden_size=width, **qformer_kwargs),
        num_query_tokens=num_query_tokens,
        image_text_hidden_size=image_text_hidden_size,
        vision_feature_layer=vision_feature_layer,
        has_vision_tower=load_vision_tower,
    )
    model = model_class(config, vision_model=tower)
    copy_bert_weights(bert, model.qformer, getattr(model, "embeddings", None))
    return model


__all__ = [
    "Blip2ForConditionalGeneration",
    "Blip2ForConditionalGenerationModelOutput",
    "Blip2Model",
    "Blip2PreTrainedModel",
]
