"""
Two frozen towers side by side, as one: inner layers of EfficientNet-lite2 and of DINOv2-small, on one grid.

Each tower distinguishes pictures that the other one does not. Inner layers distinguish drawings better than the last
one. Registered with `AutoModel`, the two are a vision tower for BLIP-2 like any other.

    import two_towers  # registers it
    Blip2ForPreTraining.from_encoders_pretrained(two_towers.pretrained_folder(), text_encoder)
"""

import os
import tempfile
from pathlib import Path

import efficientnet_lite
import torch
from real_assets import cache_folder, real_assets
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput

# Not from transformers itself: in 5.17 that name needs torchvision
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from blip2_hf.data import with_image_size


class TwoTowersConfig(PreTrainedConfig):
    """
    The layers of both towers, as indices into `hidden_states`, and the sizes.

    The features of both are pooled to `grid` places a side: nine places are enough for a picture of one thing.
    `dinov2_size` is the side, in pixels, of DINOv2's pictures.
    """

    model_type = "two_towers"
    sub_configs = {"efficientnet_config": efficientnet_lite.EfficientNetLiteConfig, "dinov2_config": Dinov2Config}
    efficientnet_config: dict | PreTrainedConfig | None = None
    dinov2_config: dict | PreTrainedConfig | None = None
    efficientnet_layers: tuple[int, ...] | list[int] = (-6, -2, -1)
    dinov2_layers: tuple[int, ...] | list[int] = (9,)
    image_size: int = 192
    num_channels: int = 3
    dinov2_size: int = 168
    grid: int = 3
    hidden_size: int = 1152

    def __post_init__(self, **kwargs):
        for name, config_class in self.sub_configs.items():
            config = getattr(self, name)
            if not isinstance(config, PreTrainedConfig):
                setattr(self, name, config_class(**(config or {})))
        super().__post_init__(**kwargs)


class TwoTowersModel(PreTrainedModel):
    """Both towers. `last_hidden_state`, `(images, places, hidden_size)`, has each layer's features, normalised."""

    config_class = TwoTowersConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["InvertedResidual", "Dinov2Layer"]

    def __init__(self, config: TwoTowersConfig):
        super().__init__(config)
        self.efficientnet = efficientnet_lite.EfficientNetLiteModel(config.efficientnet_config)
        self.dinov2 = Dinov2Model(config.dinov2_config)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutput:
        maps = self.efficientnet(pixel_values, output_hidden_states=True).hidden_states
        features = [maps[layer].permute(0, 2, 3, 1) for layer in self.config.efficientnet_layers]
        size = (self.config.dinov2_size, self.config.dinov2_size)
        # In float32, because there is no bfloat16 kernel
        smaller = F.interpolate(pixel_values.float(), size, mode="bilinear", antialias=True).to(pixel_values.dtype)
        layers = self.dinov2(smaller, output_hidden_states=True).hidden_states
        side = self.config.dinov2_size // self.config.dinov2_config.patch_size
        features += [layers[layer][:, 1:].unflatten(1, (side, side)) for layer in self.config.dinov2_layers]
        # Because layers differ in scale
        normed = [F.layer_norm(layer, layer.shape[-1:]).permute(0, 3, 1, 2) for layer in features]
        places = [F.adaptive_avg_pool2d(layer, self.config.grid) for layer in normed]
        return BaseModelOutput(last_hidden_state=torch.cat(places, dim=1).flatten(2).transpose(1, 2))


def pretrained_folder() -> str:
    """Return the folder of a checkpoint of both, and make it from theirs if it does not exist."""
    folder = cache_folder() / "assets" / "vision_model-two-towers-2"
    if not folder.exists():
        parts = efficientnet_lite.pretrained_folder(), real_assets().vision_model
        configs = [AutoConfig.from_pretrained(part) for part in parts]
        model = TwoTowersModel(TwoTowersConfig(efficientnet_config=configs[0], dinov2_config=configs[1]))
        for own, part in zip((model.efficientnet, model.dinov2), parts, strict=True):
            own.load_state_dict(AutoModel.from_pretrained(part, dtype=torch.float32).state_dict())
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="making-") as work:
            model.save_pretrained(Path(work) / "checkpoint")
            # Both need the same normalisation of pixels
            image_processor = AutoImageProcessor.from_pretrained(parts[0])
            with_image_size(image_processor, model.config.image_size).save_pretrained(Path(work) / "checkpoint")
            os.replace(Path(work) / "checkpoint", folder)
    return str(folder)


AutoConfig.register("two_towers", TwoTowersConfig)
AutoModel.register(TwoTowersConfig, TwoTowersModel)
