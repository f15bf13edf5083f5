"""The base class of all BLIP-2 models, and the image side alone: a vision tower, learned queries, a Q-Former."""

import copy
import os

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from ._compat import CACHE_NAMES
from ._hub_mixin import HubMixin
from .backbones import blank_image, load_tower, load_tower_config, measure_width
from .bert_weights import (
    check_query_initialization,
    copy_bert_weights,
    load_bert,
    qformer_config_from_bert,
    start_queries_from_words,
)
from .configuration_blip2 import (
    TRANSFORMERS_CONFIGS,
    Blip2Config,
    is_convolutional,
    public_class_name,
    tower_hidden_size,
)
from .frozen import is_frozen, keep_weights
from .modeling_qformer import Blip2QFormerModel, Blip2TextEmbeddings, ImageKeyValues
from .modeling_vision import build_vision_model
from .text_inputs import check_one_image_input, check_options, check_texts, count_images, pad_right


# What transformers calls otherwise: its queries are a bare parameter, and in InstructBLIP the embeddings belong to the
# Q-Former. The first pattern that matches is taken
NAMES_IN_TRANSFORMERS = {
    r"^query_tokens$": "query_tokens.weight",
    r"^qformer\.embeddings\.layernorm\.": "qformer.layernorm.",
    r"^qformer\.embeddings\.(word|position)_embeddings\.": r"embeddings.\1_embeddings.",
}


class Blip2QueryTokens(nn.Module):
    """The learned queries, in a module of their own so that PEFT and FSDP can hold them."""

    def __init__(self, config: Blip2Config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, config.num_query_tokens, config.qformer_config.hidden_size))

    def forward(self, batch_size: int) -> torch.Tensor:
        return self.weight.expand(batch_size, -1, -1)


