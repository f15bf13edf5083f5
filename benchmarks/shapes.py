"""Shapes of the models that benchmarks measure: those of the paper, and tiny ones, to see that a benchmark runs."""

from dataclasses import dataclass, field
from typing import Any


LANGUAGE_MODELS: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "ffn_dim": 128, "num_attention_heads": 4},
    "opt-125m": {"hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072, "num_attention_heads": 12},
    "opt-2.7b": {"hidden_size": 2560, "num_hidden_layers": 32, "ffn_dim": 10240, "num_attention_heads": 32},
}


@dataclass(frozen=True)
class Shapes:
    """
    Fields of `Blip2VisionConfig` and `Blip2QFormerConfig` that differ from ViT-g and BERT-base, and the shape of the
    tower's output for a picture.
    """

    vision: dict[str, Any] = field(default_factory=dict)
    qformer: dict[str, Any] = field(default_factory=dict)
    features: tuple[int, int] = (257, 1408)
    image_size: int = 224


PAPER = Shapes()
_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY = Shapes(
    vision={**_TINY, "image_size": 56},
    qformer={**_TINY, "encoder_hidden_size": 64},
    features=(17, 64),
    image_size=56,
)
