"""Vision towers: the ViT of BLIP-2, and any model of `AutoModel` in its place."""

import inspect

import torch
from torch import nn
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING, AutoModel
from transformers.models.blip_2.modeling_blip_2 import Blip2Attention, Blip2EncoderLayer
from transformers.models.blip_2.modeling_blip_2 import Blip2VisionEmbeddings as TransformersBlip2VisionEmbeddings
from transformers.models.dinov2.modeling_dinov2 import Dinov2DropPath
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, torch_int
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_blip2 import Blip2Config, Blip2VisionConfig


class Blip2VisionEmbeddings(TransformersBlip2VisionEmbeddings):
    """Patches, the class token and position embeddings, which are interpolated to the size of the images."""

    def __init__(self, config: Blip2VisionConfig):
        super().__init__(config)
        self.align_corners = config.interpolate_align_corners

    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        if height == width == self.image_size and not torch.jit.is_tracing():
            return self.position_embedding
        side = torch_int(self.num_patches**0.5)
        grid = self.position_embedding[:, 1:].reshape(1, side, side, self.embed_dim).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(
            grid.float(),
            size=(height // self.patch_size, width // self.patch_size),
            mode="bicubic",
            align_corners=self.align_corners,
        )
        grid = grid.to(embeddings.dtype).flatten(2).transpose(1, 2)
        return torch.cat((self.position_embedding[:, :1].to(embeddings.dtype), grid), dim=1)

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = True) -> torch.Tensor:
        height, width = pixel_values.shape[-2:]
        if min(height, width) < self.patch_size:
            raise ValueError(
                f"Images of {height}x{width} pixels are smaller than one patch ({self.patch_size} pixels). "
                "Resize them, as Blip2Processor does."
            )
        if not interpolate_pos_encoding and not height == width == self.image_size:
            raise ValueError(
                f"Images of {height}x{width} pixels do not fit position embeddings made for {self.image_size} pixels. "
                "Resize the images, or pass interpolate_pos_encoding=True."
            )
        return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)


class Blip2VisionLayer(Blip2EncoderLayer):
    """A block whose two branches are dropped at random, sample by sample (stochastic depth)."""

    def __init__(self, config: Blip2VisionConfig, drop_path_rate: float):
        super().__init__(config)
        self.drop_path = Dinov2DropPath(drop_path_rate)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.layer_norm1(hidden_states), **kwargs)
        hidden_states = hidden_states + self.drop_path(attended)
        return hidden_states + self.drop_path(self.mlp(self.layer_norm2(hidden_states)))


class Blip2VisionEncoder(nn.Module):
    """The blocks of the ViT, one after the other, up to `vision_feature_layer`."""

    def __init__(self, config: Blip2VisionConfig, vision_feature_layer: int | None = None):
        super().__init__()
        rates = torch.linspace(0, config.drop_path_rate, config.num_hidden_layers, device="cpu").tolist()
        self.layers = nn.ModuleList([Blip2VisionLayer(config, rate) for rate in rates])
        self.stop_at(vision_feature_layer)

    def stop_at(self, vision_feature_layer: int | None):
        layer = -1 if vision_feature_layer is None else vision_feature_layer
        num_hidden_states = len(self.layers) + 1
        _check_feature_layer(layer, num_hidden_states)
        self.num_layers_to_run = layer % num_hidden_states

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        for layer in self.layers[: self.num_layers_to_run]:
            hidden_states = layer(hidden_states, **kwargs)
        return hidden_states


