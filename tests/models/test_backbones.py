"""The parts of a BLIP-2 are the trained ones: out of any checkpoint that holds them, and never made up."""

import re

import datasets
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from stage1 import make_stage1
from tiny import (
    LANGUAGE_MODELS,
    QFORMER,
    ROTARY,
    VISION,
    make_image,
    make_image_processor,
    make_model,
    make_pixel_values,
    make_processor,
    make_tokenizer,
    randomize,
)
from towers import SMALL, TOWERS

from blip2_hf import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2ForPreTraining,
    Blip2Model,
    Blip2VisionModel,
)
from blip2_hf.cli import main
from blip2_hf.data import load_cached_features, read_cached_features
from blip2_hf.models.backbones import load_language_model, load_tower, load_tower_config, load_whole
from blip2_hf.training import load_writer


BERT = {"vocab_size": 64, "max_position_embeddings": 40, **SMALL}
OF_BLIP = {"vision_config": {**VISION, "patch_size": 14}, "qformer_config": QFORMER, "num_query_tokens": 4}


def tower_config(name: str):
    return TOWERS[name][0]()


def two_towers(name: str):
    parts = tower_config(name), transformers.BertConfig(**BERT)
    return transformers.VisionTextDualEncoderConfig.from_vision_text_configs(*parts)


def with_text_tower(kind: str, name: str):
    text_config = {**BERT, "max_position_embeddings": 16}
    config = getattr(transformers, f"{kind}Config")(
        vision_config=tower_config(name).to_dict(), text_config=text_config
    )
    return getattr(transformers, f"{kind}Model")(config)


def vision_language(kind: str, name: str, text_config):
    model_class = getattr(transformers, f"{kind}ForConditionalGeneration")
    config_class = getattr(transformers, f"{kind}Config")
    return model_class(config_class(vision_config=tower_config(name), text_config=text_config, image_token_index=319))


def of_blip(kind: str):
    config_class = getattr(transformers, f"{kind}Config")
    config = config_class(**OF_BLIP, text_config=LANGUAGE_MODELS["opt"]().to_dict())
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


# Models, and what in them is the tower
HOLDERS = {
    "our_blip2": (lambda: make_model(), "vision_model"),
    "our_blip2_with_clip": (lambda: make_model(vision_config=tower_config("clip")), "vision_model.tower"),
    "our_stage1": (lambda: make_stage1(), "vision_model"),
    "our_stage1_with_vit": (lambda: make_stage1(vision_config=tower_config("vit")), "vision_model.tower"),
    "our_retriever": (lambda: Blip2ForImageTextRetrieval(make_stage1().config), "vision_model"),
    "clip": (lambda: with_text_tower("CLIP", "clip"), "vision_model"),
    "siglip": (lambda: with_text_tower("Siglip", "siglip"), "vision_model"),
    "clip_and_bert": (lambda: transformers.VisionTextDualEncoderModel(two_towers("clip")), "vision_model"),
    "vit_and_bert": (lambda: transformers.VisionTextDualEncoderModel(two_towers("vit")), "vision_model"),
    "llava": (lambda: vision_language("Llava", "clip", LANGUAGE_MODELS["llama"]()), "model.vision_tower"),
    "paligemma": (
        lambda: vision_language("PaliGemma", "siglip", transformers.GemmaConfig(**ROTARY)),
        "model.vision_tower",
    ),
    "vit": (lambda: transformers.ViTModel(tower_config("vit")), ""),
    "classifier": (lambda: transformers.Dinov2ForImageClassification(tower_config("dinov2")), "dinov2"),
}
# Their tower is ours, without the LayerNorm that theirs ends with
HOLDERS_OF_OURS = {
    "blip": lambda: transformers.BlipForConditionalGeneration(
        transformers.BlipConfig(vision_config=OF_BLIP["vision_config"], text_config=BERT)
    ),
    "blip2": lambda: of_blip("Blip2"),
    "instructblip": lambda: of_blip("InstructBlip"),
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("bert")
    transformers.BertForMaskedLM(transformers.BertConfig(**BERT)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def save(model: torch.nn.Module, folder) -> torch.nn.Module:
    torch.manual_seed(0)
    randomize(model).eval().save_pretrained(folder)
    return model


def assert_same_weights(tower: torch.nn.Module, source: torch.nn.Module):
    weights = source.state_dict()
    assert tower.state_dict().keys() == weights.keys()
    differing = [name for name, weight in tower.state_dict().items() if not torch.equal(weight, weights[name])]
    assert not differing


@pytest.mark.parametrize("name", HOLDERS)
def test_a_tower_is_taken_out_of_what_holds_it(name, tmp_path):
    make, path = HOLDERS[name]
    model = save(make(), tmp_path)
    source = model.get_submodule(path)
    tower = load_tower(tmp_path).eval()
    assert_same_weights(tower, source)
    assert load_tower_config(tmp_path).model_type == tower.config.model_type == source.config.model_type
    pixel_values = make_pixel_values()
    expected = source(pixel_values=pixel_values).last_hidden_state
    torch.testing.assert_close(tower(pixel_values=pixel_values).last_hidden_state, expected)
    # Likewise out of the model itself
    assert_same_weights(load_tower(model), source)


@pytest.mark.parametrize("name", HOLDERS_OF_OURS)
def test_the_tower_of_transformers_blips_is_ours(name, tmp_path):
    source = save(HOLDERS_OF_OURS[name](), tmp_path).vision_model
    tower = load_tower(tmp_path).eval()
    assert isinstance(tower, Blip2VisionModel)
    assert_same_weights(tower, source)
    pixel_values = make_pixel_values()
    found = tower.post_layernorm(tower(pixel_values).last_hidden_state)
    torch.testing.assert_close(found, source(pixel_values).last_hidden_state)
    of_loading = {"_name_or_path": None, "dtype": None}
    assert load_tower_config(tmp_path).to_dict() | of_loading == tower.config.to_dict() | of_loading
    with pytest.raises(ValueError, match="Give the name of the checkpoint"):
        load_tower(source)


def test_names_that_checkpoints_on_the_hub_still_have(tmp_path):
    source = save(HOLDERS["llava"][0](), tmp_path).model.vision_tower
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name): x for name, x in weights.items()}
    assert renamed.keys() != weights.keys()
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same_weights(load_tower(tmp_path), source)


