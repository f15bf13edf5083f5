"""Snippets of pages of the docs, as written, with small models under the names that they use."""

import re

import pytest
from paths import DOCS
from tiny import make_image, make_model, make_processor


@pytest.fixture
def captioner(tmp_path, monkeypatch):
    """A captioner and pictures in the current folder."""
    monkeypatch.chdir(tmp_path)
    make_model("llama").save_pretrained("captioner")
    make_processor().save_pretrained("captioner")
    for seed, name in enumerate(["cat.jpg", "dog.jpg"]):
        make_image(seed).save(name)


def run_snippets(page: str) -> dict:
    """Return the names that the snippets of a page leave."""
    namespace: dict = {}
    for snippet in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL):
        exec(compile(snippet, page, "exec"), namespace)
    return namespace


def test_scoring(captioner):
    names = run_snippets("scoring.md")
    assert names["scores"].shape == (2, 3) and names["order"].sort().values.tolist() == [[0, 1, 2]] * 2
    assert names["probabilities"].sum(dim=-1).tolist() == pytest.approx([1, 1])
