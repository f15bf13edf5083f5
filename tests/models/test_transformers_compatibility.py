"""Agreement with transformers' own BLIP-2, whose checkpoints are read and written unchanged."""

import json

import pytest
import torch
import transformers
from theirs import IMAGE, full_size_text_config, inputs, make_theirs
from tiny import NUM_QUERIES, make_config, make_pixel_values

import blip2_hf


@pytest.fixture(params=["opt", "t5"])
def pair(request, tmp_path):
    theirs = make_theirs(request.param)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, info = blip2_hf.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(info.values()), info
    return theirs, ours.eval()


def test_logits_and_loss_agree(pair):
    theirs, ours = pair
    batch = inputs()
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    expected, actual = theirs(**batch, labels=labels), ours(**batch, labels=labels)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        actual.qformer_outputs.last_hidden_state, expected.qformer_outputs.last_hidden_state, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("prompted", [True, False])
def test_the_same_tokens(pair, options, prompted):
    theirs, ours = pair
    batch = inputs() if prompted else {"pixel_values": make_pixel_values()}
    expected = theirs.generate(**batch, **options, max_new_tokens=8)
    assert torch.equal(ours.generate(**batch, **options, max_new_tokens=8), expected)


def test_written_checkpoints_load_there_unchanged(pair, tmp_path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path / "back", transformers_compatible=True)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["model_type"] == "blip-2"
    assert config["architectures"] == ["Blip2ForConditionalGeneration"]
    assert ours.config.model_type == "blip2"
    again, info = transformers.Blip2ForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(info.values()), info
    assert again.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in theirs.state_dict().items())
    auto = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "back")
    assert type(auto) is transformers.Blip2ForConditionalGeneration


def test_a_loaded_checkpoint_is_saved_in_our_format(pair, tmp_path):
    _, ours = pair
    ours.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "blip2"
    again, info = blip2_hf.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(again.query_tokens.weight, ours.query_tokens.weight)


def test_their_config_object_is_understood(pair, tmp_path):
    theirs, ours = pair
    config = blip2_hf.Blip2Config.from_transformers(theirs.config)
    assert config.vision_config.post_layernorm_eps == theirs.config.vision_config.layer_norm_eps
    assert config.to_transformers().to_dict() == theirs.config.to_dict()
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = blip2_hf.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "theirs", config=theirs.config)
    assert torch.equal(loaded.query_tokens.weight, ours.query_tokens.weight)


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_old_config_files_without_placeholders(name, tmp_path):
    theirs = make_theirs(name)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # As published at first: no placeholder, fields that are gone today, text_config with generation settings
    del config["image_token_index"]
    config |= {"use_decoder_only_language_model": name == "opt", "initializer_factor": 1.0, "torch_dtype": "float32"}
    config["text_config"] |= {"length_penalty": 1.0, "num_beams": 1, "torchscript": False}
    config["vision_config"] |= {"dropout": 0.0, "projection_dim": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, info = blip2_hf.Blip2ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert ours.config.image_token_index is None
    batch = inputs()
    text = {**batch, "input_ids": batch["input_ids"][:, NUM_QUERIES:]}
    expected = theirs.generate(**batch, max_new_tokens=5)
    actual = ours.eval().generate(**text, max_new_tokens=5)
    new = actual if name == "t5" else torch.cat([batch["input_ids"], actual[:, 4:]], dim=1)
    assert torch.equal(new, expected)


def test_towers_that_transformers_cannot_hold_are_refused(tmp_path):
    config = make_config("opt", vision_config=transformers.CLIPVisionConfig(hidden_size=32, num_attention_heads=4))
    model = blip2_hf.Blip2ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="one vision tower"):
        model.save_pretrained(tmp_path / "x", transformers_compatible=True)
    assert model.config is config


