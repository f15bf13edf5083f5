"""
Where the model looks: the Q-Former's cross-attention as maps over the picture.

The map of a text is the Grad-CAM of matching (ITM), as in ALBEF (arXiv 2107.07651, section 6.4) and BLIP. Their code
multiplies the cross-attention by the positive part of its gradient. There the tokens of the text attend to the image.
In BLIP-2 the queries do, and the text acts on them through the self-attention. So the mean is over the queries, and
the map of a word is that of a text of one word.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import numpy as np
import torch
from PIL import Image
from transformers.configuration_utils import PreTrainedConfig

from .models.modeling_base import Blip2PreTrainedModel
from .models.modeling_image_text import Blip2ImageTextPreTrainedModel


METHODS = ("gradcam", "attention")
_MOST_PREFIX_TOKENS = 16  # class and register tokens of a tower
_MODE_LOCK = Lock()  # held while dropout is off
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
    Compute where in the picture is what the text says.

    Texts and images go together as in [`~Blip2ForImageTextRetrieval.get_matching_logits`]: each image has the same
    number of texts, next to one another. For the map of a word, give the word as a text. The model is left as it was:
    attention implementation, training mode, gradients. Several threads may call this at the same time.

    Args:
        model ([`Blip2ForImageTextRetrieval`] or [`Blip2ForPreTraining`]):
            A trained model.
        input_ids (`torch.LongTensor` of shape `(num_pairs, text_length)`):
            Texts in the Q-Former's tokens, [CLS] first.
        attention_mask (`torch.Tensor` of shape `(num_pairs, text_length)`, *optional*):
            0 at padding, which may be on either side.
        pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`, *optional*):
            Images.
        image_embeds (`torch.Tensor` of shape `(num_images, features, vision hidden_size)`, *optional*):
            What [`~Blip2PreTrainedModel.get_image_embeds`] returned, instead of `pixel_values`.
        method (`str`, *optional*, defaults to `"gradcam"`):
            `"gradcam"`: the attention of the queries to the patches, times the positive part of its gradient of the
            logit of "match". `"attention"`: that attention alone, of queries that have read the text.
        layer (`int`, *optional*):
            Index of a layer of the Q-Former that has cross-attention. If it is not given, the mean over all of them.
        grid (`tuple[int, int]`, *optional*):
            Rows and columns of patches, if [`feature_grid`] cannot find them.
        image_size (`int` or `tuple[int, int]`, *optional*):
            Height and width, in pixels, of the images that `image_embeds` were made of. The tower's
            `config.image_size` if it is not given.
        normalize (`bool`, *optional*, defaults to `True`):
            Whether to shift and scale each map to [0, 1]; a flat map becomes 0. Such a map says where, but not whether
            the text matches.

    Returns:
        `torch.FloatTensor` of shape `(num_pairs, rows, columns)`: the mean over heads, queries and layers.

    Raises:
        ValueError: if images are not given in one form, if their number does not divide that of the texts, if there is
            no such method or layer, or if the grid of patches is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: one of {', '.join(map(repr, METHODS))} was expected.")
    if not isinstance(model, Blip2ImageTextPreTrainedModel):
        raise ValueError(
            f"A {type(model).__name__} does not match images with texts: give a Blip2ForImageTextRetrieval or a "
            "Blip2ForPreTraining, or call query_attention_map, which needs no text."
        )
    layers = _layer_indices(model, layer)
    # Tensors made in inference mode cannot be in a graph, but their copies can
    with _without_dropout(model), torch.inference_mode(False):
        image_embeds, image_size = _image_embeds(model, pixel_values, image_embeds, image_size)
        attention_mask = None if attention_mask is None else attention_mask.clone()
        attentions = _attentions(model, method, image_embeds, input_ids.clone(), attention_mask, layers)
    return _on_grid(attentions.mean(dim=(0, 2, 3)), model, image_size, grid, normalize)


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
    Compute what the queries attend to, before any text is written. The model is left as it was.

    Args:
        model ([`Blip2PreTrainedModel`]):
            Any of the BLIP-2 models.
        pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`, *optional*):
            Images.
        image_embeds (`torch.Tensor` of shape `(num_images, features, vision hidden_size)`, *optional*):
            What [`~Blip2PreTrainedModel.get_image_embeds`] returned, instead of `pixel_values`.
        qformer_input_ids (`torch.Tensor` of shape `(num_images, text_length)`, *optional*):
            An instruction for the Q-Former, if it reads text.
        qformer_attention_mask (`torch.Tensor` of shape `(num_images, text_length)`, *optional*):
            0 at the padding of `qformer_input_ids`.
        per_query (`bool`, *optional*, defaults to `False`):
            Whether to return a map for each query instead of their mean.
        layer, grid, image_size, normalize (*optional*):
            As for [`text_heat_map`].

    Returns:
        `torch.FloatTensor` of shape `(num_images, rows, columns)`, or, with `per_query`,
        `(num_images, num_query_tokens, rows, columns)`: the mean over heads and layers.

    Raises:
        ValueError: if images are not given in one form, if there is no such layer, or if the grid of patches is
            unknown.
    """
    layers = _layer_indices(model, layer)
    with _without_dropout(model), torch.no_grad():
        image_embeds, image_size = _image_embeds(model, pixel_values, image_embeds, image_size)
        outputs = model.encode_image(
            None, image_embeds, qformer_input_ids, qformer_attention_mask, output_attentions=True
        )[2]
    attentions = torch.stack([outputs.cross_attentions[index].float() for index in layers])
    return _on_grid(attentions.mean(dim=(0, 2) if per_query else (0, 2, 3)), model, image_size, grid, normalize)


