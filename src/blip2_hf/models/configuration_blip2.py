"""
Configurations of BLIP-2: the vision tower, the Q-Former, and the two joined with a language model.

transformers looks some classes up by name alone and finds its own `Blip2...` first. The classes here, and those
of the models and of the processor, are therefore named `Blip2Hf...`, with `Blip2...` as their public names.
"""

import copy
import os
import re
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig
from transformers.models.blip_2.configuration_blip_2 import Blip2Config as TransformersBlip2Config
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig as TransformersBlip2QFormerConfig
from transformers.models.blip_2.configuration_blip_2 import Blip2VisionConfig as TransformersBlip2VisionConfig
from transformers.models.instructblip.configuration_instructblip import InstructBlipConfig
from transformers.models.instructblipvideo.configuration_instructblipvideo import InstructBlipVideoConfig


# Checkpoints of transformers that are a BLIP-2, by their type. The Q-Former of the last two reads the question
TRANSFORMERS_CONFIGS = {
    config.model_type: config for config in (TransformersBlip2Config, InstructBlipConfig, InstructBlipVideoConfig)
}
_TOWERS_OF_BLIP = [f"{name}_vision_model" for name in ("blip", "blip_2", "instructblip", "instructblipvideo")]


@strict
class Blip2HfVisionConfig(PreTrainedConfig):
    r"""
    Configuration of [`Blip2VisionModel`]. The defaults are EVA-CLIP ViT-g/14 without its last block, as in the paper
    (section 3.1); [`Blip2VisionConfig.clip_vit_l`] gives CLIP ViT-L/14.

    Args:
        hidden_size (`int`, *optional*, defaults to 1408):
            Width of the tower.
        intermediate_size (`int`, *optional*, defaults to 6144):
            Width of the hidden layer of each MLP.
        num_hidden_layers (`int`, *optional*, defaults to 39):
            Number of blocks.
        num_attention_heads (`int`, *optional*, defaults to 16):
            Number of attention heads of each block.
        image_size (`int`, *optional*, defaults to 224):
            Side, in pixels, of the square images that the position embeddings are made for.
        patch_size (`int`, *optional*, defaults to 14):
            Side, in pixels, of a patch.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the MLPs.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of the LayerNorms inside the blocks.
        post_layernorm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the LayerNorm between the tower and the Q-Former.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout of the attention weights.
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Probability of dropping a branch of the last block for a sample, if the tower is trained. It rises evenly
            from 0 at the first block (stochastic depth, arXiv 1603.09382).
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the normal distribution that weights start from.
        qkv_bias (`bool`, *optional*, defaults to `True`):
            Whether the query, key and value projections have a bias.
        use_pre_layernorm (`bool`, *optional*, defaults to `False`):
            Whether a LayerNorm stands between the embeddings and the first block (CLIP has one).
        interpolate_align_corners (`bool`, *optional*, defaults to `False`):
            How position embeddings are interpolated to another image size (the authors' CLIP aligns the corners).
    """

    model_type = "blip2_vision_model"
    base_config_key = "vision_config"

    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    post_layernorm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    qkv_bias: bool = True
    use_pre_layernorm: bool = False
    interpolate_align_corners: bool = False

    @classmethod
    def clip_vit_l(cls, **kwargs) -> "Blip2VisionConfig":
        """Return CLIP ViT-L/14 without its last block, the paper's smaller tower. Keyword arguments override sizes."""
        sizes = {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "use_pre_layernorm": True,
            "interpolate_align_corners": True,
        }
        return cls(**(sizes | kwargs))


Blip2VisionConfig = Blip2HfVisionConfig


