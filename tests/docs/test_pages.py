"""The Python of all pages of the docs, as written, with small models under the names that it uses."""

import json
import math
import re
import shlex
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from docs_world import CAPTIONS, commands, fill_folder, fill_hub_cache, run_snippets, snippets
from hub_cache import use_hub_cache
from paths import DOCS
from picture_server import picture_server
from safetensors.torch import load_file
from tiny import assert_sees_the_whole, make_image
from transformers import EvalPrediction

from blip2_hf import Blip2ForConditionalGeneration, Blip2ForPreTraining, Blip2Processor
from blip2_hf.cli import main


# Pages with a test file of their own
ELSEWHERE = {"faq.md", "share.md", "video.md", "works_with.md"}
# What users install besides, for some snippets
NEEDED = {"finetuning.md": ("bitsandbytes", "trl"), "performance.md": ("bitsandbytes",)}
PAGES = [name for name in sorted(path.name for path in DOCS.glob("*.md")) if snippets(name)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    torch.manual_seed(0)
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
    assert names["answers"].index == 1 and len(names["answers"].texts) == 2
    assert [*names["written"][0]] == ["answer"] and {row["answer"] for row in names["is_true"]} == {"yes", "no"}
    assert sum(row["score"] for row in names["chosen"]) == pytest.approx(1)


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


def check_captioning(names: dict):
    assert names["captioned"]["caption"] == ["a red bus", "a dog"]
    assert names["captioned"]["new_caption"] == ["caption 1", "caption 0"]
    assert names["caption"].index == 1 and names["caption"].error is None
    assert names["counts"].captioned == len(datasets.load_dataset("parquet", data_files="captions.parquet")["train"])
    assert len(names["best"].texts) == 1


def check_search(names: dict):
    assert {Path(path).name for path, _ in names["alike"]} == {"0.png", "1.png"} and names["index"].broken() == {}
    assert names["similarity"].shape == names["match_probability"].shape == names["probability"].shape == (2, 3)
    assert names["matching"].shape == (2, 3, 2)
    assert {row["label"] for row in names["labels"]} == {"cat", "bus"}
    first = names["rankings"].image_to_text.index[:, 0].tolist()
    assert names["best_caption"] == first[0] and names["scores"].diff() <= 0
    assert names["recall"]["image_to_text_r1"] == ((first[0] == 0) + (first[1] == 1)) / 2


def check_capfilt(names: dict):
    kept = {"a dog", "a cat on a mat"}, {"a cat on a mat", "two dogs"}
    assert all(pair["text"] in own for pair, own in zip(names["pairs"], kept, strict=True))
    expected = [["a dog", "a cat on a mat", "two dogs"], ["a cat on a mat", "two dogs"]]
    assert names["three"]["kept_captions"] == expected
    assert names["trusted"]["caption"] == ["a dog"]
    assert names["worst"] == [1, 0]
    assert names["counts"].originals == 2


def check_evaluation(names: dict):
    assert names["captions"]["num_scored"] == {"overall": 2} and "CIDEr-D" in names["captions"]["scores"]
    assert names["answers"]["settings"]["protocol"] == "official"
    assert {"f1", "unclear_ratio"} < set(names["objects"]["scores"])
    assert "CHAIRs" in names["invented"]["scores"]
    assert names["generated"].shape[0] == 1


def check_metrics(names: dict):
    predictions = names["processor"].tokenizer(["a dog", "a red bus"], padding=True, return_tensors="np").input_ids
    for metrics, score in ((names["of_captions"], "CIDEr-D"), (names["of_answers"], "vqa_accuracy")):
        scores = metrics(EvalPrediction(predictions, predictions))
        assert scores["exact_match"] == 1 and score in scores


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
    "capfilt.md": check_capfilt,
    "captioning.md": check_captioning,
    "data.md": check_data,
    "evaluation.md": check_evaluation,
    "finetuning.md": check_finetuning,
    "metrics.md": check_metrics,
    "performance.md": check_performance,
    "pretraining.md": check_pretraining,
    "python.md": check_python,
    "scoring.md": check_scoring,
    "search.md": check_search,
}


