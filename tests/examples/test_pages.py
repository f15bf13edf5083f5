"""The Python of all pages of the docs, as written, with small models under the names that it uses."""

import shutil

import pytest
from docs_world import fill_folder, fill_hub_cache, run_snippets, snippets
from hub_cache import use_hub_cache
from paths import DOCS


# Pages with a test file of their own
ELSEWHERE = {"share.md", "video.md", "works_with.md"}
NOT_YET = {
    "capfilt.md",
    "captioning.md",
    "data.md",
    "evaluation.md",
    "finetuning.md",
    "guide.md",
    "metrics.md",
    "pretraining.md",
    "retrieval.md",
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


CHECKS = {"scoring.md": check_scoring}


@pytest.mark.parametrize("page", sorted(set(PAGES) - ELSEWHERE - NOT_YET))
def test_snippets_run_as_written(page, work):
    names = run_snippets(page)
    CHECKS.get(page, bool)(names)