@strict
class Blip2HfQFormerConfig(PreTrainedConfig):
    r"""
    Configuration of [`Blip2QFormerModel`]: BERT-base with cross-attention in every other layer (section 3.1).

    Args:
        vocab_size (`int`, *optional*, defaults to 30523):
            Size of the text vocabulary: that of bert-base-uncased and `[DEC]`.
        hidden_size (`int`, *optional*, defaults to 768):
            Width.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Number of layers.
        num_attention_heads (`int`, *optional*, defaults to 12):
            Number of attention heads of each layer.
        intermediate_size (`int`, *optional*, defaults to 3072):
            Width of the hidden layer of each feed-forward network.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the feed-forward networks.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.1):
            Dropout of hidden states.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.1):
            Dropout of attention weights.
        max_position_embeddings (`int`, *optional*, defaults to 512):
            Longest text, in tokens.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the normal distribution that weights start from.
        layer_norm_eps (`float`, *optional*, defaults to 1e-12):
            Epsilon of the LayerNorms.
        pad_token_id (`int`, *optional*, defaults to 0):
            Token id of padding.
        bos_token_id (`int`, *optional*, defaults to 30522):
            Token id of `[DEC]`, which starts a text that is generated.
        eos_token_id (`int`, *optional*):
            Token id of `[SEP]`, which ends a text: 102 if the vocabulary is that of bert-base-uncased.
        cross_attention_frequency (`int`, *optional*, defaults to 2):
            Every how many layers, from the first, the queries attend to the image.
        encoder_hidden_size (`int`, *optional*, defaults to 1408):
            Width of the image features.
        use_qformer_text_input (`bool`, *optional*, defaults to `False`):
            Whether the layers have the feed-forward networks for text, next to those for queries.
    """

    model_type = "blip2_qformer"
    base_config_key = "qformer_config"

    vocab_size: int = 30523
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = 30522
    eos_token_id: int | None = None
    cross_attention_frequency: int = 2
    encoder_hidden_size: int = 1408
    use_qformer_text_input: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.eos_token_id is None and self.vocab_size in (30522, 30523):
            self.eos_token_id = 102


Blip2QFormerConfig = Blip2HfQFormerConfig