@pytest.mark.parametrize("page", sorted(set(PAGES) - ELSEWHERE))
def test_snippets_run_as_written(page, work):
    for package in NEEDED.get(page, ()):
        pytest.importorskip(package)
    names = run_snippets(page)
    CHECKS.get(page, bool)(names)


def test_the_metrics_are_those_of_the_comments(work, capsys):
    comments = re.findall(r"^print\(.*\)  # (.*)$", "\n".join(snippets("metrics.md")), flags=re.MULTILINE)
    run_snippets("metrics.md")
    assert capsys.readouterr().out.splitlines() == comments and len(comments) == 7


def own_commands(page: str) -> list[list[str]]:
    """Return the words behind `blip2-hf` of the commands of a page."""
    lines = [shlex.split(line) for line in commands(page)]
    return [words[1:] for words in lines if words[:1] == ["blip2-hf"]]


def read_lines(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def test_the_commands_that_caption_a_collection(work, capsys):
    shutil.rmtree("photos")
    Path("photos").mkdir()
    names = ["1.jpg", "2.jpg"]
    for seed, name in enumerate(names):
        make_image(seed).save(Path("photos", name))
    written, one, several, prefixed, printed, prepended, of_rows, best = own_commands("captioning.md")

    def run(command: list[str]) -> list[str]:
        capsys.readouterr()
        main(command)
        return capsys.readouterr().out.splitlines()

    def texts() -> list[str]:
        return [" ".join(Path("photos", name).with_suffix(".txt").read_text().split()) for name in names]

    run(written)
    assert [row["file"] for row in read_lines("captions.jsonl")] == names
    (caption,) = run(one)
    with picture_server() as server:
        lines = run([f"{server.url}/picture.png" if word.startswith("https") else word for word in several])
    assert [line.split("\t")[0] for line in lines[:2]] == ["photos/1.jpg", "photos/2.jpg"] and len(lines) == 3
    assert caption and all(line.split("\t")[1] for line in lines)

    run(prefixed)
    captions = [line.split("\t")[1] for line in run(printed)]
    assert texts() == [f"sks dog, {caption}" for caption in captions]
    Path("photos", "1.txt").write_text("sks dog, corrected")
    run(prefixed)
    before = texts()
    assert before == ["sks dog, corrected", f"sks dog, {captions[1]}"]
    run(prepended)
    for text, caption, old in zip(texts(), captions, before, strict=True):
        assert text.startswith(caption) and text.endswith(f" {old}") and len(text) <= len(caption) + len(old) + 2

    Path("row_captions.jsonl").unlink()
    run(of_rows)
    run(best)
    assert [row["file"] for row in read_lines("best.jsonl")] == names
    # The Python of the page reads what the commands have written
    joined = run_snippets("captioning.md")["captioned"]
    assert joined["new_caption"] == [row["caption"] for row in read_lines("row_captions.jsonl")]
    assert joined["caption"] == ["a dog", "a red bus"]


@pytest.mark.parametrize("page", ["capfilt.md", "search.md"])
def test_the_python_of_a_page_reads_what_its_commands_write(page, work):
    for name in ("filtered", "scored", "features"):
        shutil.rmtree(name)
    for command in own_commands(page):
        main(command)
    names = run_snippets(page)
    if page == "capfilt.md":
        assert [row["is_original"] for row in sum(names["scored"]["candidates"][:], [])] == [True, True]
        assert all(len(row) > 2 for row in names["filtered"]["candidates"])
        good = [row[0]["score"] >= 0 for row in names["scored"]["candidates"]]
        assert len(datasets.load_dataset("clean", split="train")) == sum(good)
    else:
        assert Path("search.png").is_file() and len(names["features"]) == 2