def normalize_heat_map(heat_map: torch.Tensor) -> torch.Tensor:
    """
    Shift and scale each map to [0, 1]. A flat map becomes 0.

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
    Find the rows and columns of a tower's patches. Class and register tokens stand in front of the patches.

    Args:
        vision_config (`PreTrainedConfig`):
            The tower's configuration.
        num_features (`int`):
            How many features an image has.
        image_size (`int` or `tuple[int, int]`, *optional*):
            Height and width of the images, in pixels; `vision_config.image_size` if it is not given.

    Returns:
        `tuple[int, int]`: rows and columns. Their product is at most `num_features`.

    Raises:
        ValueError: if the number of features does not fit the configuration and the size of the images.
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
        f"{num_features} features of a {vision_config.model_type!r} tower do not fit the patches ({patch} pixels) of "
        f"pictures {pixels}. Give image_size, that of the pictures, or grid=(rows, columns)."
    )


def overlay(image: Image.Image, heat_map: torch.Tensor | np.ndarray, opacity: float = 0.7) -> Image.Image:
    """
    Draw a map over a picture. The picture stays as it is where the map is 0, and becomes yellow where the map is 1.

    Args:
        image (`PIL.Image.Image`):
            The picture that the model has seen, uncropped, in any size.
        heat_map (`torch.Tensor` or `np.ndarray` of shape `(rows, columns)`):
            Values from 0 to 1.
        opacity (`float`, *optional*, defaults to 0.7):
            How much of the picture the map hides where it is 1.

    Returns:
        `PIL.Image.Image`: a new picture of the size of `image`.

    Raises:
        ValueError: if the map is not 2-D, or has values outside [0, 1].
    """
    heat = np.asarray(heat_map.cpu() if isinstance(heat_map, torch.Tensor) else heat_map, dtype=np.float32)
    if heat.ndim != 2 or not (heat.min() >= 0 and heat.max() <= 1):
        raise ValueError(
            f"The map has shape {heat.shape} and values from {heat.min():.3g} to {heat.max():.3g}, but shape (rows, "
            "columns) and values from 0 to 1 were expected. Give one map at a time; normalize_heat_map scales it."
        )
    heat = np.asarray(Image.fromarray(heat).resize(image.size, Image.Resampling.BICUBIC)).clip(0, 1)
    stops = np.linspace(0, 1, len(_COLOURS))
    colours = np.stack([np.interp(heat, stops, channel) for channel in _COLOURS.T], axis=-1)
    share = opacity * heat[..., None]
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) * (1 - share) + colours * share
    return Image.fromarray(pixels.round().astype(np.uint8))


def _attentions(model, method: str, image_embeds, input_ids, attention_mask, layers: list[int]) -> torch.Tensor:
    """
    Return the cross-attention of each layer, with `"gradcam"` times the positive part of its gradient, of shape
    `(num_layers, num_pairs, heads, queries, features)`.
    """
    num_texts, num_images = len(input_ids), len(image_embeds)
    if num_texts % num_images:
        raise ValueError(
            f"There are {num_texts} texts for {num_images} images: each image needs the same number of texts."
        )
    # Once for each text, because texts that share keys and values would share the attention too
    times = num_texts // num_images
    with torch.no_grad():
        key_values = model.get_image_key_values(image_embeds)
        key_values = tuple((k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)) for k, v in key_values)
    with torch.set_grad_enabled(method == "gradcam"):
        if method == "gradcam":
            for key, _ in key_values:
                key.requires_grad_()  # so that a frozen model has a graph too
        logits, outputs = model._match(input_ids, attention_mask, key_values, None, None, output_attentions=True)
        attentions = [outputs.cross_attentions[index] for index in layers]
        if method == "attention":
            return torch.stack(attentions).float()
        gradients = torch.autograd.grad(logits[:, 1].sum(), attentions)
    return torch.stack(attentions).detach().float() * torch.stack(gradients).float().clamp(min=0)


def _layer_indices(model: Blip2PreTrainedModel, layer: int | None) -> list[int]:
    """Return which of the recorded cross-attentions are wanted."""
    layers = [number for number, one in enumerate(model.qformer.encoder.layer) if one.has_cross_attention]
    if layer is None:
        return list(range(len(layers)))
    if layer not in layers:
        raise ValueError(f"Layer {layer} of the Q-Former has no cross-attention: one of {layers} was expected.")
    return [layers.index(layer)]


def _image_embeds(model, pixel_values, image_embeds, image_size):
    """Return `(image_embeds, image_size)`, computed from `pixel_values` if these are given."""
    if (pixel_values is None) == (image_embeds is None):
        raise ValueError("Give either pixel_values or image_embeds, the tower's output for them.")
    if pixel_values is None:
        return image_embeds, image_size
    with torch.no_grad():
        return model.get_image_embeds(pixel_values), tuple(pixel_values.shape[-2:])


@contextmanager
def _without_dropout(model: Blip2PreTrainedModel) -> Iterator[None]:
    """Turn dropout off, because with it the probabilities do not show what was attended to."""
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
    # A model in eval mode is not changed, so its maps need not wait for one another
    yield


def _on_grid(heat_map: torch.Tensor, model, image_size, grid: tuple[int, int] | None, normalize: bool) -> torch.Tensor:
    """Arrange the features of patches as rows and columns, and drop the others."""
    num_features = heat_map.shape[-1]
    rows, columns = grid or feature_grid(model.config.vision_config, num_features, image_size)
    if min(rows, columns) < 1 or rows * columns > num_features:
        raise ValueError(
            f"grid is {rows}x{columns}, but an image has {num_features} features. Give at most as many patches."
        )
    heat_map = heat_map[..., num_features - rows * columns :].unflatten(-1, (rows, columns))
    return normalize_heat_map(heat_map) if normalize else heat_map


def _map_size(num_features: int, height: int, width: int) -> tuple[int, int] | None:
    """Return the size of a feature map if exactly one stride, with or without padding, gives that many features."""
    sizes = {(height // stride, width // stride) for stride in range(1, min(height, width) + 1)}
    sizes |= {(-(-height // stride), -(-width // stride)) for stride in range(1, min(height, width) + 1)}
    fitting = [size for size in sizes if size[0] * size[1] == num_features]
    return fitting[0] if len(fitting) == 1 else None


__all__ = ["feature_grid", "normalize_heat_map", "overlay", "query_attention_map", "text_heat_map"]
