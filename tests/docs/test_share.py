"""docs/share.md: its commands and its Python, in their order, with a Hub on loopback and small files of LAVIS."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from docs_world import fill_folder, fill_hub_cache
from hub_cache import add_to_hub_cache
from hub_server import HubServer
from lavis_shapes import eva_shapes, layernorm, linear, of_tower, qformer_shapes, random_state_dict
from paths import DOCS
from stage1 import Processor
from tiny import LANGUAGE_MODELS, make_tokenizer, randomize


BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", (DOCS / "share.md").read_text(), flags=re.DOTALL | re.MULTILINE)
# The towers of the test have a block less than 39 or 23
START = """
import transformers

from blip2_hf.cli import main
from blip2_hf.convert import towers

towers.DEPTHS = dict.fromkeys(towers.DEPTHS, 1)
transformers.logging.set_verbosity_error()
"""
END = """
adapted = Blip2ForConditionalGeneration.from_pretrained("me/adapters")
assert any("lora" in name for name in adapted.state_dict())
exported = Blip2ForConditionalGeneration.from_pretrained("captioner")
assert torch.allclose(features, exported.get_image_features(pixel_values).pooler_output, atol=1e-5)
"""


def program() -> str:
    """Return the page as a program."""
    lines = [START]
    for language, code in BLOCKS:
        if language == "bash":
            commands = [shlex.split(line, comments=True) for line in code.splitlines()]
            code = "\n".join(f"main({words[1:]!r})" for words in commands if words[0] == "blip2-hf")
        lines.append(code)
    return "\n".join([*lines, END])


def write_lavis_files(folder: Path):
    """Write the files that the page converts. They are known by the width of their tower; the rest is narrow."""
    sizes = {"width": 64, "layers": 2, "every": 2, "tower_width": 1408}
    tower = of_tower(eva_shapes(1408, layers=1, side=2))
    vocabulary, head = len(Processor().tokenizer) + 1, "Qformer.cls.predictions"
    stage1 = qformer_shapes(**sizes, text=True, vocabulary=vocabulary) | {"temp": (), f"{head}.bias": (vocabulary,)}
    stage1 |= linear(f"{head}.transform.dense", 64, 64) | layernorm(f"{head}.transform.LayerNorm", 64)
    stage1 |= linear("vision_proj", 64, 16) | linear("text_proj", 64, 16) | linear("itm_head", 64, 2)
    files = {
        "blip2_pretrained": stage1,
        "blip2_finetune_coco": stage1 | tower,
        "blip2_caption_opt2.7b": qformer_shapes(**sizes, text=False) | linear("opt_proj", 64, 32) | tower,
        "eva_vit_g": eva_shapes(1408, layers=2, side=2),
    }
    for name, shapes in files.items():
        torch.save(random_state_dict(shapes), folder / f"{name}.pth")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with the models that the page names."""
    cache = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    fill_hub_cache(cache)
    opt = add_to_hub_cache(cache, "facebook/opt-2.7b")
    randomize(transformers.OPTForCausalLM(LANGUAGE_MODELS["opt"]())).save_pretrained(opt)
    make_tokenizer().save_pretrained(opt)
    with HubServer() as hub:
        for folder in cache.glob("models--*/snapshots/*"):
            hub.add(folder.parents[1].name.removeprefix("models--").replace("--", "/"), folder)
        yield hub


def test_the_page_runs_as_written(hub, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    work, page = tmp_path / "work", tmp_path / "page.py"
    work.mkdir()
    fill_folder(work)
    shutil.rmtree(work / "features")  # which the page makes
    write_lavis_files(work)
    page.write_text(program())
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "fake",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    result = subprocess.run(
        [sys.executable, str(page)], cwd=work, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]

    captioner, adapters = hub.files("me/captioner"), hub.files("me/adapters")
    assert {"model.safetensors", "modeling_blip2.py", "processor_config.json"} <= captioner.keys()
    card = captioner["README.md"].decode()
    assert "license: mit" in card and "me/pictures" in card and "CIDEr" in card
    assert "adapter_model.safetensors" in adapters and "modeling_blip2.py" not in adapters
    assert "Salesforce/blip2-opt-2.7b" in adapters["README.md"].decode()
    assert "license: mit" in hub.files("me/run")["README.md"].decode()
    assert any(name.endswith(".parquet") for name in hub.files("me/features"))

    # From LAVIS to captions and to transformers
    assert len((work / "captions.jsonl").read_text().splitlines()) == 2
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(work / "for-transformers")
    lavis = torch.load(work / "blip2_caption_opt2.7b.pth")
    assert torch.equal(theirs.query_tokens.half(), lavis["query_tokens"].half())
    assert torch.equal(theirs.language_projection.weight.half(), lavis["opt_proj.weight"].half())
