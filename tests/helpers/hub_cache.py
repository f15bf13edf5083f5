"""A cache of the Hub with models of ours under the names of published ones."""

from pathlib import Path

import pytest


def use_hub_cache(monkeypatch: pytest.MonkeyPatch, cache: Path):
    """Let all libraries look for models in a folder, and nowhere else."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))


def add_to_hub_cache(cache: Path, repo_id: str) -> Path:
    """Return a folder that huggingface_hub takes for the downloaded `repo_id`."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    return snapshot
