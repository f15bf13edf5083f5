"""Captions and questions come out as LAVIS makes them."""

import json
from pathlib import Path

import pytest

from blip2_hf.data import clean_caption, clean_question


PAIRS = json.loads((Path(__file__).parent / "fixtures" / "text_processing.json").read_text())


@pytest.mark.parametrize(("text", "expected"), PAIRS["caption"])
def test_captions_as_lavis_has_them(text, expected):
    assert clean_caption(text) == expected


@pytest.mark.parametrize(("text", "expected"), PAIRS["caption_with_prompt"])
def test_a_prompt_goes_in_front_of_a_cleaned_caption(text, expected):
    assert "a photo of " + clean_caption(text) == expected


@pytest.mark.parametrize(("text", "expected"), PAIRS["question"])
def test_questions_as_lavis_has_them(text, expected):
    assert clean_question(text) == expected


def test_number_of_words():
    assert clean_caption("one two. three four", max_words=3) == "one two three"
    assert clean_question("one two. three four", max_words=3) == "one two three"


def test_a_caption_that_is_cut_is_not_padded():
    assert clean_caption("one two", max_words=50) == "one two"
    # A tab alone is no run of white space, and no border of a word
    assert clean_caption("a\tb c", max_words=1) == "a\tb"