class Blip2HfVisionModel(PreTrainedModel):
    r"""
    The vision transformer of BLIP-2: EVA-CLIP ViT-g/14 or CLIP ViT-L/14, without the last block (section 3.1).

    `last_hidden_state` is the output of the last block, **before** `post_layernorm`: it can be stored, because
    `post_layernorm` is trained while the rest is frozen. The models that join the tower to a Q-Former apply it.

    Args:
        config ([`Blip2VisionConfig`]):
            Its configuration.
        vision_feature_layer (`int`, *optional*):
            Index into the `hidden_states` (0: the embeddings) at which to stop. `None` or -1: the last block.
    """

    config: Blip2VisionConfig
    config_class = Blip2VisionConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["Blip2VisionEmbeddings", "Blip2VisionLayer"]
    _can_record_outputs = {"hidden_states": Blip2VisionLayer, "attentions": Blip2Attention}
    _input_embed_layer = "patch_embedding"

    def __init__(self, config: Blip2VisionConfig, vision_feature_layer: int | None = None):
        super().__init__(config)
        self.embeddings = Blip2VisionEmbeddings(config)
        self.pre_layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.use_pre_layernorm else nn.Identity()
        )
        self.encoder = Blip2VisionEncoder(config, vision_feature_layer)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.post_layernorm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, Blip2VisionEmbeddings):
            init.trunc_normal_(module.position_embedding, mean=0.0, std=self.config.initializer_range)
            init.trunc_normal_(module.class_embedding, mean=0.0, std=self.config.initializer_range)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Compute the features of images.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`):
                Normalised images of any size of at least one patch.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `True`):
                Whether position embeddings are interpolated to images of another size than `config.image_size`.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: `last_hidden_state` of shape
            `(num_images, 1 + patches, hidden_size)`, the class token first, and `pooler_output` of shape
            `(num_images, hidden_size)`, the class token after `post_layernorm`.

        Raises:
            ValueError: if images are smaller than a patch, or of another size and `interpolate_pos_encoding=False`.
        """
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        hidden_states = self.encoder(self.pre_layernorm(hidden_states), **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self.post_layernorm(hidden_states[:, 0])
        )


Blip2VisionModel = Blip2HfVisionModel


class Blip2AutoVisionModel(PreTrainedModel):
    r"""
    Any model of `AutoModel` as the vision tower, followed by the LayerNorm of BLIP-2.

    Towers that return a feature map (ConvNeXt, EfficientNet, the CNNs of timm) give one feature a cell, row by row.
    Such features do not tell where in the image they are, and the Q-Former reads them as a set. With
    `position_embedding`, sines and cosines of the row and the column are added, as DETR does (arXiv 2005.12872), times
    the standard deviation of the image's features. A tower that returns a sequence is left as it is.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the tower.
        hidden_size (`int`):
            Width of its features.
        vision_feature_layer (`int`, *optional*):
            Index into the tower's `hidden_states`; `None` takes `last_hidden_state`.
        position_embedding (`bool`, *optional*, defaults to `False`):
            Whether to add position embeddings to a feature map.
        tower ([`~transformers.PreTrainedModel`], *optional*):
            The tower itself; made from `config`, with random weights, if it is not given.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: PreTrainedConfig,
        hidden_size: int,
        vision_feature_layer: int | None = None,
        position_embedding: bool = False,
        tower: PreTrainedModel | None = None,
    ):
        tower_class = MODEL_MAPPING.get(type(config), None) if tower is None else type(tower)
        if tower_class is not None and not tower_class._supports_sdpa:
            # A convolutional tower has no attention to choose an implementation of
            config._attn_implementation = "eager"
        super().__init__(config)
        self.tower = AutoModel.from_config(config) if tower is None else tower
        self.post_layernorm = nn.LayerNorm(hidden_size, eps=1e-5)
        self.hidden_size = hidden_size
        self.vision_feature_layer = vision_feature_layer
        self.position_embedding = position_embedding
        self.interpolates = "interpolate_pos_encoding" in inspect.signature(self.tower.forward).parameters
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tower.get_input_embeddings()

    def forward(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = True, **kwargs
    ) -> BaseModelOutputWithPooling:
        r"""
        Compute the features of images.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`):
                Images as the tower's own image processor makes them.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `True`):
                Passed to towers that have this argument.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: `last_hidden_state` of shape
            `(num_images, features, hidden_size)`, before `post_layernorm`.

        Raises:
            ValueError: if the tower's features have another width, or there is no layer `vision_feature_layer`.
        """
        if self.interpolates:
            kwargs["interpolate_pos_encoding"] = interpolate_pos_encoding
        layer = self.vision_feature_layer
        if layer is not None:
            kwargs["output_hidden_states"] = True
        outputs = self.tower(pixel_values=pixel_values.to(self.tower.dtype), return_dict=True, **kwargs)
        features = outputs.last_hidden_state
        if layer is not None:
            _check_feature_layer(layer, len(outputs.hidden_states))
            features = outputs.hidden_states[layer]
        return BaseModelOutputWithPooling(
            last_hidden_state=flatten_feature_map(features, self.hidden_size, self.position_embedding),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )


def _check_feature_layer(layer: int, num_hidden_states: int):
    if not -num_hidden_states <= layer < num_hidden_states:
        raise ValueError(
            f"vision_feature_layer={layer}, but the tower has {num_hidden_states} hidden states: give an index of one."
        )


def flatten_feature_map(features: torch.Tensor, hidden_size: int, position_embedding: bool = False) -> torch.Tensor:
    """
    Return the output of a vision tower as a sequence.

    Args:
        features (`torch.Tensor` of shape `(num_images, length, hidden_size)`, \
`(num_images, hidden_size, height, width)` or `(num_images, height, width, hidden_size)`):
            The output of the tower.
        hidden_size (`int`):
            Width of the features, by which their axis is found.
        position_embedding (`bool`, *optional*, defaults to `False`):
            Whether to add position embeddings to a feature map.

    Returns:
        `torch.Tensor` of shape `(num_images, length or height * width, hidden_size)`.

    Raises:
        ValueError: if the axis of features does not have that width.
    """
    shape = tuple(features.shape)
    if features.dim() == 4 and features.shape[1] == hidden_size:
        features = features.permute(0, 2, 3, 1)
    if features.dim() not in (3, 4) or features.shape[-1] != hidden_size:
        raise ValueError(
            f"The vision tower returned features of shape {shape}; patch features of width {hidden_size} were "
            "expected. Set qformer_config.encoder_hidden_size to the tower's width."
        )
    if features.dim() == 3:
        return features
    return (add_positions(features) if position_embedding else features).flatten(1, 2)


def add_positions(features: torch.Tensor) -> torch.Tensor:
    """
    Add sines and cosines of the row and the column of each cell to a feature map. The angles go from half a turn to
    eight half turns from one edge of the image to the other.

    Args:
        features (`torch.Tensor` of shape `(num_images, height, width, hidden_size)`):
            The feature map.

    Returns:
        `torch.Tensor`: the sum, of the same shape and dtype. The embeddings, between -1 and 1, count in standard
        deviations of the image's features.
    """
    _, height, width, hidden_size = features.shape
    # Not torch.logspace, which Apple's GPUs (MPS) lack
    frequencies = torch.pi * 2 ** torch.linspace(0, 3, -(-hidden_size // 4), device=features.device)

    def waves(length: int) -> torch.Tensor:
        angles = (torch.arange(length, device=features.device)[:, None] + 0.5) / length * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    rows, columns = waves(height)[:, None].expand(-1, width, -1), waves(width)[None].expand(height, -1, -1)
    positions = torch.cat([rows, columns], dim=2)[..., :hidden_size]
    # In float32, because a mean over a whole map is too coarse in half precision
    return features + (positions * features.float().std(dim=(1, 2, 3), keepdim=True)).to(features.dtype)


class Blip2AbsentVisionModel(PreTrainedModel):
    r"""
    A stand-in for a tower whose output was stored: only the LayerNorm that follows the tower, which is trained.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the tower.
        hidden_size (`int`):
            Width of its features.
    """

    main_input_name = "pixel_values"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PreTrainedConfig, hidden_size: int):
        super().__init__(config)
        is_own = config.model_type == Blip2VisionConfig.model_type
        self.post_layernorm = nn.LayerNorm(hidden_size, eps=config.post_layernorm_eps if is_own else 1e-5)
        self.post_init()

    def forward(self, *args, **kwargs):
        raise ValueError(
            "This model has no vision tower: give image_embeds, the tower's stored output, or add the tower with "
            "attach_vision_tower."
        )


def build_vision_model(
    config: Blip2Config, vision_model: PreTrainedModel | None = None
) -> Blip2VisionModel | Blip2AutoVisionModel | Blip2AbsentVisionModel:
    """
    Build the vision tower of a configuration, with the LayerNorm of BLIP-2 as its `post_layernorm`.

    Args:
        config ([`Blip2Config`]):
            Configuration of the whole model.
        vision_model (`PreTrainedModel`, *optional*):
            The tower itself, if it has been loaded.

    Returns:
        [`Blip2VisionModel`], [`Blip2AutoVisionModel`] or [`Blip2AbsentVisionModel`].
    """
    vision_config, layer = config.vision_config, config.vision_feature_layer
    hidden_size = config.qformer_config.encoder_hidden_size
    if vision_model is None and not config.has_vision_tower:
        return Blip2AbsentVisionModel(vision_config, hidden_size)
    if isinstance(vision_model, (Blip2AutoVisionModel, Blip2AbsentVisionModel)):
        return vision_model
    # By model_type, because each file of remote code has its own copy of the class
    if vision_model is None and vision_config.model_type == Blip2VisionConfig.model_type:
        return Blip2VisionModel(vision_config, layer)
    if isinstance(vision_model, Blip2VisionModel):
        vision_model.encoder.stop_at(layer)
        return vision_model
    return Blip2AutoVisionModel(
        vision_config, hidden_size, layer, config.vision_position_embedding, tower=vision_model
    )
