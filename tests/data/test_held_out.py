"""Rows of one picture stay together, whatever their data have to tell it by."""

import datasets
import pytest
from tiny import make_image

from blip2_hf.data import ImageTextPairs, find_id_column, hold_out, with_picture_ids
from blip2_hf.data.rows import PICTURE_ID


def make_rows(images: list, column: str = "image") -> datasets.Dataset:
    rows = datasets.Dataset.from_dict({column: images, "caption": [f"text {n}" for n in range(len(images))]})
    return rows.cast_column(column, datasets.Image())


@pytest.mark.parametrize("column", ["image", "picture"])
def test_rows_of_an_embedded_picture_have_one_id(column):
    rows = make_rows([make_image(number % 3) for number in range(12)], column)
    assert find_id_column(rows, column) is None
    rows = with_picture_ids(rows, column)
    assert find_id_column(rows, column) == PICTURE_ID and rows[0][column].size
    ids = rows[PICTURE_ID][:]
    assert len(set(ids)) == 3 and ids == ids[:3] * 4
    train, held_out = hold_out(rows, 1, PICTURE_ID)
    assert len(held_out) == 4 and not set(held_out[PICTURE_ID]) & set(train[PICTURE_ID])
    pairs = ImageTextPairs(rows, column, id_column=PICTURE_ID)
    assert pairs[0]["image_id"] == pairs[3]["image_id"] != pairs[1]["image_id"]
    assert with_picture_ids(rows, column) is rows


def test_pictures_that_begin_alike_have_different_ids():
    images = [bytes(2**17) + bytes([value]) for value in (0, 1, 0)]
    rows = make_rows([{"bytes": image, "path": None} for image in images])
    first, second, third = with_picture_ids(rows)[PICTURE_ID]
    assert first == third != second


def test_files_and_rows_without_a_picture(tmp_path):
    for number in range(2):
        make_image(number).save(tmp_path / f"{number}.png")
    paths = [str(tmp_path / f"{number}.png") for number in (0, 1, 0)]
    ids = with_picture_ids(make_rows([*paths, None, None]))[PICTURE_ID][:]
    assert ids[0] == ids[2] and len(set(ids)) == 4


def test_what_has_no_pictures_stays_as_it_is():
    rows = datasets.Dataset.from_dict({"caption": ["a dog"]})
    stream = make_rows([make_image(0)]).to_iterable_dataset()
    assert with_picture_ids(rows) is rows and with_picture_ids(stream) is stream
