"""docs/pretraining.md, as written: pictures with captions become a model of stage 1, a captioner, and its captions."""

import json
import shlex
from pathlib import Path

import datasets
import pytest
import torch
from docs_world import commands, fill_hub_cache
from hub_cache import use_hub_cache
from tiny import CAPTIONS, assert_sees_the_whole, make_image

from blip2_hf import Blip2ForConditionalGeneration, Blip2ForPreTraining, Blip2Processor
from blip2_hf.cli import main
from blip2_hf.data import load_cached_features


COMMANDS = [line for line in commands("pretraining.md") if line.startswith("blip2-hf ")]
PICTURES = 68  # a batch of the page, and those that are held out


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Work in a folder with `photos`, which have captions, and `holidays`, which have none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    use_hub_cache(monkeypatch, tmp_path / "hub")
    fill_hub_cache(tmp_path / "hub")
    for folder, count in (("photos", PICTURES), ("holidays", 3)):
        Path(folder).mkdir()
        for seed in range(count):
            make_image(seed).save(f"{folder}/{seed:02}.png")
    for seed in range(PICTURES):
        Path(f"photos/{seed:02}.txt").write_text(CAPTIONS[seed % len(CAPTIONS)])


def run(command: str):
    """Run a line of the page, with one epoch."""
    _, name, *words = shlex.split(command)
    if "--epochs" in words:
        words[words.index("--epochs") + 1] = "1"
    main([name, *words, "--device", "cpu"])


def steps(folder: str) -> int:
    """Return the number of steps of the last checkpoint."""
    states = [json.loads(path.read_text()) for path in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return max(state["global_step"] for state in states)


def tower_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that no stage trains."""
    return {
        name: weight
        for name, weight in model.state_dict().items()
        if name.startswith("vision_model.") and "post_layernorm" not in name
    }


def assert_learned(model: torch.nn.Module, before: torch.nn.Module):
    start = before.state_dict()
    names = [name for name in model.state_dict() if name.startswith("qformer.")]
    assert any(not torch.equal(model.state_dict()[name], start[name]) for name in names)


def test_the_page_runs_as_written(work):
    kinds = ["pretrain", "pretrain", "caption", "cache-features", "pretrain"]
    assert [command.split()[1] for command in COMMANDS] == kinds
    first, second, caption, cache, from_features = COMMANDS

    run(first)
    assert steps("stage1") == 1
    stage1 = Blip2ForPreTraining.from_pretrained("stage1")
    assert stage1.config.vision_config.model_type == "dinov2" and stage1.config.num_query_tokens == 32
    # The whole picture, which the tower's own processor crops
    assert_sees_the_whole(Blip2Processor.from_pretrained("stage1").image_processor, 224)

    run(second)
    assert steps("stage2") == 2  # a batch of 64 and one of the rest
    assert Path("stage2/samples.md").read_text().count("## Step 2") == 1
    stage2 = Blip2ForConditionalGeneration.from_pretrained("stage2")
    assert_learned(stage2, stage1)
    tower = tower_of(stage1)
    assert tower and all(torch.equal(tower_of(stage2)[name], weight) for name, weight in tower.items())

    run(caption)
    rows = [json.loads(line) for line in Path("captions.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == ["00.png", "01.png", "02.png"]
    # As by hand
    processor = Blip2Processor.from_pretrained("stage2")
    generated = stage2.eval().generate(**processor(images="holidays/00.png", return_tensors="pt"), max_new_tokens=30)
    assert processor.post_process_image_text_to_text(generated) == [rows[0]["caption"]]

    run(cache)
    features = load_cached_features("features")
    assert len(features) == PICTURES
    run(from_features)
    again = Blip2ForPreTraining.from_pretrained("from_features")
    assert tower.keys() == tower_of(again).keys()
    assert_learned(again, stage1)
