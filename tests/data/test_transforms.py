"""The augmentation draws what the paper's does, from its generator alone."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_image

from blip2_hf.data import RandomResizedCropAndFlip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (1000, 1000)])
def test_areas_and_shapes_fill_their_ranges(size):
    augment, random = RandomResizedCropAndFlip(224), generator()
    boxes = np.array([augment.draw_box(*size, random) for _ in range(2000)])
    left, top, width, height = boxes.T
    assert (left >= 0).all() and (top >= 0).all()
    assert (left + width <= size[0]).all() and (top + height <= size[1]).all()
    areas, ratios = width * height / (size[0] * size[1]), width / height
    # Whole pixels: a little beside what was drawn
    assert areas.min() > 0.5 - 0.01 and areas.max() <= 1
    assert ratios.min() > 3 / 4 - 0.01 and ratios.max() < 4 / 3 + 0.01
    assert areas.min() < 0.52 and areas.max() > 0.95
    assert ratios.min() < 0.77 and ratios.max() > 1.3


def test_draws_are_uniform_where_every_crop_fits():
    augment, random = RandomResizedCropAndFlip(224, scale=(0.1, 0.5)), generator()
    left, top, width, height = np.array([augment.draw_box(1000, 1000, random) for _ in range(4000)]).T
    for values in (
        (width * height / 1e6 - 0.1) / 0.4,
        (np.log(width / height) - math.log(3 / 4)) / math.log(16 / 9),
        left / (1000 - width),
        top / (1000 - height),
    ):
        assert np.histogram(values, bins=4, range=(0, 1))[0] == pytest.approx([1000] * 4, abs=120)


def test_a_picture_that_no_crop_fits_is_cut_in_the_middle():
    augment = RandomResizedCropAndFlip(8)
    assert augment.draw_box(1000, 10, generator()) == (493, 0, 13, 10)
    assert augment.draw_box(10, 1000, generator()) == (0, 493, 10, 13)
    augment = RandomResizedCropAndFlip(8, scale=(1, 1), ratio=(1, 1.3))
    assert augment.draw_box(120, 100, generator()) == (0, 0, 120, 100)
    assert augment(Image.new("RGB", (1, 1)), generator()).size == (8, 8)


def test_half_of_the_pictures_are_mirrored():
    ramp = Image.fromarray(np.tile(np.arange(0, 250, 5, dtype=np.uint8), (50, 1)))
    augment, random = RandomResizedCropAndFlip(8), generator()
    mirrored = 0
    for _ in range(400):
        row = np.asarray(augment(ramp, random))[0].astype(int)
        assert (np.diff(row) > 0).all() or (np.diff(row) < 0).all()
        mirrored += row[0] > row[-1]
    assert 160 < mirrored < 240
    assert np.asarray(RandomResizedCropAndFlip(8, flip=0)(ramp, random))[0, 0] < 125
    assert np.asarray(RandomResizedCropAndFlip(8, flip=1)(ramp, random))[0, 0] > 125


def test_the_crop_is_what_is_shown():
    image, augment = make_image(size=(64, 48)), RandomResizedCropAndFlip(16, flip=0)
    left, top, width, height = augment.draw_box(64, 48, generator(5))
    part = image.crop((left, top, left + width, top + height)).resize((16, 16), Image.Resampling.BICUBIC)
    shown = augment(image, generator(5))
    inner = (slice(4, 12), slice(4, 12))
    # The filter looks over the border of the part; inside there is no difference
    np.testing.assert_array_equal(np.asarray(shown)[inner], np.asarray(part)[inner])


def test_only_the_generator_decides():
    image, augment = make_image(), RandomResizedCropAndFlip(16)
    torch.manual_seed(1)
    first = augment(image, generator(3)).tobytes()
    state = torch.random.get_rng_state()
    assert augment(image, generator(3)).tobytes() == first
    assert augment(image, generator(4)).tobytes() != first
    torch.testing.assert_close(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("options", [{"scale": (0, 1)}, {"scale": (0.8, 0.5)}, {"ratio": (0, 1)}, {"flip": 2}])
def test_ranges_that_make_no_sense(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        RandomResizedCropAndFlip(224, **options)
