"""examples/efficientnet_lite.py: the lite network inside of transformers' EfficientNet."""

import math

import pytest
import torch
from tiny_examples import tiny_examples, tower_config
from torch.nn import functional as F
from transformers import EfficientNetConfig, EfficientNetModel


@pytest.fixture(scope="module", autouse=True)
def examples(tmp_path_factory):
    with tiny_examples(tmp_path_factory.mktemp("cache")):
        yield


class PlainLite:
    """A lite network with random weights under the names of the package: no squeeze-and-excitation, and ReLU6."""

    def __init__(self, config: EfficientNetConfig):
        self.weights = {"_fc.weight": torch.randn(1000, 1280), "_fc.bias": torch.randn(1000)}
        self.blocks = []
        self.add("_conv_stem", "_bn0", (32, 3, 3, 3))
        stages = zip(
            config.in_channels,
            config.out_channels,
            config.kernel_sizes,
            config.strides,
            config.expand_ratios,
            config.num_block_repeats,
            strict=True,
        )
        for inputs, outputs, kernel, stride, ratio, repeats in stages:
            for i in range(repeats):
                self.add_block(outputs if i else inputs, outputs, kernel, 1 if i else stride, ratio)
        self.add("_conv_head", "_bn1", (1280, config.out_channels[-1], 1, 1))

    def add_block(self, inputs: int, outputs: int, kernel: int, stride: int, ratio: int):
        name, wide = f"_blocks.{len(self.blocks)}.", inputs * ratio
        if ratio > 1:
            self.add(f"{name}_expand_conv", f"{name}_bn0", (wide, inputs, 1, 1))
        self.add(f"{name}_depthwise_conv", f"{name}_bn1", (wide, 1, kernel, kernel))
        self.add(f"{name}_project_conv", f"{name}_bn2", (outputs, wide, 1, 1))
        self.blocks.append((name, stride, ratio, stride == 1 and inputs == outputs))

    def add(self, convolution: str, norm: str, shape: tuple[int, ...]):
        self.weights[f"{convolution}.weight"] = torch.randn(shape) / math.prod(shape[1:]) ** 0.5
        for part in ("weight", "bias", "running_mean"):
            self.weights[f"{norm}.{part}"] = torch.randn(shape[0]) / 2 + (part == "weight")
        self.weights[f"{norm}.running_var"] = torch.rand(shape[0]) + 0.5
        self.weights[f"{norm}.num_batches_tracked"] = torch.tensor(1)

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = F.relu6(self.convolve(hidden_states, "_conv_stem", "_bn0", stride=2))
        for name, stride, ratio, is_residual in self.blocks:
            inputs = hidden_states
            if ratio > 1:
                hidden_states = F.relu6(self.convolve(hidden_states, f"{name}_expand_conv", f"{name}_bn0"))
            groups = hidden_states.shape[1]
            hidden_states = F.relu6(
                self.convolve(hidden_states, f"{name}_depthwise_conv", f"{name}_bn1", stride, groups)
            )
            hidden_states = self.convolve(hidden_states, f"{name}_project_conv", f"{name}_bn2")
            hidden_states = hidden_states + inputs if is_residual else hidden_states
        return F.relu6(self.convolve(hidden_states, "_conv_head", "_bn1"))

    def convolve(self, hidden_states, convolution: str, norm: str, stride: int = 1, groups: int = 1) -> torch.Tensor:
        """Convolve, and pad as TensorFlow does: what is odd goes to the right and to the bottom."""
        weight = self.weights[f"{convolution}.weight"]
        sides = []
        for n in reversed(hidden_states.shape[2:]):
            missing = max((-(-n // stride) - 1) * stride + weight.shape[2] - n, 0)
            sides += [missing // 2, missing - missing // 2]
        hidden_states = F.conv2d(F.pad(hidden_states, sides), weight, stride=stride, groups=groups)
        parts = (self.weights[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(hidden_states, *parts, eps=1e-3)


@torch.no_grad()
def test_weights_give_the_output_of_the_plain_network():
    from efficientnet_lite import load_lite_weights

    plain, model = PlainLite(tower_config()), EfficientNetModel(tower_config()).eval()
    assert any(is_residual for *_, is_residual in plain.blocks)
    load_lite_weights(model, plain.weights)
    pixel_values = torch.randn(2, 3, 64, 32)
    expected = plain(pixel_values)
    assert expected.shape == (2, 1280, 8, 4) and expected.std() > 0.1
    torch.testing.assert_close(model(pixel_values).last_hidden_state, expected, atol=1e-4, rtol=1e-4)


def test_lite2_has_the_sizes_of_the_published_weights():
    from efficientnet_lite import SIZE, lite2_config

    with torch.device("meta"):
        model = EfficientNetModel(lite2_config())
    own = sum(weight.numel() for name, weight in model.named_parameters() if ".squeeze_excite." not in name)
    # 6,092,072 in all, of which the classifier of 1,000 classes is left out
    assert own == 6_092_072 - 1280 * 1000 - 1000
    assert len(model.encoder.blocks) == 21
    # Each stage halves an even number of pixels, which transformers pads as TensorFlow does
    assert SIZE % 32 == 0
