"""A command computes with trained numbers: a checkpoint that lacks weights, or whose weights are NaN, is refused."""

import json
import shutil

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from stage1 import make_stage1
from tiny import make_image, make_image_processor, make_model, make_pixel_values, make_processor

from blip2_hf import Blip2ForConditionalGeneration, Blip2Model
from blip2_hf.cli import main
from blip2_hf.jobs.fingerprints import model_settings
from blip2_hf.jobs.inference import check_finite, load_model, processor_place, weights_place


# Command, the model that it takes, and the weights that it is not to make up
COMMANDS = {
    "caption": ("captioner", ("query_tokens.weight", "qformer.layernorm.bias", "language_projection.weight")),
    "evaluate": ("captioner", ("vision_model.embeddings.class_embedding", "qformer.layernorm.bias")),
    "retrieval": ("stage1", ("itm_head.weight", "query_tokens.weight")),
    "capfilt": ("captioner", ("query_tokens.weight",)),
    "capfilt_of_stage1": ("stage1", ("lm_head.transform.dense.weight",)),
    "look": ("captioner", ("query_tokens.weight", "vision_model.post_layernorm.weight")),
    "look_for_a_text": ("stage1", ("itm_head.weight", "qformer.layernorm.bias")),
    "index": ("stage1", ("vision_projection.weight",)),
    "cache-features": ("captioner", ("vision_model.encoder.layers.1.mlp.fc1.weight",)),
    "cache-features_of_a_tower": ("captioner", ("vision_model.encoder.layers.1.mlp.fc1.weight",)),
    "export": ("captioner", ("query_tokens.weight",)),
}
CASES = [(command, name) for command, (_, names) in COMMANDS.items() for name in names]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a captioner and of a model of stage 1, and one of a picture."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, model in {"captioner": make_model(), "stage1": make_stage1()}.items():
        model.save_pretrained(folder / name)
        make_processor().save_pretrained(folder / name)
        make_image_processor().save_pretrained(folder / name)
    (folder / "pictures").mkdir()
    make_image().save(folder / "pictures" / "0.png")
    rows = datasets.Dataset.from_list([{"image": make_image(), "caption": "a dog"}])
    rows.to_parquet(folder / "rows.parquet")
    return folder


def run(command: str, model, folders, output):
    pictures, rows, whole = folders / "pictures", folders / "rows.parquet", folders / "stage1"
    name = command.partition("_of_")[0]
    arguments = {
        "caption": [pictures, "--model", model, "--output", output / "captions.jsonl", "--device", "cpu"],
        "evaluate": ["caption", "--data", rows, "--model", model, "--output", output / "out", "--device", "cpu"],
        "retrieval": ["retrieval", "--data", rows, "--model", model, "--output", output / "out"],
        "capfilt": [rows, "--captioner", model, "--filter", whole, "--output", output / "out"],
        "look": [pictures / "0.png", "--model", model, "--output", output / "map.png"],
        "look_for_a_text": [pictures / "0.png", "a dog", "--model", model, "--output", output / "map.png"],
        "index": [pictures, "--model", model, "--index", output / "out"],
        "cache-features": [pictures, "--model", model, "--output", output / "out", "--size", "28"],
        "export": [model, "--output", output / "image.pt2"],
    }[name]
    if command == "cache-features_of_a_tower":
        arguments[1] = "--vision-model"
    command = {"retrieval": "evaluate", "look_for_a_text": "look"}.get(name, name)
    main([command, *map(str, arguments)])


def copy(source, target, change):
    """A checkpoint whose weights are changed."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("command", "name"), CASES)
def test_missing_weights_are_refused_by_name(command, name, folders, tmp_path):
    copy(folders / COMMANDS[command][0], tmp_path / "model", lambda weights: weights.pop(name))
    told = name.removeprefix("vision_model.") if command == "cache-features_of_a_tower" else name
    with pytest.raises(SystemExit, match=f"^blip2-hf: .*model lacks 1 weights.*{told}"):
        run(command, tmp_path / "model", folders, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == []


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("command", COMMANDS)
def test_weights_that_are_no_numbers_are_refused_by_name(command, value, folders, tmp_path):
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"

    def break_one(weights):
        weights[name][3, 5] = value

    copy(folders / COMMANDS[command][0], tmp_path / "model", break_one)
    with pytest.raises(SystemExit, match="^blip2-hf: .*NaN or infinite in float32: 1 of .*layers.1.mlp.fc1.weight"):
        run(command, tmp_path / "model", folders, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == []


def test_values_that_are_too_large_for_a_type(folders, tmp_path):
    def enlarge(weights):
        weights["vision_model.encoder.layers.1.mlp.fc1.weight"][3, 5] = 1e6

    copy(folders / "captioner", tmp_path / "model", enlarge)
    assert load_model(Blip2ForConditionalGeneration, tmp_path / "model", "A model")
    with pytest.raises(ValueError, match="infinite in float16.*another dtype"):
        load_model(Blip2ForConditionalGeneration, tmp_path / "model", "A model", dtype=torch.float16)


def test_what_is_not_in_memory_is_not_looked_at():
    model = make_model()
    check_finite(model, "here")
    model.to("meta")
    check_finite(model, "nowhere")


@pytest.fixture
def adapters(folders, tmp_path, monkeypatch):
    """Work in a folder with adapters of the captioner, which their file names by a relative path."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders / "captioner", "captioner")
    model = Blip2ForConditionalGeneration.from_pretrained("captioner")
    settings = LoraConfig(target_modules=r"language_model.*\.q_proj", init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained("adapters")
    return tmp_path / "adapters"


def test_adapters_are_put_into_their_base(adapters):
    base = load_model(Blip2ForConditionalGeneration, "captioner", "A model")
    model = load_model(Blip2ForConditionalGeneration, adapters, "A model")
    inputs = {"pixel_values": make_pixel_values(1), "input_ids": torch.tensor([[5, 6, 7]])}
    difference = model(**inputs).logits - base(**inputs).logits
    assert difference.abs().max() > 1e-3 and not model.training
    images = [make_image_processor()] * 2
    settings, of_base = map(model_settings, (model, base), images)
    assert settings["weights"] != of_base["weights"]
    # Without the part that they adapt, the model is the base
    tower = load_model(Blip2Model, adapters, "A model")
    assert not any("lora" in name for name in tower.state_dict())


def test_places_of_what_adapters_belong_to(adapters, monkeypatch):
    assert (weights_place("captioner"), weights_place(adapters)) == ("captioner", "captioner")
    assert (processor_place("captioner"), processor_place(adapters)) == ("captioner", "captioner")
    make_processor().save_pretrained(adapters)
    assert processor_place(adapters) == str(adapters)
    # From elsewhere, a path beside the adapters is tried
    shutil.move("captioner", adapters / "captioner")
    (adapters / "inside").mkdir()
    monkeypatch.chdir(adapters / "inside")
    assert weights_place(adapters) == str(adapters / "captioner")


@pytest.mark.parametrize(
    ("base", "expected"),
    [("runs/a/captioner", "adapters of runs/a/captioner, which is not there"), (None, "does not say of which model")],
)
def test_adapters_without_their_base(base, expected, adapters):
    path = adapters / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    with pytest.raises(ValueError, match=expected):
        load_model(Blip2ForConditionalGeneration, adapters, "A model")