@strict
class Blip2HfConfig(PreTrainedConfig):
    r"""
    Configuration of the BLIP-2 models: a vision tower, a Q-Former and, after stage 1, a language model.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            [`Blip2VisionConfig`] (the default), or that of any model of `AutoModel` that returns patch features or a
            feature map. From a two-tower configuration (CLIP, SigLIP), the vision part is taken.
        qformer_config (`Blip2QFormerConfig` or `dict`, *optional*):
            Configuration of the Q-Former. Its `encoder_hidden_size` follows the tower.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            That of any model of `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM`; `None` in stage 1.
        num_query_tokens (`int`, *optional*, defaults to 32):
            Number of learned queries.
        image_text_hidden_size (`int`, *optional*, defaults to 256):
            Width of the space in which images and texts are compared.
        image_token_index (`int`, *optional*):
            Token id of `<image>`. `None`: the queries stand in front of the text, without placeholders.
        vision_feature_layer (`int`, *optional*):
            Index into the tower's `hidden_states` (0: the embeddings, -1: the last layer). `None`: the tower's
            `last_hidden_state`.
        vision_position_embedding (`bool`, *optional*, defaults to `False`):
            Whether the cells of a tower's feature map get position embeddings (see [`Blip2AutoVisionModel`]), without
            which the Q-Former of a CNN cannot tell where a thing is. Models made of a pretrained CNN have them, and
            configurations of older versions, which lack the field, don't.
        has_vision_tower (`bool`, *optional*, defaults to `True`):
            Whether the model has its tower, or learns from the tower's stored output alone.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the normal distribution that the queries and the projections start from.

    Example:

    ```python
    >>> from transformers import Dinov2Config, OPTConfig
    >>> from blip2_hf import Blip2Config, Blip2ForConditionalGeneration

    >>> tower, language_model = Dinov2Config(num_hidden_layers=2), OPTConfig(num_hidden_layers=2)
    >>> config = Blip2Config(vision_config=tower, text_config=language_model)
    >>> model = Blip2ForConditionalGeneration(config)
    ```"""

    model_type = "blip2"
    attribute_map = {"image_token_id": "image_token_index"}
    sub_configs = {"vision_config": AutoConfig, "qformer_config": Blip2QFormerConfig, "text_config": AutoConfig}
    keys_to_ignore_at_inference = [
        "cache",
        "past_key_values",
        "hidden_states",
        "attentions",
        "cross_attentions",
        "encoder_last_hidden_state",
        "encoder_hidden_states",
        "encoder_attentions",
        "vision_outputs",
        "qformer_outputs",
        "language_model_outputs",
        "loss_itc",
        "loss_itm",
        "loss_itg",
        "logits_per_image",
        "logits_per_text",
        "itm_logits",
        "itg_logits",
        "negative_image_index",
        "negative_text_index",
    ]

    vision_config: dict | PreTrainedConfig | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    num_query_tokens: int = 32
    image_text_hidden_size: int = 256
    image_token_index: int | None = None
    vision_feature_layer: int | None = None
    vision_position_embedding: bool = False
    has_vision_tower: bool = True
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if __name__.startswith("blip2_hf."):
            # The package needs no code from a checkpoint; a copy of this file on the Hub does. TRL reads auto_map of
            # any configuration whose class is not in transformers
            kwargs["auto_map"] = {}
            kwargs.pop("custom_pipelines", None)
        self.vision_config = _sub_config(self.vision_config, Blip2VisionConfig)
        self.vision_config = getattr(self.vision_config, "vision_config", self.vision_config)
        self.qformer_config = _sub_config(self.qformer_config, Blip2QFormerConfig)
        encoder_hidden_size = tower_hidden_size(self.vision_config, self.vision_feature_layer)
        if encoder_hidden_size is not None:
            self.qformer_config.encoder_hidden_size = encoder_hidden_size
        self.text_config = None if self.text_config is None else _sub_config(self.text_config, None)
        super().__post_init__(**kwargs)
        if self.text_config is not None:
            text = self.text_config.get_text_config(decoder=True)
            self.is_encoder_decoder = self.text_config.is_encoder_decoder
            # Some configurations lack this field
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
            for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
                if getattr(self, name) is None:
                    setattr(self, name, getattr(text, name, None))
            if self.pad_token_id is None:
                eos = self.eos_token_id
                self.pad_token_id = eos[0] if isinstance(eos, list) else eos

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type not in (cls.model_type, *TRANSFORMERS_CONFIGS):
            raise ValueError(
                f"{pretrained_model_name_or_path} is of type {model_type!r}: a BLIP-2 or an InstructBLIP was expected."
            )
        if model_type != cls.model_type:
            config_dict = cls.from_transformers(TRANSFORMERS_CONFIGS[model_type].from_dict(config_dict)).to_dict()
        return config_dict, kwargs

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a dict, without the names of folders that its parts were loaded from."""
        output = super().to_dict()
        if not output.get("auto_map"):
            output.pop("auto_map", None)
        for name in self.sub_configs:
            if output.get(name) is not None:
                _drop_folder_names(output[name])
        return output

    @classmethod
    def from_transformers(cls, config: PreTrainedConfig) -> "Blip2Config":
        """
        Return the configuration of a checkpoint of transformers' own BLIP-2, or of its InstructBLIP, which is a BLIP-2
        whose Q-Former reads the question.

        Args:
            config ([`~transformers.Blip2Config`], [`~transformers.InstructBlipConfig`] or \
[`~transformers.InstructBlipVideoConfig`]):
                transformers' configuration.

        Returns:
            [`Blip2Config`]: the same model. Its `post_layernorm_eps` is transformers' `layer_norm_eps` and not the
            authors' 1e-5, so that the outputs are the same.
        """
        is_blip2 = config.model_type == TransformersBlip2Config.model_type
        qformer = _shared_fields(config.qformer_config, Blip2QFormerConfig)
        return cls(
            vision_config=vision_config_from_blip(config.vision_config),
            qformer_config=Blip2QFormerConfig(**qformer | ({} if is_blip2 else {"use_qformer_text_input": True})),
            text_config=copy.deepcopy(config.text_config),
            num_query_tokens=config.num_query_tokens,
            **({"image_text_hidden_size": config.image_text_hidden_size} if is_blip2 else {}),
            # A video's frames are images
            image_token_index=getattr(config, "image_token_index", None) or getattr(config, "video_token_index", None),
            initializer_range=config.initializer_range,
            architectures=config.architectures,
            dtype=config.dtype,
        )

    def to_transformers(self) -> TransformersBlip2Config:
        """
        Return the configuration of the same model in transformers' own BLIP-2 (model_type `blip-2`).

        Returns:
            [`~transformers.Blip2Config`]: transformers' configuration.

        Raises:
            ValueError: if the tower has no counterpart there.
        """
        if not self.has_vision_tower:
            raise ValueError(
                "This model has no vision tower, which transformers needs: call attach_vision_tower first."
            )
        vision = self.vision_config
        is_own = vision.model_type == Blip2VisionConfig.model_type
        if not is_own or vision.use_pre_layernorm:
            raise ValueError(
                f"transformers' BLIP-2 has one vision tower, the shape of EVA-CLIP, and cannot hold a tower of type "
                f"{vision.model_type!r}{' with a pre_layernorm' if is_own else ''}. "
                "Save with transformers_compatible=False."
            )
        if self.vision_feature_layer is not None:
            raise ValueError(
                "transformers' BLIP-2 has no vision_feature_layer: it always takes the tower's last layer."
            )
        sub_configs = {
            "vision_config": TransformersBlip2VisionConfig(**_shared_fields(vision, TransformersBlip2VisionConfig)),
            "qformer_config": TransformersBlip2QFormerConfig(
                **_shared_fields(self.qformer_config, TransformersBlip2QFormerConfig)
            ),
        }
        text_config = copy.deepcopy(self.text_config)
        if text_config is not None and not is_hub_id(text_config.name_or_path):
            text_config.name_or_path = ""
        return TransformersBlip2Config(
            **sub_configs,
            text_config=text_config,
            num_query_tokens=self.num_query_tokens,
            image_text_hidden_size=self.image_text_hidden_size,
            image_token_index=self.image_token_index,
            initializer_range=self.initializer_range,
            architectures=self.architectures,
            dtype=self.dtype,
        )


Blip2Config = Blip2HfConfig


def public_class_name(instance: object) -> str:
    """Return the name by which users know the class of an object: `Blip2...`, not `Blip2Hf...`."""
    return type(instance).__name__.replace("Blip2Hf", "Blip2")


def is_tower_of_blip(config: PreTrainedConfig) -> bool:
    """Return whether a configuration is that of the tower of transformers' BLIP, BLIP-2 or InstructBLIP (Video)."""
    return config.model_type in _TOWERS_OF_BLIP


