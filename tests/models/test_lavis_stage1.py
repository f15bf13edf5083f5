"""Stage 1 against numbers that the authors' code computed (random weights, no dropout, the likeliest negatives)."""

import json

import paths
import pytest
import torch
from safetensors.torch import load_file
from stage1 import gradients

from blip2_hf import Blip2Config, Blip2ForPreTraining, load_lavis_checkpoint
from blip2_hf.convert.lavis import convert_lavis_state_dict


pytestmark = pytest.mark.usefixtures("likeliest_negatives")
FIXTURES = paths.FIXTURES / "lavis"
CASE = FIXTURES / "stage1" / "case0"
SIZES = json.loads((CASE / "config.json").read_text())


def fixture(name: str) -> dict:
    path = CASE / name
    return json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)


def make_config() -> Blip2Config:
    bert, vit = SIZES["bert"], SIZES["vit"]
    return Blip2Config(
        vision_config={
            "hidden_size": vit["width"],
            "intermediate_size": int(vit["width"] * vit["mlp_ratio"]),
            "num_hidden_layers": vit["depth"],
            "num_attention_heads": vit["heads"],
            "image_size": SIZES["image_size"],
            "patch_size": vit["patch"],
        },
        qformer_config={
            **bert,
            "vocab_size": SIZES["tokenizer_len"],
            "bos_token_id": SIZES["bos_token_id"],
            "eos_token_id": 3,
            "cross_attention_frequency": SIZES["cross_attention_freq"],
            "use_qformer_text_input": True,
        },
        num_query_tokens=SIZES["num_query_token"],
        image_text_hidden_size=SIZES["embed_dim"],
    )


@pytest.fixture
def model() -> Blip2ForPreTraining:
    return load_lavis_checkpoint(CASE / "state_dict.safetensors", config=make_config())


def run(model: Blip2ForPreTraining):
    inputs = fixture("inputs.safetensors")
    return model.train()(
        pixel_values=inputs["image"].to(model.dtype),
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
    )


def detach_what_is_gathered(model: Blip2ForPreTraining, batch, image_features, text_features):
    """The authors' code lets no gradient through what it gathers from the processes, its own rows included."""
    per_image = (image_features @ text_features.detach().T).amax(1)
    per_text = (image_features.detach() @ text_features.T).amax(1).T
    logits = {"logits_per_image": model.temperature(per_image), "logits_per_text": model.temperature(per_text)}
    return {**logits, "image_features": image_features, "text_features": text_features}


def assert_gradients(actual: dict, fixture_name: str, tolerance: float):
    """Every gradient, relative to its norm; that of the biases of keys is zero, up to rounding."""
    expected, _ = convert_lavis_state_dict(fixture(fixture_name))
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        norm = 1 if name.endswith("key.bias") else gradient.norm()
        assert (actual[name] - gradient).norm() / norm < tolerance, name


def test_outputs(model):
    expected, summary, outputs = fixture("outputs.safetensors"), fixture("outputs.json"), run(model)
    for name, key in {"loss": "loss", "loss_itc": "loss_itc", "loss_itm": "loss_itm", "loss_itg": "loss_lm"}.items():
        assert outputs[name].item() == pytest.approx(summary[key], abs=1e-5)
    assert outputs.negative_image_index.tolist() == summary["neg_image_idx_for_text"]
    assert outputs.negative_text_index.tolist() == summary["neg_text_idx_for_image"]
    pairs = {
        "logits_per_image": "sim_i2t",
        "logits_per_text": "sim_t2i",
        "itm_logits": "itm_logits",
        "image_features": "image_feats",
        "text_features": "text_feat",
    }
    for name, key in pairs.items():
        torch.testing.assert_close(outputs[name], expected[key], rtol=1e-4, atol=1e-4)
    is_label = expected["lm_labels_shifted"] != -100
    torch.testing.assert_close(outputs.itg_logits, expected["lm_logits"][:, :-1][is_label], rtol=1e-4, atol=1e-4)


def test_tower_and_queries(model):
    expected, image = fixture("outputs.safetensors"), fixture("inputs.safetensors")["image"]
    image_embeds = model.get_image_embeds(image)
    torch.testing.assert_close(image_embeds, expected["vit_output"], rtol=1e-4, atol=1e-4)
    normalized = model.vision_model.post_layernorm(image_embeds)
    torch.testing.assert_close(normalized, expected["image_embeds"], rtol=1e-4, atol=1e-4)


def test_gradients(model):
    assert_gradients(gradients(model, run(model).loss), "grads_nodist.safetensors", 1e-4)


@pytest.mark.parametrize("dtype, name, tolerance", [("float32", "grads", 1e-4), ("float64", "grads_f64", 1e-9)])
def test_gradients_inside_a_process_group(model, monkeypatch, dtype, name, tolerance):
    monkeypatch.setattr(Blip2ForPreTraining, "_compare", detach_what_is_gathered)
    model.to(getattr(torch, dtype))
    assert_gradients(gradients(model, run(model).loss), f"{name}.safetensors", tolerance)


def test_outputs_in_float64(model):
    expected, outputs = fixture("outputs_f64.safetensors"), run(model.double())
    for name, key in {"logits_per_image": "sim_i2t", "itm_logits": "itm_logits"}.items():
        torch.testing.assert_close(outputs[name], expected[key], rtol=1e-9, atol=1e-9)
    is_label = expected["lm_labels_shifted"] != -100
    torch.testing.assert_close(outputs.itg_logits, expected["lm_logits"][:, :-1][is_label], rtol=1e-9, atol=1e-9)
