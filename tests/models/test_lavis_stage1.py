"""Stage 1 against numbers that the authors' code computed (random weights, no dropout, the likeliest negatives)."""

import pytest
import torch
from lavis_cases import STAGE1, load, read, tensors
from stage1 import gradients

from blip2_hf import Blip2ForPreTraining
from blip2_hf.convert.lavis import convert_lavis_state_dict


pytestmark = pytest.mark.usefixtures("likeliest_negatives")


@pytest.fixture
def model() -> Blip2ForPreTraining:
    return load(STAGE1)


def run(model: Blip2ForPreTraining):
    inputs = tensors(STAGE1, "inputs")
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


def assert_gradients(actual: dict, name_of_fixture: str, tolerance: float):
    """Every gradient, relative to its norm; that of the biases of keys is zero, up to rounding."""
    expected, _ = convert_lavis_state_dict(tensors(STAGE1, name_of_fixture))
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        norm = 1 if name.endswith("key.bias") else gradient.norm()
        assert (actual[name] - gradient).norm() / norm < tolerance, name


def test_outputs(model):
    expected, summary, outputs = tensors(STAGE1, "outputs"), read(STAGE1, "outputs"), run(model)
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
    expected, image = tensors(STAGE1, "outputs"), tensors(STAGE1, "inputs")["image"]
    image_embeds = model.get_image_embeds(image)
    torch.testing.assert_close(image_embeds, expected["vit_output"], rtol=1e-4, atol=1e-4)
    normalized = model.vision_model.post_layernorm(image_embeds)
    torch.testing.assert_close(normalized, expected["image_embeds"], rtol=1e-4, atol=1e-4)


def test_gradients(model):
    assert_gradients(gradients(model, run(model).loss), "grads_nodist", 1e-4)


@pytest.mark.parametrize("dtype, name, tolerance", [("float32", "grads", 1e-4), ("float64", "grads_f64", 1e-9)])
def test_gradients_inside_a_process_group(model, monkeypatch, dtype, name, tolerance):
    monkeypatch.setattr(Blip2ForPreTraining, "_compare", detach_what_is_gathered)
    model.to(getattr(torch, dtype))
    assert_gradients(gradients(model, run(model).loss), name, tolerance)


def test_outputs_in_float64(model):
    expected, outputs = tensors(STAGE1, "outputs_f64"), run(model.double())
    for name, key in {"logits_per_image": "sim_i2t", "itm_logits": "itm_logits"}.items():
        torch.testing.assert_close(outputs[name], expected[key], rtol=1e-9, atol=1e-9)
    is_label = expected["lm_labels_shifted"] != -100
    torch.testing.assert_close(outputs.itg_logits, expected["lm_logits"][:, :-1][is_label], rtol=1e-9, atol=1e-9)
