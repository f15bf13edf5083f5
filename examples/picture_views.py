"""Random versions of a drawing, for training on few pictures."""

import torch
from PIL import Image, ImageEnhance, ImageOps


class RandomView:
    """
    Mirrors a picture at random, rotates it a little, zooms, and changes its colours.

    Args:
        side (`int`, *optional*, defaults to 160):
            Side of the result, in pixels.
    """

    def __init__(self, side: int = 160):
        self.side = side

    def __repr__(self):  # cache_features writes this into the fingerprint of its features
        return f"RandomView({self.side})"

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        def draw(low: float, high: float) -> float:
            return low + (high - low) * torch.rand((), generator=generator).item()

        white, side = (255, 255, 255), self.side
        image = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        image = ImageOps.mirror(image) if draw(0, 1) < 0.5 else image
        image = image.rotate(draw(-15, 15), Image.Resampling.BICUBIC, fillcolor=white)
        zoom = draw(0.8, 1.25)
        x, y = (side / 2 + draw(-0.1, 0.1) * side - zoom * side / 2 for _ in range(2))
        window = (zoom, 0, x, 0, zoom, y)
        image = image.transform(image.size, Image.Transform.AFFINE, window, Image.Resampling.BICUBIC, fillcolor=white)
        for change, low, high in (
            (ImageEnhance.Color, 0.6, 1.4),
            (ImageEnhance.Brightness, 0.8, 1.1),
            (ImageEnhance.Contrast, 0.8, 1.2),
        ):
            image = change(image).enhance(draw(low, high))
        return image
