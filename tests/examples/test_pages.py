"""The Python of all pages of the docs, as written, with small models under the names that it uses."""

import shutil

import datasets
import pytest
import torch
from docs_world import CAPTIONS, fill_folder, fill_hub_cache, run_snippets, snippets
from hub_cache import use_hub_cache
from paths import DOCS


# Pages with a test file of their own
ELSEWHERE = {"video.md", "works_with.md"}
NOT_YET = {
    "capfilt.md",
    "captioning.md",
    "checkpoints.md",
    "compatibility.md",
    "evaluation.md",
    "finetuning.md",
    "metrics.md",
    "pretraining.md",
    "retrieval.md",
    "sharing.md",
}
PAGES = [name for name in sorted(path.name for path in DOCS.glob("*.md")) if snippets(name)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = tmp_path_factory.mktemp("world")
    fill_hub_cache(world / "hub")
    (world / "work").mkdir()
    fill_folder(world / "work")
    return world


@pytest.fixture
def work(world, tmp_path, monkeypatch):
    """Work in a folder with what the docs name."""
    use_hub_cache(monkeypatch, world / "hub")
    shutil.copytree(world / "work", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def check_scoring(names: dict):
    assert names["scores"].shape == (2, 3) and names["order"].sort().values.tolist() == [[0, 1, 2]] * 2
    assert names["probabilities"].sum(dim=-1).tolist() == pytest.approx([1, 1])


def check_python(names: dict):
    model, text = names["model"], names["text"]
    assert names["loss"].isfinite()
    assert names["features"].shape == (1, 4, 32) and len(names["answers"]) == 2
    assert names["pixel_values"].shape == (2, 3, 364, 364) and len(names["samples"]) == 3
    assert torch.equal(names["second"][:, : text.shape[1]], text) and names["second"].shape[1] > text.shape[1]
    assert not any(p.requires_grad for p in model.language_model.parameters())
    assert any(p.requires_grad for p in model.qformer.parameters())


def check_performance(names: dict):
    assert {p.dtype for p in names["half"].parameters()} == {torch.bfloat16}
    quantized = [name for name, module in names["small"].named_modules() if type(module).__name__ == "Linear4bit"]
    assert {name.partition(".")[0] for name in quantized} == {"vision_model", "language_model"}
    mixed = names["mixed"]
    parts = (mixed.vision_model, mixed.qformer, mixed.language_model)
    assert [part.config._attn_implementation for part in parts] == ["sdpa", "sdpa", "eager"]
    dtypes = {name: {p.dtype for p in part.parameters()} for name, part in mixed.named_children()}
    assert dtypes.pop("language_model") == {torch.bfloat16} and set.union(*dtypes.values()) == {torch.float32}
    processor = names["processor"]
    inputs = processor(images=["cat.png", "dog.png"], text=["a photo of"] * 2, return_tensors="pt")
    expected = names["model"].generate(**inputs, max_new_tokens=20)
    assert names["captions"] == processor.post_process_image_text_to_text(expected, inputs["input_ids"])


def check_data(names: dict):
    assert names["rows"]["caption"][:] == names["few"]["caption"][:] == CAPTIONS
    assert [row["caption"] for row in names["coco"]] == [[text] for text in CAPTIONS]
    assert isinstance(names["stream"], datasets.IterableDataset)
    assert [row["txt"] for row in names["stream"]] == CAPTIONS


CHECKS = {
    "data.md": check_data,
    "performance.md": check_performance,
    "python.md": check_python,
    "scoring.md": check_scoring,
}


@pytest.mark.parametrize("page", sorted(set(PAGES) - ELSEWHERE - NOT_YET))
def test_snippets_run_as_written(page, work):
    names = run_snippets(page)
    CHECKS.get(page, bool)(names)
