"""The Python of all pages of the docs, as written, with small models under the names that it uses."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from docs_world import fill_folder, fill_hub_cache, run_snippets, snippets
from hub_cache import use_hub_cache
from paths import DOCS
from safetensors.torch import load_file
from tiny import assert_sees_the_whole

from blip2_hf import Blip2ForConditionalGeneration, Blip2ForPreTraining, Blip2Processor


# Pages with a test file of their own
ELSEWHERE = {"share.md", "video.md", "works_with.md"}
NOT_YET = {
    "capfilt.md",
    "captioning.md",
    "data.md",
    "evaluation.md",
    "guide.md",
    "metrics.md",
    "retrieval.md",
}
# What users install besides, for some snippets
NEEDED = {"finetuning.md": ("bitsandbytes", "trl")}
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


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def check_pretraining(names: dict):
    assert names["similarity"].shape == (2, 2) and len(names["captions"]) == 2
    stage1 = Blip2ForPreTraining.from_pretrained("stage1")
    stage2 = Blip2ForConditionalGeneration.from_pretrained("stage2")
    assert torch.equal(stage1.query_tokens.weight, names["stage1"].query_tokens.weight)
    assert not torch.equal(stage1.query_tokens.weight, stage2.query_tokens.weight)
    for folder in ("stage1", "stage2"):
        assert_sees_the_whole(Blip2Processor.from_pretrained(folder).image_processor, 224)
    state = names["trainer"].state
    assert state.global_step == 2 and math.isfinite(state.log_history[-1]["train_loss"])
    for model in (names["stage2"], names["model"]):
        parts = {name.partition(".")[0] for name in trained(model)}
        assert parts == {"vision_model", "query_tokens", "qformer", "language_projection"}
        assert {name for name in trained(model) if name.startswith("vision_model.")} == {
            "vision_model.post_layernorm.weight",
            "vision_model.post_layernorm.bias",
        }
    assert names["model"].config.num_query_tokens == 16


def check_finetuning(names: dict):
    # Adapters, and the prompt that they learned behind
    assert Path("captioner/adapter_config.json").is_file() and not Path("captioner/config.json").exists()
    weights = load_file("captioner/adapter_model.safetensors")
    assert weights and all("language_model." in name and "lora_" in name for name in weights)
    assert any(weight.any() for name, weight in weights.items() if "lora_B" in name)
    assert Blip2Processor.from_pretrained("captioner").prompt == "a photo of"
    assert "CIDEr-D" in Path("captioner/samples.md").read_text()
    # PEFT's own
    adapted = trained(names["adapted"])
    assert {name.split(".")[2] for name in adapted if "lora_" not in name} == {"query_tokens", "language_projection"}
    assert {name.split(".")[2] for name in adapted if "lora_" in name} == {"qformer", "language_model"}
    # In 8 bits
    parts = names["model"].named_modules()
    kinds = {name.partition(".")[0] for name, part in parts if "bitsandbytes" in type(part).__module__}
    assert kinds == {"language_model"}
    # By reward
    assert any("rewards/cider_d/mean" in entry for entry in names["trainer"].state.log_history)
    Blip2ForConditionalGeneration.from_pretrained("rewarded")
    before, after = (Blip2Processor.from_pretrained(name) for name in ("stage2", "rewarded"))
    assert before.apply_chat_template(names["question"]) == after.apply_chat_template(names["question"])


CHECKS = {"finetuning.md": check_finetuning, "pretraining.md": check_pretraining, "scoring.md": check_scoring}


@pytest.mark.parametrize("page", sorted(set(PAGES) - ELSEWHERE - NOT_YET))
def test_snippets_run_as_written(page, work):
    for package in NEEDED.get(page, ()):
        pytest.importorskip(package)
    names = run_snippets(page)
    CHECKS.get(page, bool)(names)
