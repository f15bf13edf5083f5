"""The sheet that `blip2-hf look` draws: letters that can be read, and a size that can be opened."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from saved_models import save_captioner, save_stage1
from tiny import make_image

from blip2_hf.cli import main
from blip2_hf.cli.look import draw_sheet


TITLES = ["a red bus: match 0.93", "red: match 0.12"]
MAPS = torch.rand(2, 4, 4)


def height_of_letters(size: tuple[int, int]) -> int:
    sheet = draw_sheet(Image.new("RGB", size, "white"), MAPS[:1] * 0, TITLES[:1], math.inf)
    rows = (np.asarray(sheet.convert("L"))[: sheet.height - size[1]] < 128).any(axis=1).nonzero()[0]
    return rows[-1] - rows[0] + 1


def test_letters_grow_with_the_picture():
    heights = [height_of_letters(size) for size in ((200, 100), (1000, 1000), (4000, 3000))]
    assert 8 <= heights[0] < 16 and heights[1] > 2 * heights[0] and heights[2] > 3 * heights[1]


def test_a_sheet_of_a_large_picture_is_smaller():
    picture = Image.new("RGB", (6000, 4000), "navy")
    sheet = draw_sheet(picture, MAPS, TITLES)
    assert 7_000_000 < sheet.width * sheet.height <= 8_000_000
    # The picture keeps its shape
    drawn = (np.asarray(sheet)[..., :] != 255).any(axis=-1)
    rows, columns = drawn.all(axis=1) | drawn[:, :100].all(axis=1), drawn[-1]
    assert abs(columns.sum() / 2 / rows.sum() - 1.5) < 0.02
    assert draw_sheet(picture, MAPS, TITLES, math.inf).width > 12_000
    small = draw_sheet(make_image(size=(40, 30)), MAPS, TITLES)
    assert small.height < 60 and small.width < 500


@pytest.mark.parametrize("options, is_full", [([], False), (["--full-size"], True)])
def test_the_command(tmp_path, options, is_full):
    save_captioner(tmp_path / "model")
    Image.new("RGB", (4000, 3000), "navy").save(tmp_path / "large.png")
    output = tmp_path / "map.png"
    arguments = [str(tmp_path / "large.png"), "--model", str(tmp_path / "model"), "--output", str(output)]
    main(["look", *arguments, *options])
    with Image.open(output) as sheet:
        assert (sheet.width == 4000) == is_full and (sheet.width * sheet.height <= 8_000_000) != is_full


def test_an_empty_text_is_refused(tmp_path):
    save_stage1(tmp_path / "model")
    make_image().save(tmp_path / "a.png")
    for text in ("", " "):
        arguments = [str(tmp_path / "a.png"), text, "--model", str(tmp_path / "model")]
        with pytest.raises(SystemExit, match="TEXT is empty"):
            main(["look", *arguments, "--output", str(tmp_path / "map.png")])
    assert not (tmp_path / "map.png").exists()
