"""Captions and questions come out as LAVIS makes them, prefixes as the paper cuts them."""

import json

import pytest
import torch
from paths import FIXTURES

from blip2_hf.data import clean_caption, clean_question, split_prefix
from blip2_hf.data.text import texts_of


PAIRS = json.loads((FIXTURES / "text_processing.json").read_text())


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


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_split_is_uniform_over_the_words():
    random = generator()
    parts = [split_prefix("a dog on the grass", random) for _ in range(5000)]
    expected = {("a dog on the grass"[: i - 1] if i else "", "a dog on the grass"[i:]) for i in (0, 2, 6, 9, 13)}
    assert set(parts) == expected
    assert all(parts.count(part) == pytest.approx(1000, abs=110) for part in expected)


def test_a_split_loses_no_word():
    text, random = "two people riding a bike near the street", generator(1)
    for _ in range(50):
        prefix, suffix = split_prefix(text, random)
        assert suffix and (f"{prefix} {suffix}" if prefix else suffix) == text
    # White space inside the parts stays
    assert {split_prefix(" a  b\tc ", random) for _ in range(60)} == {
        ("", "a  b\tc "),
        (" a", "b\tc "),
        (" a  b", "c "),
    }


def test_a_split_of_one_word_and_of_none():
    assert split_prefix("dog", generator()) == ("", "dog")
    for text in ("", " \n"):
        with pytest.raises(ValueError, match="at least one word"):
            split_prefix(text, generator())


def test_only_the_generator_decides_on_a_split():
    text = "one two three four five six seven eight"
    first = [split_prefix(text, generator(3)) for _ in range(2)]
    state = torch.random.get_rng_state()
    assert split_prefix(text, generator(3)) == first[0] == first[1]
    torch.testing.assert_close(torch.random.get_rng_state(), state)
    assert len({split_prefix(text, generator(seed)) for seed in range(20)}) > 3


def test_texts_of_a_column():
    answers = [{"answer": "red", "answer_id": 1}, {"answer": "dark red", "answer_id": 2}]
    assert texts_of(answers) == texts_of({"answer": ["red", "dark red"], "answer_id": [1, 2]}) == ["red", "dark red"]
    assert texts_of("red") == texts_of(["red"]) == ["red"]
    assert texts_of([]) == [] and texts_of(None) == [None] and texts_of({"raw": "red"}) == [{"raw": "red"}]
