"""The size of the images that a tower sees: the whole of each image, as a square."""

from typing import Any

import numpy as np
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil


_TOLERANCE = 0.1  # of the range of values: crops and padding differ by far more, resampling by less


def with_image_size(image_processor: Any, image_size: int | None) -> Any:
    r"""
    Make an image processor that scales the whole of any image to a square and cuts nothing off. Image processors of
    CLIP and DINOv2 otherwise crop the middle, even if their `size` is set.

    Mean, standard deviation and resampling stay. An image processor that always crops (ConvNeXt's, timm's) is replaced
    by [`~transformers.BlipImageProcessor`] with the same ones.

    Args:
        image_processor (`BaseImageProcessor`):
            The image processor. It is not changed.
        image_size (`int`, *optional*):
            Side of the square, in pixels. `None` returns `image_processor` itself.

    Returns:
        `BaseImageProcessor`: the new image processor.

    Raises:
        ValueError: if this kind of image processor does not make squares of whole images.

    Example:

    ```python
    >>> processor.image_processor = with_image_size(processor.image_processor, 364)
    >>> processor.save_pretrained(folder)  # loading it gives the same size
    ```"""
    if image_size is None:
        return image_processor
    if image_size < 1:
        raise ValueError(f"image_size={image_size}: the side of an image, in pixels, was expected.")
    settings = image_processor.to_dict()
    square: dict[str, Any] = {"size": {"height": image_size, "width": image_size}}
    try:
        if "data_config" in settings:
            timm = settings["data_config"]
            resample = Image.Resampling[timm["interpolation"].upper()]
            own = {"resample": resample, "image_mean": list(timm["mean"]), "image_std": list(timm["std"])}
            sized = BlipImageProcessorPil(**square, **own)
        elif "crop_pct" in settings:
            names = ("resample", "image_mean", "image_std", "do_rescale", "rescale_factor", "do_normalize")
            sized = BlipImageProcessorPil(**square, **{name: settings[name] for name in names if name in settings})
        else:
            square |= {"do_resize": True, "do_center_crop": False}
            if settings.get("do_pad"):
                square["do_pad"] = False
            sized = type(image_processor).from_dict(settings | square)
        is_whole = _scales_whole_images(sized, image_size)
    except Exception as error:  # image processors raise errors of any kind
        raise ValueError(_refusal(image_processor, image_size)) from error
    if not is_whole:
        raise ValueError(_refusal(image_processor, image_size))
    return sized


def own_image_size(image_processor: Any) -> dict[str, int]:
    """Return the size of the images that an image processor returns."""
    is_cropped = getattr(image_processor, "do_center_crop", None)
    size = image_processor.crop_size if is_cropped else image_processor.size
    return {name: value for name, value in dict(size).items() if value is not None}


def _scales_whole_images(image_processor: Any, image_size: int) -> bool:
    """Return whether a wide ramp from dark to bright gives the same values as a square one."""
    ramp = Image.linear_gradient("L").transpose(Image.Transpose.ROTATE_90).convert("RGB")
    pictures = [ramp.resize((4 * image_size, image_size)), ramp.resize((image_size, image_size))]
    wide, square = (np.asarray(image_processor(images=[p], return_tensors="np")["pixel_values"]) for p in pictures)
    shape = (1, 3, image_size, image_size)
    return wide.shape == square.shape == shape and bool(np.abs(wide - square).max() < _TOLERANCE * np.ptp(square))


def _refusal(image_processor: Any, image_size: int) -> str:
    return (
        f"{type(image_processor).__name__} can't be set to scale whole pictures to {image_size}x{image_size} pixels. "
        f"Give one that can, such as ViTImageProcessor(size={{'height': {image_size}, 'width': {image_size}}}, "
        "image_mean=..., image_std=...), with the mean and standard deviation of the tower."
    )
