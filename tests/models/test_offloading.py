"""Weights that accelerate keeps on the CPU or the disk, and brings for each call of their module."""

import json

import accelerate
import datasets
import pytest
import torch
from stage1 import STAGE1_QFORMER, make_inputs, make_retrieval, make_stage1
from tiny import QFORMER, make_image, make_image_processor, make_model, make_pixel_values, randomize

from blip2_hf import Blip2Model
from blip2_hf.attention_maps import query_attention_map, text_heat_map
from blip2_hf.data import cache_features, load_cached_features
from blip2_hf.data.feature_cache import read_cached_features
from blip2_hf.evaluation import TwoStageRetrieval
from blip2_hf.jobs.fingerprints import model_fingerprint
from blip2_hf.retrieval.loading import check_same_model, describe_model


PARTS = {
    "tower": ("vision_model",),
    "Q-Former": ("qformer",),
    "language model": ("language_model",),
    "small parts": ("query_tokens", "embeddings", "language_projection", "vision_projection", "itm_head", "lm_head"),
}
IDS = torch.tensor([[0, 5, 6, 7], [0, 8, 9, 10]])
WITHOUT_DROPOUT = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)


def offload(model, what, folder):
    if what == "all to the CPU":
        return accelerate.cpu_offload(model)
    if what == "all to the disk":
        return accelerate.disk_offload(model, folder)
    device_map = {name: "disk" if name in PARTS[what] else "cpu" for name, _ in model.named_children()}
    return accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)


def make_instructed(name):
    return make_model(name, qformer_config={**QFORMER, **WITHOUT_DROPOUT, "use_qformer_text_input": True})


def calls_of_generation():
    pixel_values, image_embeds = make_pixel_values(2), torch.randn(2, 5, 32)
    instruction = {"qformer_input_ids": torch.tensor([[2, 10, 3], [2, 20, 3]])}
    return {
        "features": lambda m: m.get_image_features(pixel_values, **instruction).pooler_output,
        "features of features": lambda m: m.get_image_features(image_embeds=image_embeds).pooler_output,
        "loss": lambda m: m(pixel_values, IDS, labels=IDS).loss,
        "loss in training": lambda m: m.train()(pixel_values, IDS, labels=IDS, skip_logits=True).loss,
        "text": lambda m: m.eval().generate(pixel_values, IDS, max_new_tokens=4),
        "text without a prompt": lambda m: m.generate(image_embeds=image_embeds, max_new_tokens=4, num_beams=2),
        "heat map": lambda m: query_attention_map(m, pixel_values),
    }


def calls_of_retrieval():
    inputs, pixel_values = make_inputs(3), make_pixel_values(3)
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return texts, {
        "features": lambda m: m.get_image_features(pixel_values).pooler_output,
        "text features": lambda m: m.get_text_features(**texts).pooler_output,
        "keys": lambda m: m.get_image_key_values(inputs["image_embeds"])[0][0],
        "matching": lambda m: m.get_matching_logits(**texts, pixel_values=pixel_values),
        "heat map": lambda m: text_heat_map(m, **texts, pixel_values=pixel_values),
    }


def assert_the_same(make, calls, what, folder):
    """Called with autograd on."""
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    offloaded = offload(make(), what, folder)
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    assert offloaded.device.type == "cpu"
    for name, call in calls.items():
        expected, actual = call(plain), call(offloaded)
        torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("name", "what"),
    [("opt", "all to the CPU"), ("opt", "tower"), *(("t5", what) for what in ("all to the disk", *PARTS))],
)
def test_generation(name, what, tmp_path):
    assert_the_same(lambda: make_instructed(name), calls_of_generation(), what, tmp_path)


@pytest.mark.parametrize("what", ["all to the CPU", "tower", "small parts"])
def test_retrieval(what, tmp_path):
    texts, calls = calls_of_retrieval()
    calls |= {
        "contrast": lambda m: m(make_pixel_values(2) * 0 + 1, **texts, use_temperature=True).logits_per_image,
        "two stages": lambda m: (
            TwoStageRetrieval(m, _Tokens(), k=2, show_progress=False)(
                torch.linspace(-1, 1, 3 * 5 * 32).view(3, 5, 32), ["1", "2", "3"]
            ).image_to_text.scores
        ),
    }
    assert_the_same(make_retrieval, calls, what, tmp_path)


class _Tokens:
    def __call__(self, texts, **kwargs):
        return {"input_ids": [[2, 10 + int(text), 3] for text in texts]}


@pytest.mark.usefixtures("likeliest_negatives")
@pytest.mark.parametrize("what", ["all to the disk", "tower", "Q-Former"])
def test_stage_1(what, tmp_path):
    texts, calls = calls_of_retrieval()
    pixel_values = make_pixel_values(3)
    calls |= {
        "loss": lambda m: m.train()(pixel_values, **texts).loss,
        "similarities": lambda m: m.eval()(pixel_values, **texts, return_loss=False).logits_per_image,
        "text": lambda m: m.generate(pixel_values, input_ids=texts["input_ids"][:, :2], max_new_tokens=4),
    }
    assert_the_same(make_stage1, calls, what, tmp_path)


def test_the_image_side_alone(tmp_path):
    pixel_values = make_pixel_values(2)

    def make():
        return randomize(Blip2Model(make_retrieval(qformer_config=STAGE1_QFORMER).config)).eval()

    assert_the_same(make, {"queries": lambda m: m(pixel_values).last_hidden_state}, "all to the disk", tmp_path)


@pytest.mark.parametrize("what", ["all to the CPU", "tower"])
def test_weights_that_are_elsewhere_tell_models_apart(what, tmp_path):
    plain, other, offloaded = make_retrieval(), make_retrieval(), make_retrieval()
    with torch.no_grad():
        other.vision_model.encoder.layers[0].mlp.fc1.weight[0, 0] += 1
    offloaded = offload(offloaded, what, tmp_path / "plain")
    assert model_fingerprint(offloaded) == model_fingerprint(plain)
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    there, now = (describe_model(model, make_image_processor()) | {"model": ""} for model in (plain, offloaded))
    check_same_model(tmp_path, there, now)
    other = offload(other, what, tmp_path / "other")
    assert model_fingerprint(other) != model_fingerprint(plain)
    with pytest.raises(ValueError, match=r"made otherwise \(weights: "):
        check_same_model(tmp_path, there, describe_model(other, make_image_processor()))


def test_features_are_stored_of_a_tower_that_is_elsewhere(tmp_path):
    pictures = datasets.Dataset.from_list([{"image": make_image(seed)} for seed in range(3)])
    for name, model in {"plain": make_retrieval(), "off": offload(make_retrieval(), "tower", tmp_path)}.items():
        cache_features(pictures, model, make_image_processor(), tmp_path / name, dtype="float32")
    stored = [load_cached_features(tmp_path / name) for name in ("plain", "off")]
    for expected, actual in zip(*stored, strict=True):
        assert torch.equal(read_cached_features(actual), read_cached_features(expected))
    descriptions = [json.loads((tmp_path / name / "cache.json").read_text()) for name in ("plain", "off")]
    assert descriptions[0] == descriptions[1]


def test_a_model_without_weights_is_nowhere():
    with torch.device("meta"):
        assert make_retrieval().device.type == "meta"
