"""What the presets train: parts, adapters, and the table that tells."""

import pytest
import torch
import transformers
from stage1 import make_stage1
from stage2 import make_batch, trained_names
from tiny import make_model, make_pixel_values

from blip2_hf import Blip2ForConditionalGeneration
from blip2_hf.models.frozen import cast_parameters
from blip2_hf.training import (
    Blip2Trainer,
    Stage2Arguments,
    describe_trained_parts,
    train_only,
    vision_layer_scales,
)
from blip2_hf.training.presets import PRESETS


@pytest.mark.parametrize("preset", ["stage2", "finetune", "projection", "qformer", "everything"])
def test_presets_train_what_they_name_and_nothing_else(preset):
    model, batch = make_model(), make_batch()
    model.language_model.bfloat16()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train_only(model, preset).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**batch).loss.backward()
    optimizer.step()
    trained = trained_names(model)
    assert {name for name in before if name.startswith(PRESETS[preset])} == trained
    for name, parameter in model.named_parameters():
        # The gradient of the bias of keys is zero but for rounding
        if "key.bias" not in name and "k_proj.bias" not in name and "qkv.bias" not in name:
            has_moved = not torch.equal(parameter.float(), before[name].float())
            is_used = parameter.grad is not None and bool(parameter.grad.any())
            assert has_moved == is_used and (not has_moved or name in trained), name
        assert not parameter.requires_grad or parameter.dtype == torch.float32
    assert model.language_model.training == (preset == "everything")


CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28}
TOWERS = {
    "own, stopped early": {"vision_feature_layer": 1},
    "dinov2": {
        "vision_config": transformers.Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, patch_size=14, image_size=28
        )
    },
    "clip": {"vision_config": transformers.CLIPVisionConfig(**CLIP, patch_size=14)},
    "siglip": {"vision_config": transformers.SiglipVisionConfig(**CLIP, patch_size=14)},
}


@pytest.mark.parametrize("tower", TOWERS)
def test_all_that_is_trained_of_a_tower_has_a_gradient(tower):
    """As DistributedDataParallel wants it: poolers, mask tokens and blocks that are not run stay frozen."""
    model = train_only(make_model(**TOWERS[tower]), "finetune").train()
    model(**make_batch()).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    assert any(".0." in name and name.startswith("vision_model.") for name in trained)
    unused = [n for n, p in model.vision_model.named_parameters() if not p.requires_grad]
    assert unused and not any("layer.0." in name or "layers.0." in name for name in unused)
    # The last block that acts decays once
    assert max(scale for scale in vision_layer_scales(model, 0.9).values() if scale < 1) == pytest.approx(0.9)


def test_a_frozen_part_is_cast_but_for_what_is_always_float32():
    model = make_model("llama")
    frequencies = model.language_model.model.rotary_emb.inv_freq.clone()
    cast_parameters(model.language_model, torch.bfloat16)
    assert {p.dtype for p in model.language_model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(model.language_model.model.rotary_emb.inv_freq, frequencies, rtol=0, atol=0)


def test_projection_alone_has_no_graph_in_the_qformer():
    model = train_only(make_model(), "projection").train()
    assert not model.qformer.training and model.training
    outputs = model(**make_batch())
    assert not outputs.qformer_outputs.last_hidden_state.requires_grad and outputs.loss.requires_grad


@pytest.mark.parametrize("name", ["opt", "gpt2"])
@pytest.mark.parametrize("part", ["language_model", "qformer", "vision_model"])
def test_adapters(part, name):
    model = train_only(make_model(name), f"lora_{part}")
    names = trained_names(model)
    assert names and all(name.startswith(f"base_model.model.{part}.") and "lora_" in name for name in names)
    model.train()
    model(**make_batch()).loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n and p.requires_grad]
    assert gradients and any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("part", ["qformer", "vision_model"])
def test_every_adapter_that_is_trained_has_a_gradient(part):
    """DistributedDataParallel would wait for that of a block behind the layer, or of what text leaves behind."""
    stage1 = make_stage1(num_query_tokens=4, vision_feature_layer=-2)
    model = Blip2ForConditionalGeneration.from_pretrained_parts(
        stage1, make_model().language_model, instruction_aware=True
    )
    adapted = train_only(model, f"lora_{part}").train()
    question = torch.tensor([[2, 8, 9, 3], [2, 8, 3, 0]])
    inputs = {"qformer_input_ids": question, "qformer_attention_mask": question.ne(0).long()}
    features = model.get_image_features(make_pixel_values(), **inputs).pooler_output
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(features.sum(), list(trained.values()), allow_unused=True)
    assert trained and [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None] == []


def test_presets_of_the_other_stage_are_refused():
    with pytest.raises(ValueError, match="not for a Blip2ForConditionalGeneration"):
        train_only(make_model(), "stage1")
    with pytest.raises(ValueError, match="not for a Blip2ForPreTraining"):
        train_only(make_stage1(), "stage2")
    with pytest.raises(ValueError, match="no preset 'some'"):
        train_only(make_model(), "some")
    model = make_stage1()
    expected = trained_names(model)
    model.requires_grad_(False)
    assert trained_names(train_only(model, "stage1")) == expected


def test_table_of_parts():
    model = train_only(make_model(), "projection")
    model.language_model.bfloat16()
    table = {line.split()[0]: line.split()[1:] for line in describe_trained_parts(model).splitlines()[1:]}
    size = sum(p.numel() for p in model.language_projection.parameters())
    assert table["language_projection"] == [f"{size:,}", f"{size:,}", "0", "float32"]
    assert table["language_model"][1] == "0" and table["language_model"][3] == "bfloat16"
    assert table["all"][1] == f"{size:,}" and table["all"][3:] == ["bfloat16,", "float32"]


def test_a_language_model_that_was_quantised_on_its_own_is_not_saved_with_the_rest(tmp_path):
    model = make_model()
    model.language_model.hf_quantizer = object()
    with pytest.raises(ValueError, match="quantised on its own"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantised on its own"):
        Blip2Trainer(model, Stage2Arguments(str(tmp_path), preset="stage2", use_cpu=True))
    Blip2Trainer(model, Stage2Arguments(str(tmp_path), preset="stage2", use_cpu=True, save_strategy="no"))
    adapted = train_only(model, "lora_language_model")
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
