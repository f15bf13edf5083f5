"""The paper's augmentation of training images."""

import math

import torch
from PIL import Image


_TRIES = 10  # to find a crop inside the image, before the largest one in its middle is taken


class RandomResizedCropAndFlip:
    r"""
    Cuts a part of random area, shape and place out of an image, scales it to a square, and mirrors it half the time,
    as the paper does with training images. Areas and shapes are drawn as in torchvision's RandomResizedCrop.

    Args:
        size (`int`):
            Side of the square, in pixels.
        scale (`tuple[float, float]`, *optional*, defaults to `(0.5, 1.0)`):
            Smallest and largest area of the part, as fractions of the image's.
        ratio (`tuple[float, float]`, *optional*, defaults to `(3 / 4, 4 / 3)`):
            Smallest and largest width of the part over its height.
        flip (`float`, *optional*, defaults to 0.5):
            Probability of mirroring.

    Raises:
        ValueError: if a range is empty or out of bounds.

    Example:

    ```python
    >>> augment = RandomResizedCropAndFlip(224)
    >>> image = augment(image, torch.Generator().manual_seed(0))
    ```"""

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] = (0.5, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
    ):
        if size < 1:
            raise ValueError(f"size={size}: the side of an image, in pixels, was expected.")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale={scale}: (smallest, largest) within (0, 1] was expected.")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio={ratio}: (smallest, largest), both above 0, was expected.")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip={flip}: a probability was expected.")
        self.size = size
        self.scale = scale
        self.ratio = ratio
        self.flip = flip

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.size}, scale={self.scale}, ratio={self.ratio}, flip={self.flip})"

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        r"""
        Augment an image.

        Args:
            image (`PIL.Image.Image`):
                The image.
            generator (`torch.Generator`):
                Source of all randomness.

        Returns:
            `PIL.Image.Image`: of `size` by `size` pixels, in the same mode.
        """
        left, top, width, height = self.draw_box(*image.size, generator)
        box = (left, top, left + width, top + height)
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        flipped = _uniform(0, 1, generator) < self.flip
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else image

    def draw_box(self, width: int, height: int, generator: torch.Generator) -> tuple[int, int, int, int]:
        r"""
        Draw the part of an image to cut out.

        Args:
            width, height (`int`):
                Size of the image.
            generator (`torch.Generator`):
                Source of all randomness.

        Returns:
            `tuple[int, int, int, int]`: left, top, width and height.
        """
        for _ in range(_TRIES):
            area = width * height * _uniform(*self.scale, generator)
            ratio = math.exp(_uniform(math.log(self.ratio[0]), math.log(self.ratio[1]), generator))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return _up_to(width - w, generator), _up_to(height - h, generator), w, h
        w = max(1, min(width, round(height * self.ratio[1])))
        h = max(1, min(height, round(width / self.ratio[0])))
        return (width - w) // 2, (height - h) // 2, w, h


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def _up_to(largest: int, generator: torch.Generator) -> int:
    return int(torch.randint(largest + 1, (), generator=generator))
