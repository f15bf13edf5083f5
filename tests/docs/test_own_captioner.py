"""docs/own_captioner.md, as written: drawings are captioned, corrected, learned from, searched and scored."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import datasets
import pytest
import torch
from hub_cache import add_to_hub_cache, use_hub_cache
from paths import DOCS, REPOSITORY
from peft import AutoPeftModel
from safetensors.torch import load_file
from saved_models import save_captioner, save_stage1

from blip2_hf import Blip2Processor
from blip2_hf.cli import main
from blip2_hf.data import load_rows


PAGE = (DOCS / "own_captioner.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
CORRECTED = "a red fox sits and looks to the left"


def write_drawings(folder: Path, rows: datasets.Dataset) -> list[str]:
    """Write pictures as files, half of them in a folder inside of the folder, and return their names."""
    names = []
    for number, row in enumerate(rows):
        name = f"{'more/' if number % 2 and row['name'] != 'fox' else ''}{row['name'].replace(' ', '-')}.png"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
        names.append(name)
    return sorted(names)


@pytest.fixture
def names(tmp_path, monkeypatch) -> list[str]:
    """Work in a folder with `photos`, and with `held_out`, whose captions people wrote. Return the names of photos."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    use_hub_cache(monkeypatch, tmp_path / "hub")
    save_captioner(add_to_hub_cache(tmp_path / "hub", "Salesforce/blip2-opt-2.7b"))
    save_stage1(add_to_hub_cache(tmp_path / "hub", "Salesforce/blip2-itm-vit-g"))
    drawings = str(REPOSITORY / "examples" / "data" / "emoji" / "test.parquet")
    rows = datasets.load_dataset("parquet", data_files=drawings, split="train[:14]")
    for name in write_drawings(Path("held_out"), rows.select([12, 13])):
        Path("held_out", name).with_suffix(".txt").write_text("a drawing of an animal\n")
    return write_drawings(Path("photos"), rows.select(range(12)))


def run(command: str, capsys: pytest.CaptureFixture) -> str:
    """Run a line of the page, and return what it prints."""
    capsys.readouterr()
    program, *words = shlex.split(command)
    if program == "blip2-hf":
        main(words)
        return capsys.readouterr().out
    return subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout


def texts(folder: str) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text().strip() for path in Path(folder).rglob("*.txt")}


def read_by_datasets(*arguments, **kwargs) -> dict[str, str]:
    """Return the captions of `photos`, by the names of the pictures."""
    rows = datasets.load_dataset(*arguments, split="train", **kwargs)
    folder = Path("photos").resolve()
    return {Path(row["image"].filename).resolve().relative_to(folder).as_posix(): row["caption"] for row in rows}


def test_the_page_runs_as_written(names, capsys):
    commands = [line for line in COMMANDS if not line.startswith(("pip ", "hf "))]
    kinds = ["caption", "echo", "ask", "finetune", "caption", "caption", "index", "search", "evaluate"]
    assert [line.removeprefix("blip2-hf ").split()[0] for line in commands] == kinds
    caption, correct, ask, finetune, caption_again, to_metadata, index, search, evaluate = commands

    run(caption, capsys)
    captions = texts("photos")
    assert len(names) == 12 and sorted(captions) == [str(Path(name).with_suffix(".txt")) for name in names]

    run(correct, capsys)
    corrected = captions | {"fox.txt": CORRECTED}
    assert texts("photos") == corrected != captions
    rows = load_rows("photos")
    assert dict(zip(rows["file_name"], rows["caption"], strict=True)) == {
        name: corrected[str(Path(name).with_suffix(".txt"))] for name in names
    }
    # Nothing is left to caption, and nothing is written over
    run(caption, capsys)
    assert texts("photos") == corrected
    assert run(ask, capsys).strip()

    printed = run(finetune, capsys)
    adapters = load_file("captioner/adapter_model.safetensors")
    assert any(weight.any() for name, weight in adapters.items() if "lora_B" in name)
    assert "captioner" in printed and "caption" in printed  # where the model is, and what comes next
    samples = Path("captioner/samples.md").read_text()
    assert any(name in samples for name in names)

    run(caption_again, capsys)
    again = {row["file"]: row["caption"] for row in map(json.loads, Path("captions.jsonl").read_text().splitlines())}
    assert sorted(again) == names and texts("photos") == corrected
    # The adapters write them, not the base model
    model, processor = AutoPeftModel.from_pretrained("captioner").eval(), Blip2Processor.from_pretrained("captioner")
    assert processor.prompt == "a photo of"
    inputs = processor(images="photos/fox.png", text=processor.prompt, return_tensors="pt")
    with torch.no_grad():
        generated = model.generate(**inputs, max_new_tokens=30)
    by_hand = processor.post_process_image_text_to_text(generated, input_ids=inputs["input_ids"])
    assert [again["fox.png"]] == by_hand

    run(to_metadata, capsys)
    rows = load_rows("photos")
    assert dict(zip(rows["file_name"], rows["caption"], strict=True)) == again
    assert read_by_datasets("imagefolder", data_dir="photos") == again
    for path in Path("photos").rglob("*.txt"):
        path.unlink()
    assert read_by_datasets("photos") == again

    run(index, capsys)
    printed = run(search, capsys)
    assert all(name in printed for name in names) and Path("found.png").is_file()

    run(evaluate, capsys)
    results = json.loads(Path("scores/results.json").read_text())
    assert results["num_scored"] == {"overall": 2} and "CIDEr-D" in results["scores"]