def test_models_are_made_from_the_tower_of_another(tmp_path, bert):
    source = save(HOLDERS["llava"][0](), tmp_path).model.vision_tower
    pixel_values = make_pixel_values()
    expected = source(pixel_values=pixel_values).last_hidden_state
    stage1 = Blip2ForPreTraining.from_encoders_pretrained(tmp_path, bert, num_query_tokens=4)
    torch.testing.assert_close(stage1.get_image_embeds(pixel_values), expected)
    language_model = transformers.AutoModelForCausalLM.from_config(LANGUAGE_MODELS["opt"]())
    model = Blip2ForConditionalGeneration.from_pretrained_parts(
        vision_model=tmp_path, text_encoder=bert, language_model=language_model
    )
    torch.testing.assert_close(model.get_image_embeds(pixel_values), expected)
    towerless = Blip2ForPreTraining.from_encoders_pretrained(tmp_path, bert, load_vision_tower=False)
    torch.testing.assert_close(towerless.attach_vision_tower(tmp_path).get_image_embeds(pixel_values), expected)


def test_features_are_stored_from_the_tower_of_another(tmp_path):
    source = save(HOLDERS["vit_and_bert"][0](), tmp_path / "model").vision_model
    make_image_processor().save_pretrained(tmp_path / "model")
    datasets.Dataset.from_list([{"image": make_image(0)}]).to_parquet(tmp_path / "rows.parquet")
    arguments = ["--vision-model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--dtype", "float32"]
    main(["cache-features", str(tmp_path / "rows.parquet"), *arguments, "--size", "28", "--device", "cpu"])
    pixel_values = make_image_processor()(images=[make_image(0)], return_tensors="pt")["pixel_values"]
    found = read_cached_features(load_cached_features(tmp_path / "out")[0])
    torch.testing.assert_close(found, source(pixel_values=pixel_values).last_hidden_state[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "model",
    [
        lambda: transformers.BertModel(transformers.BertConfig(**BERT)),
        lambda: transformers.VisionEncoderDecoderModel(
            transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
                tower_config("vit"), transformers.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
            )
        ),
    ],
    ids=["bert", "encoder_decoder"],
)
def test_what_no_tower_is_taken_out_of_is_refused(model, tmp_path, bert):
    save(model(), tmp_path)
    for load_vision_tower in (True, False):
        with pytest.raises(ValueError, match="in which there is no known vision tower"):
            Blip2ForPreTraining.from_encoders_pretrained(tmp_path, bert, load_vision_tower=load_vision_tower)


def test_a_model_that_has_no_tower_is_refused(tmp_path):
    model = save(make_stage1(has_vision_tower=False), tmp_path)
    with pytest.raises(ValueError, match=r"lacks 40 weights \(embeddings.class_embedding"):
        load_tower(tmp_path)
    with pytest.raises(ValueError, match="has no vision tower"):
        load_tower(model)


