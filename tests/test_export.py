"""The exported image side computes what the model computes, for any number of pictures."""

from importlib.util import find_spec

import peft
import pytest
import torch
import transformers
from stage1 import make_retrieval, make_stage1
from tiny import make_config, make_model, make_pixel_values
from towers import TOWERS

import blip2_hf.export
from blip2_hf import Blip2ForConditionalGeneration, Blip2Model, Blip2VisionConfig
from blip2_hf.cli import main
from blip2_hf.export import export_image_encoder


needs_onnx = pytest.mark.skipif(
    not all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript and onnxruntime are not installed",
)


def run(path, pixel_values: torch.Tensor) -> torch.Tensor:
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(pixel_values)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_outputs()] == ["image_features"]
    return torch.from_numpy(session.run(None, {"pixel_values": pixel_values.numpy()})[0])


@torch.no_grad()
def assert_exported(model, path, size: int = 28):
    for batch_size in (1, 2, 5):
        pixel_values = make_pixel_values(batch_size, size)
        expected = model.get_image_features(pixel_values).pooler_output
        torch.testing.assert_close(run(path, pixel_values), expected, atol=1e-5, rtol=1e-4)


def make_with_clip() -> Blip2ForConditionalGeneration:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return make_model("t5", vision_config=Blip2VisionConfig.clip_vit_l(image_size=28, **sizes))


MODELS = {"opt": make_model, "clip, t5": make_with_clip, "retrieval": make_retrieval}


@pytest.mark.parametrize("name", MODELS)
def test_torch_export(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]()
    export_image_encoder(model, tmp_path / "encoder.pt2")
    assert_exported(model, tmp_path / "encoder.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.pt2"]
    names = torch.export.load(tmp_path / "encoder.pt2").state_dict.keys()
    assert names and {name.partition(".")[0] for name in names} == {
        "vision_model",
        "query_tokens",
        "qformer",
        "projection",
    }


@needs_onnx
@pytest.mark.parametrize("name", ["opt", "retrieval"])
def test_onnx(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]()
    export_image_encoder(model, tmp_path / "encoder.onnx")
    assert_exported(model, tmp_path / "encoder.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder.onnx", "encoder.onnx.data"]


def test_a_tower_of_automodel_and_another_size(tmp_path):
    torch.manual_seed(0)
    tower = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    model = make_model("opt", vision_config=tower)
    export_image_encoder(model, tmp_path / "encoder", format="torch", image_size=42)
    (tmp_path / "encoder").rename(tmp_path / "encoder.pt2")
    assert_exported(model, tmp_path / "encoder.pt2", size=42)


@pytest.mark.parametrize("ending", ["pt2", pytest.param("onnx", marks=needs_onnx)])
def test_positions_of_a_feature_map(ending, tmp_path):
    torch.manual_seed(0)
    model = make_model("opt", vision_config=TOWERS["convnext"][0](), vision_position_embedding=True)
    export_image_encoder(model, tmp_path / f"encoder.{ending}", image_size=96)
    assert_exported(model, tmp_path / f"encoder.{ending}", size=96)


def test_a_model_in_training_stays_in_training(tmp_path):
    torch.manual_seed(0)
    model = make_model().train()
    before = {name: module.training for name, module in model.named_modules()}
    assert before["qformer"] and not before["vision_model.encoder"]
    export_image_encoder(model, tmp_path / "encoder.pt2")
    assert {name: module.training for name, module in model.named_modules()} == before
    assert_exported(model.eval(), tmp_path / "encoder.pt2")


def test_soft_prompts_go_into_generation(tmp_path):
    torch.manual_seed(0)
    model, pixel_values = make_model("opt"), make_pixel_values(2)
    export_image_encoder(model, tmp_path / "encoder.pt2")
    input_ids = torch.tensor([[0, 5, 6], [0, 7, 8]])
    with torch.no_grad():
        features = run(tmp_path / "encoder.pt2", pixel_values)
        actual = model.generate(image_features=features, input_ids=input_ids, max_new_tokens=6)
        expected = model.generate(pixel_values=pixel_values, input_ids=input_ids, max_new_tokens=6)
    assert torch.equal(actual, expected)


def test_what_cannot_be_exported(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"encoder.bin: a name that ends in .pt2 or .onnx"):
        export_image_encoder(make_model(), tmp_path / "encoder.bin")
    with pytest.raises(ValueError, match="Blip2HfModel has no projection"):
        export_image_encoder(Blip2Model(make_config(None)), tmp_path / "encoder.pt2")
    with pytest.raises(ValueError, match="merge_and_unload"):
        adapted = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"]))
        export_image_encoder(adapted, tmp_path / "encoder.pt2")
    with pytest.raises(ValueError, match="attach_vision_tower"):
        export_image_encoder(make_stage1(has_vision_tower=False), tmp_path / "encoder.pt2")
    monkeypatch.setattr(blip2_hf.export, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"blip2-hf\[export\]"):
        export_image_encoder(make_model(), tmp_path / "encoder.onnx")
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(program, file):
        file.write(b"half")
        raise OSError("disk full")

    (tmp_path / "encoder.pt2").write_bytes(b"old")
    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        export_image_encoder(make_model(), tmp_path / "encoder.pt2")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_the_command(tmp_path, capsys):
    torch.manual_seed(0)
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    output = tmp_path / "encoder.pt2"
    main(["export", str(tmp_path / "model"), "--output", str(output), "--image-size", "42"])
    assert str(output) in capsys.readouterr().out
    assert_exported(model, output, size=42)
    with pytest.raises(SystemExit, match="blip2-hf: .*encoder.tflite: a name that ends in"):
        main(["export", str(tmp_path / "model"), "--output", str(tmp_path / "encoder.tflite")])
