"""
Where is it looking? Cross-attention of the Q-Former as maps over the picture.

For a text: Grad-CAM of matching (ITM), as in ALBEF (arXiv 2107.07651, section 6.4) and BLIP, whose code multiplies the
cross-attention with what its gradient has above 0. There the tokens of the text attend to the image; in BLIP-2 the
queries do, and the text acts on them through the self-attention: the mean is over queries, and a word has a map of its
own as a text of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import numpy as np
import torch
from PIL import Image
from transformers.configuration_utils import PreTrainedConfig

from .models.modeling_base import Blip2PreTrainedModel
from .models.modeling_qformer import ImageKeyValues
from .models.modeling_retrieval import Blip2ImageTextPreTrainedModel


METHODS = ("gradcam", "attention")
_MOST_PREFIX_TOKENS = 16  # class and register tokens of a tower
_MODE_LOCK = Lock()  # a map that turns dropout off waits until the one before has turned it on again
_COLOURS = np.array([[20, 10, 80], [130, 20, 130], [215, 55, 75], [250, 145, 25], [255, 245, 120]], dtype=np.float32)


def text_heat_map(
    model: Blip2ImageTextPreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    image_embeds: torch.Tensor | None = None,
    method: str = "gradcam",
    layer: int | None = None,
    grid: tuple[int, int] | None = None,
    image_size: int | tuple[int, int] | None = None,
    normalize: bool = True,
) -> torch.Tensor:
    r"""
    Where in the picture is what the text says?

    Texts and images go together as in [`~Blip2ForImageTextRetrieval.get_matching_logits`]: each image has as many
    texts as the others, next to one another. A word's map is that of the word as a text of its own. The model is left
    as it was: attention implementation, training mode, gradients. Several threads may ask for maps at the same time.

    Args:
        model ([`Blip2ForImageTextRetrieval`] or [`Blip2ForPreTraining`]):
            A trained model.
        input_ids (`torch.LongTensor` of shape `(num_pairs, text_length)`):
            Texts, in the Q-Former's tokens, [CLS] first.
        attention_mask (`torch.Tensor` of shape `(num_pairs, text_length)`, *optional*):
            0 at padding, which may stand on either side.
        pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`, *optional*):
            Images.
        image_embeds (`torch.Tensor` of shape `(num_images, features, vision hidden_size)`, *optional*):
            In place of `pixel_values`: what [`~Blip2PreTrainedModel.get_image_embeds`] returned.
        method (`str`, *optional*, defaults to `"gradcam"`):
            `"gradcam"`: the attention of queries to patches, times the gradient of the logit of "match" for it where
            that is above 0. `"attention"`: that attention alone, of queries that have read the text.
        layer (`int`, *optional*):
            Number of a layer of the Q-Former that has cross-attention. The mean over all of them, if it is not given.
        grid (`tuple[int, int]`, *optional*):
            Rows and columns of patches, where they can't be told (see [`feature_grid`]).
        image_size (`int` or `tuple[int, int]`, *optional*):
            Height and width, in pixels, of what `image_embeds` were made of: the tower's `config.image_size` if it is
            not given.
        normalize (`bool`, *optional*, defaults to `True`):
            Whether each map is moved and scaled so that its lowest value is 0 and its highest 1 (all 0 where it is
            flat), or keeps the values of the method. They say where, not whether the text matches.

    Returns:
        `torch.FloatTensor` of shape `(num_pairs, rows, columns)`: heads, queries and layers are averaged.

    Raises:
        ValueError: if images are not given in one form, their number does not divide that of the texts, the method or
            the layer is none, or patches can't be told.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: one of {', '.join(map(repr, METHODS))} was expected.")
    if not isinstance(model, Blip2ImageTextPreTrainedModel):
        raise ValueError(
            f"A {type(model).__name__} does not match images with texts: give a Blip2ForImageTextRetrieval or a "
            "Blip2ForPreTraining, or ask query_attention_map what the queries attend to without a text."
        )
    layers = _layer_indices(model, layer)
    # Tensors made in inference mode can't be in a graph, their copies can
    with _without_dropout(model), torch.inference_mode(False):
        image_embeds, image_size = _image_embeds(model, pixel_values, image_embeds, image_size)
        maps = _gradcam if method == "gradcam" else _attention
        attentions = maps(model, image_embeds, input_ids.clone(), _copy(attention_mask), layers)
    heat_map = _on_grid(torch.stack(attentions).mean(dim=(0, 2, 3)), model, image_size, grid)
    return normalize_heat_map(heat_map) if normalize else heat_map


def query_attention_map(
    model: Blip2PreTrainedModel,
    pixel_values: torch.Tensor | None = None,
    image_embeds: torch.Tensor | None = None,
    qformer_input_ids: torch.Tensor | None = None,
    qformer_attention_mask: torch.Tensor | None = None,
    per_query: bool = False,
    layer: int | None = None,
    grid: tuple[int, int] | None = None,
    image_size: int | tuple[int, int] | None = None,
    normalize: bool = True,
) -> torch.Tensor:
    r"""
    What do the queries attend to, before any text is written? The model is left as it was.

    Args:
        model ([`Blip2PreTrainedModel`]):
            Any of the BLIP-2 models.
        pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`, *optional*):
            Images.
        image_embeds (`torch.Tensor` of shape `(num_images, features, vision hidden_size)`, *optional*):
            In place of `pixel_values`: what [`~Blip2PreTrainedModel.get_image_embeds`] returned.
        qformer_input_ids (`torch.Tensor` of shape `(num_images, text_length)`, *optional*):
            An instruction for the Q-Former, where it reads text.
        qformer_attention_mask (`torch.Tensor` of shape `(num_images, text_length)`, *optional*):
            0 at its padding.
        per_query (`bool`, *optional*, defaults to `False`):
            Whether each query has a map of its own, or their mean is taken.
        layer, grid, image_size, normalize (*optional*):
            As for [`text_heat_map`].

    Returns:
        `torch.FloatTensor` of shape `(num_images, rows, columns)`, or, with `per_query`,
        `(num_images, num_query_tokens, rows, columns)`: heads and layers are averaged.

    Raises:
        ValueError: if images are not given in one form, the layer is none, or patches can't be told.
    """
    layers = _layer_indices(model, layer)
    with _without_dropout(model), torch.no_grad():
        image_embeds, image_size = _image_embeds(model, pixel_values, image_embeds, image_size)
        outputs = model.encode_image(
            None, image_embeds, qformer_input_ids, qformer_attention_mask, output_attentions=True
        )[2]
    attentions = torch.stack([outputs.cross_attentions[index].float() for index in layers])
    heat_map = attentions.mean(dim=(0, 2) if per_query else (0, 2, 3))
    heat_map = _on_grid(heat_map, model, image_size, grid)
    return normalize_heat_map(heat_map) if normalize else heat_map


def normalize_heat_map(heat_map: torch.Tensor) -> torch.Tensor:
    """
    Each map moved and scaled to [0, 1]; one that is flat becomes 0.

    Args:
        heat_map (`torch.Tensor` of shape `(..., rows, columns)`):
            The maps.

    Returns:
        `torch.Tensor` of the same shape.
    """
    above = heat_map - heat_map.amin(dim=(-2, -1), keepdim=True)
    return above / above.amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(above.dtype).tiny)


def feature_grid(
    vision_config: PreTrainedConfig, num_features: int, image_size: int | tuple[int, int] | None = None
) -> tuple[int, int]:
    """
    Rows and columns of a tower's patches. Class and register tokens stand in front of them.

    Args:
        vision_config (`PreTrainedConfig`):
            Configuration of the tower.
        num_features (`int`):
            Features of an image.
        image_size (`int` or `tuple[int, int]`, *optional*):
            Height and width of the images, in pixels; `vision_config.image_size` if it is not given.

    Returns:
        `tuple[int, int]`: their product is at most `num_features`.

    Raises:
        ValueError: if the features are not as many as the configuration and the size of the images say.
    """
    size = getattr(vision_config, "image_size", None) if image_size is None else image_size
    patch = getattr(vision_config, "patch_size", None)
    # A tower with stages has fewer features than its first stage has patches
    has_stages = any(getattr(vision_config, name, None) for name in ("depths", "hidden_sizes"))
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        if patch is not None and not has_stages:
            down, across = (patch, patch) if isinstance(patch, int) else patch
            rows, columns = height // down, width // across
            if 0 <= num_features - rows * columns <= _MOST_PREFIX_TOKENS:
                return rows, columns
        elif grid := _map_size(num_features, height, width):
            return grid
    pixels = "of unknown size" if size is None else f"of {height}x{width} pixels"
    raise ValueError(
        f"{num_features} features of a {vision_config.model_type!r} tower are not one for each patch "
        f"({patch} pixels) of pictures {pixels}. Give image_size, what they were made of, or grid=(rows, columns)."
    )


def overlay(image: Image.Image, heat_map: torch.Tensor | np.ndarray, opacity: float = 0.7) -> Image.Image:
    """
    A picture with a map drawn over it: the picture itself where the map is 0, yellow where it is 1.

    Args:
        image (`PIL.Image.Image`):
            The picture: the whole of what the model has seen, in any size.
        heat_map (`torch.Tensor` or `np.ndarray` of shape `(rows, columns)`):
            Values from 0 to 1.
        opacity (`float`, *optional*, defaults to 0.7):
            How much of the picture the map hides where it is 1.

    Returns:
        `PIL.Image.Image`: of the size of `image`.

    Raises:
        ValueError: if the map has other than two dimensions, or values outside [0, 1].
    """
    heat = np.asarray(heat_map.cpu() if isinstance(heat_map, torch.Tensor) else heat_map, dtype=np.float32)
    if heat.ndim != 2 or not (heat.min() >= 0 and heat.max() <= 1):
        raise ValueError(
            f"A map of shape {heat.shape} with values from {heat.min():.3g} to {heat.max():.3g}: rows, columns and "
            "values from 0 to 1 were expected. normalize_heat_map makes them so; give one map at a time."
        )
    heat = np.asarray(Image.fromarray(heat).resize(image.size, Image.Resampling.BICUBIC)).clip(0, 1)
    stops = np.linspace(0, 1, len(_COLOURS))
    colours = np.stack([np.interp(heat, stops, channel) for channel in _COLOURS.T], axis=-1)
    share = opacity * heat[..., None]
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) * (1 - share) + colours * share
    return Image.fromarray(pixels.round().astype(np.uint8))


def _gradcam(model, image_embeds, input_ids, attention_mask, layers: list[int]) -> list[torch.Tensor]:
    """For each layer, of shape `(num_pairs, heads, queries, features)`."""
    with torch.no_grad():
        key_values = _one_image_a_text(model, image_embeds, len(input_ids))
    for key, _ in key_values:
        # A frozen model has a graph from here on
        key.requires_grad_()
    with torch.enable_grad():
        logits, outputs = model._match(input_ids, attention_mask, key_values, None, None, output_attentions=True)
        attentions = [outputs.cross_attentions[index] for index in layers]
        gradients = torch.autograd.grad(logits[:, 1].sum(), attentions)
    return [
        attention.detach().float() * gradient.float().clamp(min=0)
        for attention, gradient in zip(attentions, gradients, strict=True)
    ]


def _attention(model, image_embeds, input_ids, attention_mask, layers: list[int]) -> list[torch.Tensor]:
    """For each layer, of shape `(num_pairs, heads, queries, features)`."""
    with torch.no_grad():
        key_values = _one_image_a_text(model, image_embeds, len(input_ids))
        outputs = model._match(input_ids, attention_mask, key_values, None, None, output_attentions=True)[1]
    return [outputs.cross_attentions[index].float() for index in layers]


def _one_image_a_text(model, image_embeds: torch.Tensor, num_texts: int) -> ImageKeyValues:
    """Keys and values, repeated for texts that share an image: they would share the probabilities too."""
    if num_texts % len(image_embeds):
        raise ValueError(
            f"There are {num_texts} texts for {len(image_embeds)} images: as many texts for each image were expected."
        )
    times = num_texts // len(image_embeds)
    key_values = model.get_image_key_values(image_embeds)
    return tuple((key.repeat_interleave(times, 0), value.repeat_interleave(times, 0)) for key, value in key_values)


def _copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.clone()


def _layer_indices(model: Blip2PreTrainedModel, layer: int | None) -> list[int]:
    """Which of the recorded cross-attentions are wanted."""
    layers = [number for number, one in enumerate(model.qformer.encoder.layer) if one.has_cross_attention]
    if layer is None:
        return list(range(len(layers)))
    if layer not in layers:
        raise ValueError(f"Layer {layer} of the Q-Former has no cross-attention: one of {layers} was expected.")
    return [layers.index(layer)]


def _image_embeds(model, pixel_values, image_embeds, image_size):
    """`(image_embeds, image_size)` of images, or of the tower's output in their place."""
    if (pixel_values is None) == (image_embeds is None):
        raise ValueError("Give either pixel_values or image_embeds, the tower's output in their place.")
    if pixel_values is None:
        return image_embeds, image_size
    with torch.no_grad():
        return model.get_image_embeds(pixel_values), tuple(pixel_values.shape[-2:])