# Table 1 of the paper: all parameters, trained ones. It counts FlanT5-XL as 3.0B; the published checkpoint has 2.85B.
PAPER = {
    "ViT-L OPT-2.7B": ("vit_l", "opt-2.7b", 3.1e9, 104e6),
    "ViT-g OPT-2.7B": ("vit_g", "opt-2.7b", 3.8e9, 107e6),
    "ViT-g OPT-6.7B": ("vit_g", "opt-6.7b", 7.8e9, 108e6),
    "ViT-L FlanT5-XL": ("vit_l", "flan-t5-xl", 3.4e9, 103e6),
    "ViT-g FlanT5-XL": ("vit_g", "flan-t5-xl", 4.1e9, 107e6),
    "ViT-g FlanT5-XXL": ("vit_g", "flan-t5-xxl", 12.1e9, 108e6),
}
# Of the published checkpoints; T5's without its untied lm_head, which transformers 5 ties in a new model
LANGUAGE_MODEL_SIZES = {
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "flan-t5-xl": 2_849_757_184 - 32128 * 2048,
    "flan-t5-xxl": 11_135_332_352 - 32128 * 4096,
}


@pytest.mark.parametrize("row", PAPER)
def test_full_size_models_have_the_papers_parameter_counts(row):
    tower, language_model, total, trainable = PAPER[row]
    vision_config = {"vit_g": blip2_hf.Blip2VisionConfig(), "vit_l": blip2_hf.Blip2VisionConfig.clip_vit_l()}[tower]
    config = blip2_hf.Blip2Config(vision_config=vision_config, text_config=full_size_text_config(language_model))
    with torch.device("meta"):
        model = blip2_hf.Blip2ForConditionalGeneration(config)
    assert model.language_model.num_parameters() == LANGUAGE_MODEL_SIZES[language_model]
    missing = {"flan-t5-xl": 3.0e9 - LANGUAGE_MODEL_SIZES["flan-t5-xl"]}.get(language_model, 0)
    assert model.num_parameters() + missing == pytest.approx(total, rel=0.02)
    assert model.num_parameters(only_trainable=True) == pytest.approx(trainable, rel=0.01)


@torch.no_grad()
def test_features_of_their_base_model(pair, tmp_path):
    theirs, ours = pair
    base = transformers.Blip2Model.from_pretrained(tmp_path / "theirs").eval()
    own_base = blip2_hf.Blip2Model.from_pretrained(tmp_path / "theirs").eval()
    pixel_values, texts = make_pixel_values(), torch.tensor([[0, 5, 6, 7], [0, 8, 9, 10]])
    expected = base.get_qformer_features(pixel_values=pixel_values)
    for model in (ours, own_base):
        torch.testing.assert_close(model.get_qformer_features(pixel_values), expected, rtol=0, atol=1e-5)
    # Theirs is after the LayerNorm that follows the tower
    expected = base.get_image_features(pixel_values=pixel_values).last_hidden_state
    actual = own_base.vision_model.post_layernorm(own_base.get_image_embeds(pixel_values))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    expected = base.get_text_features(input_ids=texts).last_hidden_state
    torch.testing.assert_close(ours.get_text_features(texts).last_hidden_state, expected, rtol=0, atol=1e-5)
    with pytest.raises(TypeError, match=r"was given labels, and takes images alone \(Blip2ForConditionalGeneration"):
        own_base(pixel_values, labels=texts)


@torch.no_grad()
def test_outputs_of_generation(pair):
    (theirs, ours), batch = pair, inputs()
    options = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_attentions": True}
    options |= {"output_hidden_states": True, "output_scores": True}
    found = []
    for model in (theirs, ours):
        model.set_attn_implementation("eager")
        found.append(model.generate(**batch, **options))
    expected, actual = found
    names = (
        {"encoder_attentions", "encoder_hidden_states", "cross_attentions"} if theirs.config.is_encoder_decoder else {}
    )
    assert {*names} <= {*expected} == {*actual}
    for name in (*names, "scores"):
        for own, other in zip(_tensors(actual[name]), _tensors(expected[name]), strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=1e-5)


def _tensors(value) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [tensor for part in value for tensor in _tensors(part)]