class Blip2PreTrainedModel(HubMixin, PreTrainedModel):
    """Base class of BLIP-2 models: initialisation, frozen parts, transformers' own format, and sharing on the Hub."""

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
    # Kept in float32 if the model is loaded in float16, and not quantised, because these parts are trained
    _keep_in_fp32_modules = ["query_tokens", "qformer"]
    # Parts that transformers' own BLIP-2 lacks, and the name of its class if it differs
    _parts_not_in_transformers: tuple[str, ...] = ()
    _class_in_transformers: str | None = None

    def _build_image_side(self, config: Blip2Config, vision_model: PreTrainedModel | None = None):
        """Build the tower, the queries and the Q-Former, under the names that transformers' BLIP-2 gives them."""
        qformer_config = config.qformer_config
        if vision_model is not None:
            config.vision_config = vision_model.config
            keep_weights(vision_model)
        self.vision_model = build_vision_model(config, vision_model)
        self.query_tokens = Blip2QueryTokens(config)
        if qformer_config.use_qformer_text_input:
            self.embeddings = Blip2TextEmbeddings(qformer_config)
        self.qformer = Blip2QFormerModel._from_config(qformer_config)

    @property
    def device(self) -> torch.device:
        """Return the device of inputs: that of the weights or, if accelerate offloads them, of the computation."""
        device = super().device
        if device.type != "meta":
            return device
        hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        return next((torch.device(found) for found in devices if found is not None), device)

    @classmethod
    def is_custom_code(cls) -> bool:
        # transformers would skip part of T5's initialisation in a class that it takes for custom code
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
        Load a checkpoint of this library, or of transformers' own BLIP-2 (model_type `blip-2`) or InstructBLIP, and
        freeze the parts that [`~Blip2PreTrainedModel.freeze`] names. Arguments are those of
        [`~transformers.PreTrainedModel.from_pretrained`].

        Raises:
            TypeError: if `load_in_8bit` or `load_in_4bit` is given, as in examples for earlier transformers.
        """
        for name in ("load_in_8bit", "load_in_4bit"):
            if name in kwargs:
                raise TypeError(
                    f"{name} was given, which transformers 5 no longer takes: give "
                    f"quantization_config=transformers.BitsAndBytesConfig({name}=True)."
                )
        if isinstance(config, tuple(TRANSFORMERS_CONFIGS.values())):
            config = Blip2Config.from_transformers(config)
        key_mapping = NAMES_IN_TRANSFORMERS | (kwargs.pop("key_mapping", None) or {})
        loaded = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, config=config, key_mapping=key_mapping, **kwargs
        )
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze()
        return loaded

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args, transformers_compatible: bool = False, **kwargs
    ):
        r"""
        Save the model, as [`~transformers.PreTrainedModel.save_pretrained`] does.

        Args:
            save_directory (`str` or `os.PathLike`):
                The folder.
            transformers_compatible (`bool`, *optional*, defaults to `False`):
                Whether to write a checkpoint that plain transformers loads as its own BLIP-2.
            args, kwargs:
                Arguments of [`~transformers.PreTrainedModel.save_pretrained`], and `with_code` (`bool`, defaults to
                `False`): whether to put the code next to the weights, so that `AutoModel...` and `pipeline` load the
                folder with `trust_remote_code=True` without this package, and a model card if there is none.

        Raises:
            ValueError: if `transformers_compatible` and the tower is not a [`Blip2VisionModel`] of EVA-CLIP's shape,
                or with `with_code` or `push_to_hub`; if the saved model would not load (see
                [`~Blip2PreTrainedModel.check_that_it_can_be_saved`]).
        """
        self.check_that_it_can_be_saved()
        kwargs.setdefault("save_original_format", False)
        if not transformers_compatible:
            return super().save_pretrained(save_directory, *args, **kwargs)
        self._check_transformers_compatible(kwargs.pop("with_code", None), kwargs.pop("push_to_hub", None))
        kwargs["with_code"] = False
        config = self.config
        state_dict = dict(kwargs.pop("state_dict", None) or self.state_dict())
        if "query_tokens.weight" in state_dict:
            state_dict["query_tokens"] = state_dict.pop("query_tokens.weight")
        for name in [name for name in state_dict if name.partition(".")[0] in self._parts_not_in_transformers]:
            del state_dict[name]
        try:
            self.config = config.to_transformers()
            super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
            # super() wrote the name of this class, which transformers does not know
            self.config.architectures = [self._class_in_transformers or public_class_name(self)]
            self.config.save_pretrained(save_directory)
        finally:
            self.config = config

    def check_that_it_can_be_saved(self):
        """
        Refuse a model that would not load again once it is saved.

        Raises:
            ValueError: if a model in 4 bits has run on a CPU.
        """
        for name, weight in self.named_parameters():
            # bitsandbytes packs a weight for the CPU, rounds its scales to bfloat16, and cannot undo that
            if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", None) is not None:
                raise ValueError(
                    f"This 4-bit model has run on a CPU, and bitsandbytes has rounded the scales of {name} there: "
                    "other weights would be saved. Load the model again, and save it before it runs."
                )

    def attach_vision_tower(self, vision_model: str | os.PathLike | PreTrainedModel) -> "Blip2PreTrainedModel":
        r"""
        Put a tower into a model that was made without one (`has_vision_tower=False`) and trained on the tower's stored
        output. The LayerNorm after the tower stays.

        Args:
            vision_model (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`]):
                The tower that computed the stored output.

        Returns:
            The model.

        Raises:
            ValueError: if the tower has another shape than the one that the model was made for, or lacks weights.
        """
        tower = load_tower(vision_model)
        expected, given = self.config.vision_config, tower.config
        names = ("model_type", "hidden_size", "hidden_sizes", "num_hidden_layers", "patch_size")
        differing = [name for name in names if getattr(expected, name, None) != getattr(given, name, None)]
        if differing:
            wanted, found = ({name: getattr(c, name, None) for name in differing} for c in (expected, given))
            raise ValueError(
                f"This model was made for a tower with {wanted}, but the given one has {found}. Give the tower that "
                "computed the stored output."
            )
        layernorm = self.vision_model.post_layernorm
        self.config.has_vision_tower = True
        self.vision_model = build_vision_model(self.config, tower.to(layernorm.weight.device))
        self.vision_model.post_layernorm = layernorm
        return self.freeze()

    def freeze(self) -> "Blip2PreTrainedModel":
        """
        Freeze the vision tower, except the LayerNorm after it, and the language model, as in both stages of the paper.
        To train such a part, call its `requires_grad_(True)`.

        Returns:
            The model.
        """
        self.vision_model.requires_grad_(False)
        self.vision_model.post_layernorm.requires_grad_(True)
        self.freeze_unused_parameters()
        for part in self.frozen_parts():
            part.eval()
        return self

    def freeze_unused_parameters(self):
        """
        Freeze the parameters that the loss does not depend on, because `DistributedDataParallel` would wait for their
        gradients: parts of a tower that its features do not depend on (blocks after `vision_feature_layer`, poolers,
        mask tokens), and the network for instructions in the Q-Former's last layer.
        """
        trained = [p for part in self._tower_parts() for p in part.parameters() if p.requires_grad]
        if not trained:
            return
        image, training = blank_image(self.config.vision_config, trained[0]), self.vision_model.training
        self.vision_model.eval()
        with torch.enable_grad():
            features = self.get_image_embeds(image)
            gradients = torch.autograd.grad(features.float().sum(), trained, allow_unused=True)
        self.vision_model.train(training)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)

    def frozen_parts(self) -> list[nn.Module]:
        """Return the parts without a trained parameter, which stay in eval mode."""
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
        Compute the vision tower's output, before the LayerNorm that follows it. If the tower is frozen, the output can
        be stored, and given to any of the models as `image_embeds`.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`):
                Images.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `True`):
                Whether position embeddings are interpolated to the size of the images.

        Returns:
            `torch.Tensor` of shape `(num_images, features, vision hidden_size)`.
        """
        return self._run_tower(pixel_values, interpolate_pos_encoding, **kwargs).last_hidden_state

    def get_qformer_features(
        self,
        pixel_values: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = True,
    ) -> torch.Tensor:
        r"""
        Compute the output queries of images.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`, *optional*):
                Images.
            image_embeds (`torch.Tensor` of shape `(num_images, num_features, vision hidden_size)`, *optional*):
                In place of `pixel_values`: what [`~Blip2PreTrainedModel.get_image_embeds`] returned.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `True`):
                Whether position embeddings are interpolated to the size of the images.

        Returns:
            `torch.Tensor` of shape `(num_images, num_query_tokens, Q-Former hidden_size)`.
        """
        outputs = self.encode_image(pixel_values, image_embeds, interpolate_pos_encoding=interpolate_pos_encoding)
        return outputs[2].last_hidden_state

    def get_image_key_values(self, image_embeds: torch.Tensor) -> ImageKeyValues:
        r"""
        Compute the keys and values of images for each cross-attention of the Q-Former. They serve any number of texts
        about an image (see [`~Blip2ForImageTextRetrieval.get_matching_logits`]).

        Args:
            image_embeds (`torch.Tensor` of shape `(num_images, num_features, vision hidden_size)`):
                What [`~Blip2PreTrainedModel.get_image_embeds`] returned.

        Returns:
            `tuple` of (key, value), one for each layer with cross-attention, each a `torch.Tensor` of shape
            `(num_images, num_attention_heads, num_features, head_dim)`.
        """
        return self.qformer.project_image(image_embeds, self.vision_model.post_layernorm)

    def _run_tower(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = True, **kwargs) -> ModelOutput:
        if pixel_values.dim() == 5:
            pixel_values = pixel_values.flatten(0, 1)
        needs_grad = pixel_values.requires_grad or not all(is_frozen(part) for part in self._tower_parts())
        with torch.set_grad_enabled(torch.is_grad_enabled() and needs_grad):
            return self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)

    def encode_image(
        self,
        pixel_values: torch.Tensor | None,
        image_embeds: torch.Tensor | None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = True,
        **kwargs,
    ) -> tuple[torch.Tensor, ModelOutput | None, ModelOutput]:
        r"""
        Run the tower and the Q-Former.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`, *optional*):
                Images.
            image_embeds (`torch.Tensor` of shape `(num_images, num_features, vision hidden_size)`, *optional*):
                In place of `pixel_values`: what [`~Blip2PreTrainedModel.get_image_embeds`] returned.
            qformer_input_ids, qformer_attention_mask (`torch.Tensor` of shape `(num_images, text_length)`, \
*optional*):
                An instruction, if the Q-Former reads text; or one for each row of images, if these have the shape
                `(batch_size, images_each, ...)`.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `True`):
                Whether position embeddings are interpolated to the size of the images.

        Returns:
            `tuple`: `image_embeds`, the outputs of the tower (`None` if it has not run), and those of the Q-Former,
            whose `last_hidden_state` has the shape `(num_images, num_query_tokens, hidden_size)`.

        Raises:
            ValueError: if not exactly one of `pixel_values` and `image_embeds` is given, or the Q-Former is given an
                instruction and reads no text.
        """
        check_one_image_input(pixel_values, image_embeds)
        for name in ("input_ids", "attention_mask"):
            # Blip2Processor makes them even for images alone, and an image's features do not depend on them
            kwargs.pop(name, None)
        num_images = count_images(pixel_values, image_embeds)
        query_embeds, attention_mask, output_length = self.query_tokens(num_images), None, None
        if qformer_input_ids is not None:
            # Before the tower, because the checks read values, which waits for all that a GPU has to do
            num_rows = len(pixel_values if image_embeds is None else image_embeds)
            if num_images > num_rows == len(qformer_input_ids):
                # One instruction for all images of a row
                qformer_input_ids, qformer_attention_mask = (
                    None if x is None else x.repeat_interleave(num_images // num_rows, dim=0)
                    for x in (qformer_input_ids, qformer_attention_mask)
                )
            query_embeds, attention_mask = self._add_instruction(
                query_embeds, qformer_input_ids, qformer_attention_mask
            )
            # The outputs at the instruction are not used
            output_length = self.config.num_query_tokens
        vision_outputs = None
        if image_embeds is None:
            vision_outputs = self._run_tower(pixel_values, interpolate_pos_encoding, **kwargs)
            image_embeds = vision_outputs.last_hidden_state
        elif image_embeds.dim() == 4:
            image_embeds = image_embeds.flatten(0, 1)
        qformer_outputs = self.qformer(
            query_embeds=query_embeds,
            query_length=self.config.num_query_tokens,
            attention_mask=attention_mask,
            encoder_key_values=self.get_image_key_values(image_embeds),
            output_length=output_length,
            **kwargs,
        )
        return image_embeds, vision_outputs, qformer_outputs

    def _add_instruction(self, query_embeds, input_ids, attention_mask):
        if not self.config.qformer_config.use_qformer_text_input:
            raise ValueError(
                "qformer_input_ids were given, but this Q-Former reads no text (use_qformer_text_input=False): leave "
                "them out."
            )
        if len(input_ids) != len(query_embeds):
            raise ValueError(
                f"{len(input_ids)} qformer_input_ids were given for {len(query_embeds)} images: one instruction for "
                "each image was expected."
            )
        input_ids, attention_mask = pad_right(input_ids, attention_mask, "qformer_input_ids")
        check_texts(input_ids, attention_mask, self.config, "qformer_input_ids")
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
        Compute the output queries of images.

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
            TypeError: if an argument is not known.
            ValueError: if not exactly one of `pixel_values` and `image_embeds` is given.
        """
        # Blip2Processor makes them even for images alone
        kwargs = {name: value for name, value in kwargs.items() if name not in ("input_ids", "attention_mask")}
        check_options(kwargs, "images alone (Blip2ForConditionalGeneration takes texts and labels)")
        _, _, outputs = self.encode_image(
            pixel_values, image_embeds, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs
        )
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=outputs.last_hidden_state.mean(dim=1),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


Blip2Model = Blip2HfModel


def image_side_from_parts(
    vision_model,
    text_encoder,
    vision_feature_layer: int | None,
    num_query_tokens: int,
    *,
    model_class: type[Blip2PreTrainedModel] = Blip2Model,
    load_vision_tower: bool = True,
    image_text_hidden_size: int = 256,
    query_initialization: str = "words",
    **qformer_kwargs,
) -> Blip2PreTrainedModel:
    """Build the image side from a tower, or from its configuration, and a Q-Former that starts from BERT."""
    check_query_initialization(query_initialization)
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
        vision_position_embedding=is_convolutional(vision_config),
        has_vision_tower=load_vision_tower,
    )
    model = model_class(config, vision_model=tower)
    copy_bert_weights(bert, model.qformer, getattr(model, "embeddings", None))
    if query_initialization == "words":
        start_queries_from_words(bert, model.query_tokens.weight)
    return model