def drop(folder, pattern: str):
    """Takes weights out of a checkpoint."""
    weights = load_file(folder / "model.safetensors")
    kept = {name: x for name, x in weights.items() if not re.search(pattern, name)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("model", "unread"),
    [
        (lambda: transformers.ViTModel(tower_config("vit")), r"^pooler\."),
        (lambda: transformers.Dinov2Model(tower_config("dinov2")), "mask_token"),
        (lambda: transformers.SiglipVisionModel(tower_config("siglip")), r"^head\."),
    ],
    ids=["vit", "dinov2", "siglip"],
)
def test_a_tower_may_lack_what_is_not_read_and_nothing_else(model, unread, tmp_path):
    source = save(model(), tmp_path)
    drop(tmp_path, unread)
    pixel_values = make_pixel_values()
    found = load_tower(tmp_path).eval()(pixel_values=pixel_values).last_hidden_state
    torch.testing.assert_close(found, source(pixel_values=pixel_values).last_hidden_state)
    drop(tmp_path, r"\.1\..*(key|k_proj)\.weight")
    with pytest.raises(ValueError, match=r"lacks 1 weights \(.*1.*\.weight\), which would be random"):
        load_tower(tmp_path)


def test_a_language_model_has_all_its_weights(tmp_path):
    tied = save(transformers.OPTForCausalLM(LANGUAGE_MODELS["opt"]()), tmp_path / "tied")
    assert_same_weights(load_language_model(tmp_path / "tied"), tied)
    save(transformers.LlamaModel(LANGUAGE_MODELS["llama"]()), tmp_path / "headless")
    with pytest.raises(ValueError, match=r"headless lacks 1 weights \(lm_head.weight\), which would be random"):
        Blip2ForConditionalGeneration.from_pretrained_parts(make_model(), tmp_path / "headless", image_token_index=319)


def test_a_blip2_is_no_language_model(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs", transformers_compatible=True)
    for given in (model, tmp_path / "ours", tmp_path / "theirs"):
        with pytest.raises(ValueError, match="is a BLIP-2: a language model was expected"):
            load_language_model(given)
    assert load_language_model(model.language_model) is model.language_model


def test_a_bert_has_all_its_weights(tmp_path, bert):
    config = transformers.BertConfig(**BERT)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    tower = transformers.ViTModel(tower_config("vit"))
    model = Blip2ForPreTraining.from_encoders_pretrained(tower, tmp_path)
    expected = transformers.BertModel.from_pretrained(tmp_path).embeddings.word_embeddings.weight
    assert torch.equal(model.embeddings.word_embeddings.weight[: len(expected)], expected)
    drop(tmp_path, r"layer\.1\.output\.dense")
    with pytest.raises(ValueError, match="lacks 2 weights .*A checkpoint of a BERT was expected"):
        Blip2ForPreTraining.from_encoders_pretrained(tower, tmp_path)


def test_stage_1_has_all_its_weights(tmp_path):
    save(make_stage1(), tmp_path)
    drop(tmp_path, "^query_tokens")
    language_model = transformers.AutoModelForCausalLM.from_config(LANGUAGE_MODELS["opt"]())
    with pytest.raises(ValueError, match="lacks 1 weights .query_tokens.weight"):
        Blip2ForConditionalGeneration.from_pretrained_parts(tmp_path, language_model)
    with pytest.raises(ValueError, match="lacks 1 weights .query_tokens.weight"):
        make_model().attach_text_networks(tmp_path)


def test_a_model_of_another_kind_is_no_blip2(tmp_path):
    save(HOLDERS["clip"][0](), tmp_path)
    with pytest.raises(ValueError, match="is of type 'clip': a BLIP-2 or an InstructBLIP was expected"):
        Blip2Model.from_pretrained(tmp_path)


def test_fine_tuning_starts_from_a_whole_model(tmp_path):
    save(make_model(), tmp_path)
    make_processor().save_pretrained(tmp_path)
    drop(tmp_path, "^language_projection")
    with pytest.raises(ValueError, match="lacks 2 weights .language_projection.bias"):
        load_writer(tmp_path)


def test_weights_of_other_shapes_than_the_configuration_says(tmp_path):
    save(make_model(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["language_projection.bias"] = torch.zeros(3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights of .* have other shapes .*language_projection.bias"):
        load_whole(Blip2ForConditionalGeneration, tmp_path, "A BLIP-2")


def test_weights_that_are_cut_off(tmp_path):
    save(make_model(), tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(ValueError, match="weights of .* is cut off or damaged .*again"):
        load_whole(Blip2ForConditionalGeneration, tmp_path, "A BLIP-2")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="can't be loaded .*again, all of its files"):
        load_whole(Blip2ForConditionalGeneration, tmp_path, "A BLIP-2")
