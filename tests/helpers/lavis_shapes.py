"""The names and shapes of tensors in the authors' files."""

import torch


def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def layernorm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def qformer_shapes(
    width: int,
    layers: int,
    every: int,
    tower_width: int,
    text: bool,
    mlp_width: int = 48,
    queries: int = 5,
    vocabulary: int = 30,
    positions: int = 12,
) -> dict[str, tuple[int, ...]]:
    """Return those of a Q-Former whose layers 0, `every`, ... have cross-attention; `text`: with its text part."""
    shapes = {"query_tokens": (1, queries, width)} | layernorm("Qformer.bert.embeddings.LayerNorm", width)
    shapes |= layernorm("ln_vision", tower_width)
    if text:
        shapes["Qformer.bert.embeddings.word_embeddings.weight"] = (vocabulary, width)
        shapes["Qformer.bert.embeddings.position_embeddings.weight"] = (positions, width)
    for index in range(layers):
        layer = f"Qformer.bert.encoder.layer.{index}"
        for kind, inputs in (("attention", width), ("crossattention", tower_width))[: 1 + (index % every == 0)]:
            shapes |= linear(f"{layer}.{kind}.self.query", width, width)
            shapes |= linear(f"{layer}.{kind}.self.key", inputs, width)
            shapes |= linear(f"{layer}.{kind}.self.value", inputs, width)
            shapes |= linear(f"{layer}.{kind}.output.dense", width, width)
            shapes |= layernorm(f"{layer}.{kind}.output.LayerNorm", width)
        for end in ("_query", "")[: 1 + text]:
            shapes |= linear(f"{layer}.intermediate{end}.dense", width, mlp_width)
            shapes |= linear(f"{layer}.output{end}.dense", mlp_width, width)
            shapes |= layernorm(f"{layer}.output{end}.LayerNorm", width)
    return shapes


def eva_shapes(width: int, layers: int, side: int, mlp_width: int = 24) -> dict[str, tuple[int, ...]]:
    """Return those of the file of an EVA-CLIP tower, for pictures of `side` patches by `side`."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, side * side + 1, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,)}
    for index in range(layers):
        block = f"blocks.{index}"
        shapes |= {f"{block}.attn.{name}_bias": (width,) for name in "qv"}
        shapes |= {f"{block}.attn.qkv.weight": (3 * width, width)} | linear(f"{block}.attn.proj", width, width)
        shapes |= linear(f"{block}.mlp.fc1", width, mlp_width) | linear(f"{block}.mlp.fc2", mlp_width, width)
        shapes |= layernorm(f"{block}.norm1", width) | layernorm(f"{block}.norm2", width)
    return shapes


def of_tower(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the names that a tower's tensors have in a file of the whole model."""
    return {f"visual_encoder.{name}": shape for name, shape in shapes.items()}


def random_state_dict(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) * 0.1 for name, shape in shapes.items()}
