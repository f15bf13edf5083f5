"""examples/quickstart.ipynb, cell by cell, with tiny models in the places of the demo's and of the published ones."""

import ast
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_cache import add_to_hub_cache, use_hub_cache
from paths import EXAMPLES
from PIL import Image, ImageOps
from safetensors.torch import load_file
from saved_models import save_captioner, save_stage1

from blip2_hf import Blip2ForConditionalGeneration, Blip2Processor


NOTEBOOK = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
CODE = {cell["id"]: "".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"}
TEXT = "\n".join("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown")
# The models of each place, and what they compute in
PLACES = {
    "demo": ("outputs/demo/model", "outputs/demo/retriever", "float32"),
    "hub": ("Salesforce/blip2-opt-2.7b", "Salesforce/blip2-itm-vit-g", "bfloat16"),
}


def test_it_is_a_notebook_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids) >= 15 and all(re.fullmatch(r"[a-zA-Z0-9-_]{1,64}", name) for name in ids)
    for cell in NOTEBOOK["cells"]:
        of_code = {"execution_count": None, "outputs": []} if cell["cell_type"] == "code" else {}
        fields = {"cell_type": cell["cell_type"], "id": cell["id"], "metadata": {}, "source": cell["source"]}
        assert cell == fields | of_code and cell["cell_type"] in ("code", "markdown")
        # Lines keep their ends, but for the last one
        assert cell["source"] and "".join(cell["source"]).splitlines(keepends=True) == cell["source"]


def test_what_it_imports_is_there(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    statements = [node for cell in CODE.values() for node in ast.walk(ast.parse(cell))]
    imports = [node for node in statements if isinstance(node, (ast.Import, ast.ImportFrom))]
    names: dict[str, Any] = {}
    exec(compile(ast.Module(imports, type_ignores=[]), "quickstart.ipynb", "exec"), names)
    assert {"blip2_hf", "pipeline", "SearchIndex", "Blip2Trainer", "make_scenes"} <= names.keys()


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)", TEXT))
def test_links_lead_somewhere(link):
    assert (EXAMPLES / link).exists()


def run_cells(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run all cells in a folder, as Jupyter does. Return the names that they leave, and what each of them shows."""
    names: dict[str, Any] = {}
    shown = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", sys.path.copy())
        for name, cell in CODE.items():
            body = ast.parse(cell).body
            last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
            exec(compile(ast.Module(body, type_ignores=[]), name, "exec"), names)
            if last is not None:
                shown[name] = eval(compile(ast.Expression(last.value), name, "eval"), names)
    return names, shown


@pytest.fixture(scope="module", params=PLACES)
def place(request, tmp_path_factory) -> Iterator[str]:
    """Work in a clone with models in one of the places, and in no other one."""
    clone = tmp_path_factory.mktemp(request.param)
    # No link, whose parent would be the real clone
    shutil.copytree(EXAMPLES / "data", clone / "examples" / "data")
    shutil.copy(EXAMPLES / "scenes.py", clone / "examples")
    captioner, retriever, _ = PLACES[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(clone)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        use_hub_cache(patch, clone / "hub")
        find = Path if request.param == "demo" else lambda name: add_to_hub_cache(clone / "hub", name)
        save_captioner(find(captioner), transformers_compatible=request.param == "hub")
        save_stage1(find(retriever))
        sys.modules.pop("scenes", None)
        yield request.param
        sys.modules.pop("scenes", None)


def captions_by_hand(name: str, pictures: list[Path], dtype: str) -> list[str]:
    """Return the captions that a model writes of some pictures in one batch."""
    processor = Blip2Processor.from_pretrained(name)
    model = Blip2ForConditionalGeneration.from_pretrained(name, dtype=dtype).eval()
    inputs = processor(images=pictures, text=[processor.prompt or ""] * len(pictures), return_tensors="pt")
    generated = model.generate(**inputs.to(model.dtype), max_new_tokens=30)
    texts = processor.post_process_image_text_to_text(generated, input_ids=inputs["input_ids"])
    return [text.strip() for text in texts]


@pytest.mark.slow
def test_it_runs(place):
    names, shown = run_cells(Path("examples"))
    pictures, (captioner, *_, dtype) = names["pictures"], PLACES[place]
    assert (names["MODEL"], names["RETRIEVER"], names["DTYPE"]) == PLACES[place]
    assert len(pictures) == 48 and names["captioner"].model.dtype == getattr(torch, dtype)

    assert names["captions"] == [
        caption for start in (0, 4, 8) for caption in captions_by_hand(captioner, pictures[start : start + 4], dtype)
    ]
    choices = shown["choose-answer"]
    assert sorted(choice["answer"] for choice in choices) == ["one", "three", "two"]
    assert sum(choice["score"] for choice in choices) == pytest.approx(1, abs=0.01)
    assert len({found.path for found in names["found"]} & set(map(Path.resolve, pictures))) == 6
    assert names["maps"].shape == (2, 2, 2) and names["maps"].amax(dim=(1, 2)).tolist() == [1, 1]

    # The captions to learn are true of the pictures, and what was learned is loaded
    truth = [scene["caption"] for scene in names["make_scenes"](names["STYLES"], 6, seed=29)]
    assert names["wanted"] == [f"{caption} on white paper" for caption in truth]
    adapters = load_file("outputs/quickstart/captioner/adapter_model.safetensors")
    assert all(weight.any() for name, weight in adapters.items() if "lora_B" in name)
    learned = captions_by_hand("outputs/quickstart/captioner", pictures[6:12], dtype)
    assert names["captions_again"] == learned != captions_by_hand(captioner, pictures[6:12], dtype)

    sheets = {name: image for name, image in shown.items() if isinstance(image, Image.Image)}
    looks = {"caption-pictures", "ask-question", "search-pictures", "look-for-words", "load-model"}
    assert sheets.keys() == looks | {"make-pictures"} and sheets["caption-pictures"].size == (960, 420)
    second = sheets["caption-pictures"].crop((160, 0, 310, 150))
    assert second.tobytes() == ImageOps.pad(Image.open(pictures[1]).convert("RGB"), (150, 150)).tobytes()


@pytest.mark.slow
def test_it_runs_again(place):
    names, _ = run_cells(Path("examples"))
    again, _ = run_cells(Path("."))
    for name in ("captions", "choices", "captions_again"):
        assert again[name] == names[name]