def vision_config_from_blip(config: PreTrainedConfig) -> Blip2VisionConfig:
    """
    Return the configuration that [`Blip2VisionModel`] has for the weights of a tower of transformers.

    Args:
        config (`PreTrainedConfig`):
            Configuration of the tower of a BLIP, BLIP-2 or InstructBLIP: the same network, which applies
            `post_layernorm` itself.

    Returns:
        [`Blip2VisionConfig`].
    """
    fields = _shared_fields(config, Blip2VisionConfig) | {"post_layernorm_eps": config.layer_norm_eps}
    return Blip2VisionConfig(**fields, dtype=config.dtype)


def is_convolutional(vision_config: PreTrainedConfig) -> bool:
    """Return whether a vision tower has no attention (ConvNeXt), or its configuration does not tell (timm)."""
    return not any(getattr(vision_config, name, None) for name in ("num_attention_heads", "num_heads"))


def tower_hidden_size(vision_config: PreTrainedConfig, vision_feature_layer: int | None = None) -> int | None:
    """
    Return the width of a vision tower's features, as far as its configuration tells it.

    Args:
        vision_config (`PreTrainedConfig`):
            Configuration of the tower.
        vision_feature_layer (`int`, *optional*):
            Index into the tower's `hidden_states`, whose widths differ in a tower with stages (ConvNeXt).

    Returns:
        `int` or `None`: the width; `None` if only the model knows it (timm).
    """
    if hidden_sizes := getattr(vision_config, "hidden_sizes", None):
        return ([hidden_sizes[0], *hidden_sizes])[-1 if vision_feature_layer is None else vision_feature_layer]
    for name in ("hidden_size", "num_features"):
        if isinstance(getattr(vision_config, name, None), int):
            return getattr(vision_config, name)
    return None


def _sub_config(config: dict | PreTrainedConfig | None, default: type[PreTrainedConfig] | None) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    config = dict(config or {})
    model_type = config.pop("model_type", None)
    if default is not None and model_type in (None, default.model_type):
        return default(**config)
    if model_type is None:
        raise ValueError('A configuration given as a dict needs its "model_type", such as {"model_type": "opt", ...}.')
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"transformers knows no configuration of model_type {model_type!r}.")
    return CONFIG_MAPPING[model_type](**config)


def _drop_folder_names(config: dict[str, Any]):
    """Remove names of folders, which mean nothing on another machine and may reveal a user's name."""
    if config.get("_name_or_path") and not is_hub_id(config["_name_or_path"]):
        config["_name_or_path"] = ""
    for value in config.values():
        if isinstance(value, dict):
            _drop_folder_names(value)


def is_hub_id(name: str | None) -> bool:
    """Return whether a name is a repository's on the Hub, `owner/name`, and not a folder's here."""
    return bool(name) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not os.path.exists(name)


def _shared_fields(config: PreTrainedConfig, kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return the values of those fields of `config` that the configuration class `kind` declares too."""
    names = set(kind.__annotations__) & set(type(config).__annotations__)
    return {name: getattr(config, name) for name in names if name not in ("model_type", "base_config_key")}
