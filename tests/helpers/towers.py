"""Tiny vision towers of transformers: the configuration, and how many features a picture has."""

import transformers


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TOWERS = {
    "clip": (lambda: transformers.CLIPVisionConfig(**SMALL, image_size=28, patch_size=14), 5),
    "siglip": (lambda: transformers.SiglipVisionConfig(**SMALL, image_size=28, patch_size=14), 4),
    "dinov2": (lambda: transformers.Dinov2Config(**SMALL, image_size=28, patch_size=14), 5),
    "dinov3": (lambda: transformers.DINOv3ViTConfig(**SMALL, image_size=28, patch_size=14), 5),
    "vit": (lambda: transformers.ViTConfig(**SMALL, image_size=28, patch_size=14), 5),
    "convnext": (lambda: transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]), 4),
    "resnet": (lambda: transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4), 4),
}
