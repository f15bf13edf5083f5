"""The page `docs/how_it_works.md`: its numbers are those of the models, and its figures show the masks of the code."""

import re
from xml.etree import ElementTree

import pytest
import torch
import transformers
from paths import DOCS
from stage1 import make_inputs, make_stage1

from blip2_hf import Blip2Config, Blip2ForConditionalGeneration, Blip2ForPreTraining, Blip2QFormerConfig


PAGE = (DOCS / "how_it_works.md").read_text()
SVG = "{http://www.w3.org/2000/svg}"
NUM_QUERIES, TEXT_LENGTH = 3, 4


def read_figure(name: str) -> ElementTree.Element:
    return ElementTree.parse(DOCS / "images" / name).getroot()


def read_parts() -> dict[str, list[str]]:
    """Return `[output, parameters, trained]` of each part of the page's table."""
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line[:2] == "| "]
    return {row[0]: row[2:] for row in rows if len(row) == 5 and row[0] != "part"}


def count(model: torch.nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def is_told_as(number: int, text: str) -> bool:
    return text in (f"{number}", f"{number:,}", f"{number / 1e6:.1f} M")


def test_parameters(capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    names: dict = {}
    exec(compile(snippet, "how_it_works.md", "exec"), names)
    printed = capsys.readouterr().out
    model, parts = names["model"], read_parts()
    total, trained = parts.pop("all")[1:]
    assert is_told_as(count(model), total) and is_told_as(count(model, trained=True), trained)
    assert parts.keys() == {name for name, _ in model.named_children()} | {"vision_model.post_layernorm"}
    for name, (_, parameters, is_trained) in parts.items():
        part = model.get_submodule(name)
        assert is_told_as(count(part), parameters), name
        first = part.embeddings if name == "vision_model" else part
        assert is_trained == ("yes" if next(first.parameters()).requires_grad else "no"), name
        assert "." in name or re.search(rf"^{name} +{count(part):,}\b", printed, flags=re.MULTILINE)
    shown = " ".join(read_figure("blip2-model.svg").itertext())
    for part in (model.vision_model, model.language_model):
        assert f", {count(part) / 1e6:.0f} M" in shown


def test_parameters_of_stage_1():
    qformer_config = Blip2QFormerConfig(use_qformer_text_input=True, vocab_size=30523, bos_token_id=30522)
    with torch.device("meta"):
        model = Blip2ForPreTraining(Blip2Config(qformer_config=qformer_config))
    assert f"and {count(model.qformer) / 1e6:.1f} M parameters" in PAGE
    assert f"{count(model, trained=True) / 1e6:.1f} M are trained there" in PAGE
    layers = model.qformer.encoder.layer
    shown = " ".join(read_figure("blip2-model.svg").itertext())
    assert f"{len(layers)} layers" in shown
    assert f"queries, in {sum(layer.has_cross_attention for layer in layers)} layers" in shown


@torch.no_grad()
def test_shapes():
    """Shapes depend on widths, so that few layers are enough."""
    text_config = transformers.OPTConfig(
        vocab_size=64,
        hidden_size=2560,
        word_embed_proj_dim=2560,
        ffn_dim=64,
        num_hidden_layers=1,
        num_attention_heads=32,
    )
    config = Blip2Config(
        vision_config={"num_hidden_layers": 1}, qformer_config={"num_hidden_layers": 1}, text_config=text_config
    )
    model, pixel_values = Blip2ForConditionalGeneration(config), torch.zeros(1, 3, 224, 224)
    outputs = model.get_image_features(pixel_values)
    shapes = {
        "vision_model": outputs.last_hidden_state,
        "vision_model.post_layernorm": model.vision_model.post_layernorm(outputs.last_hidden_state),
        "query_tokens": model.query_tokens(1),
        "qformer": outputs.qformer_outputs.last_hidden_state,
        "language_projection": outputs.pooler_output,
    }
    parts, shown = read_parts(), " ".join(read_figure("blip2-model.svg").itertext())
    assert parts.keys() - shapes.keys() == {"language_model", "all"}
    for name, tensor in shapes.items():
        shape = " × ".join(str(size) for size in tensor.shape[1:])
        assert parts[name][0] == shape and shape in shown
    assert " × ".join(str(size) for size in pixel_values.shape[1:]) in shown


def read_grid(name: str) -> torch.Tensor:
    """Return what a grid of the figure shows: True at cells that are covered by a coloured rectangle."""
    cells, *coloured = read_figure("blip2-masks.svg").findall(f".//{SVG}g[@id='{name}']/{SVG}rect")
    assert cells.get("class") == "hidden"
    grid = torch.zeros(int(cells.get("height")), int(cells.get("width")), dtype=torch.bool)
    for rect in coloured:
        x, y, width, height = (int(rect.get(side)) for side in ("x", "y", "width", "height"))
        assert not grid[y : y + height, x : x + width].any() and rect.get("class") != "hidden"
        grid[y : y + height, x : x + width] = True
    return grid


@pytest.fixture(scope="module")
def masks() -> list[torch.Tensor]:
    """The masks with which a model of stage 1 calls its Q-Former, with the figure's numbers of queries and tokens."""
    model, seen = make_stage1(num_query_tokens=NUM_QUERIES).eval(), []
    model.qformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    model(**make_inputs(batch_size=2, lengths=[TEXT_LENGTH]))
    return seen


def test_masks_of_the_two_passes(masks):
    first, second = masks
    assert torch.equal(read_grid("pass-one"), first[0])
    assert len(second) == 3 * len(first)
    for name, mask in zip(("pair", "negative-picture", "negative-text"), second[::2], strict=True):
        assert torch.equal(read_grid(name), mask.bool().expand(mask.shape[-1], -1)), name


def test_masks_of_the_paper_are_in_those_of_the_two_passes(masks):
    mask = masks[0][0]
    queries, cls = range(NUM_QUERIES), range(NUM_QUERIES, NUM_QUERIES + TEXT_LENGTH)
    dec = range(NUM_QUERIES + TEXT_LENGTH, len(mask))
    for name, text in (("contrast", cls), ("generation", dec)):
        kept = torch.tensor([*queries, *text])
        assert torch.equal(read_grid(name), mask[kept][:, kept])
    assert torch.equal(read_grid("matching"), read_grid("pair"))