@contextmanager
def _without_dropout(model: Blip2PreTrainedModel) -> Iterator[None]:
    """Turn dropout off: with it, probabilities do not say what was attended to."""
    with _MODE_LOCK:
        in_training = [module for module in model.modules() if module.training]
        if in_training:
            model.eval()
            try:
                yield
            finally:
                for module in in_training:
                    module.training = True
            return
    # Nothing of a model in eval mode is changed: its maps need not wait for one another
    yield


def _on_grid(heat_map: torch.Tensor, model, image_size, grid: tuple[int, int] | None) -> torch.Tensor:
    """Maps of features as maps of the patches among them."""
    num_features = heat_map.shape[-1]
    if grid is None:
        grid = feature_grid(model.config.vision_config, num_features, image_size)
    rows, columns = grid
    if min(grid) < 1 or rows * columns > num_features:
        raise ValueError(f"grid is {rows}x{columns}, but an image has {num_features} features.")
    return heat_map[..., num_features - rows * columns :].unflatten(-1, (rows, columns))


def _map_size(num_features: int, height: int, width: int) -> tuple[int, int] | None:
    """Size of a feature map, its cells square: that of the only stride that gives so many, with or without padding."""
    sizes = {(height // stride, width // stride) for stride in range(1, min(height, width) + 1)}
    sizes |= {(-(-height // stride), -(-width // stride)) for stride in range(1, min(height, width) + 1)}
    fitting = [size for size in sizes if size[0] * size[1] == num_features]
    return fitting[0] if len(fitting) == 1 else None


__all__ = ["feature_grid", "normalize_heat_map", "overlay", "query_attention_map", "text_heat_map"]
