import pytest
import torch
import transformers
from tiny import QFORMER, VISION, assert_same_model, make_config, make_pixel_values, randomize
from towers import TOWERS

from blip2_hf import Blip2Config, Blip2Model, Blip2VisionConfig, Blip2VisionModel


def make_image_side(vision_config, **kwargs) -> Blip2Model:
    return randomize(Blip2Model(make_config(None, vision_config=vision_config, **kwargs))).eval()


@pytest.mark.parametrize("name", TOWERS)
def test_any_tower_gives_patch_features(name, tmp_path):
    config, num_features = TOWERS[name]
    model = make_image_side(config())
    pixel_values = make_pixel_values(size=64 if name in ("convnext", "resnet") else 28)
    image_embeds = model.get_image_embeds(pixel_values)
    assert image_embeds.shape == (2, num_features, 32)
    expected = model.vision_model.tower(pixel_values=pixel_values).last_hidden_state
    if expected.dim() == 4:
        expected = expected.permute(0, 2, 3, 1).reshape(2, -1, 32)
    torch.testing.assert_close(image_embeds, expected)
    assert model(pixel_values).last_hidden_state.shape == (2, 4, 32)
    model.save_pretrained(tmp_path)
    loaded = Blip2Model.from_pretrained(tmp_path).eval()
    assert_same_model(loaded, model, loaded(pixel_values).last_hidden_state, model(pixel_values).last_hidden_state)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_of_a_two_tower_config_the_vision_part_is_taken(name):
    kind = {"clip": transformers.CLIPConfig, "siglip": transformers.SiglipConfig}[name]
    config = kind(vision_config=TOWERS[name][0]().to_dict())
    assert Blip2Config(vision_config=config).vision_config.model_type == f"{name}_vision_model"


@pytest.mark.parametrize("name", ["clip", "dinov2", "vit"])
def test_other_image_sizes_are_interpolated(name):
    model = make_image_side(TOWERS[name][0]())
    assert model.get_image_embeds(make_pixel_values(size=42)).shape == (2, 10, 32)


@pytest.mark.parametrize("layer", [0, 2, -2])
@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2"])
def test_vision_feature_layer_picks_a_hidden_state(name, layer):
    model = make_image_side(TOWERS[name][0](), vision_feature_layer=layer)
    pixel_values = make_pixel_values()
    hidden_states = model.vision_model.tower(pixel_values=pixel_values, output_hidden_states=True).hidden_states
    assert torch.equal(model.get_image_embeds(pixel_values), hidden_states[layer])
    assert not torch.allclose(hidden_states[layer], hidden_states[-1])


def test_vision_feature_layer_of_a_tower_with_stages_has_that_stage_width():
    model = make_image_side(TOWERS["convnext"][0](), vision_feature_layer=-2)
    assert model.config.qformer_config.encoder_hidden_size == 24
    assert model.get_image_embeds(make_pixel_values(size=64)).shape == (2, 16, 24)


@pytest.mark.parametrize("layer", [0, 1, -2, None])
def test_own_tower_stops_at_vision_feature_layer(layer):
    model = make_image_side(dict(VISION), vision_feature_layer=layer)
    pixel_values = make_pixel_values()
    whole = Blip2VisionModel(model.config.vision_config)
    whole.load_state_dict(model.vision_model.state_dict())
    hidden_states = whole.eval()(pixel_values, output_hidden_states=True).hidden_states
    assert torch.equal(model.get_image_embeds(pixel_values), hidden_states[-1 if layer is None else layer])


@pytest.mark.parametrize("layer", [4, -5])
@pytest.mark.parametrize("config", [dict(VISION), TOWERS["clip"][0]()], ids=["own", "clip"])
def test_vision_feature_layer_out_of_range_is_an_error(config, layer):
    with pytest.raises(ValueError, match="4 hidden states"):
        make_image_side(config, vision_feature_layer=layer).get_image_embeds(make_pixel_values())


def test_features_of_another_width_are_an_error():
    from blip2_hf.models.modeling_vision import flatten_feature_map

    with pytest.raises(ValueError, match="encoder_hidden_size"):
        flatten_feature_map(torch.zeros(2, 5, 31), 32)
    assert flatten_feature_map(torch.zeros(2, 3, 4, 32), 32).shape == (2, 12, 32)


def test_own_tower_equals_transformers_without_the_last_layernorm():
    config = Blip2VisionConfig(**VISION)
    ours = randomize(Blip2VisionModel(config)).eval()
    theirs = transformers.Blip2VisionModel(transformers.Blip2VisionConfig(**VISION)).eval()
    theirs.load_state_dict(ours.state_dict())
    theirs.post_layernorm.eps = config.post_layernorm_eps
    for size in (28, 42, 56):
        pixel_values = make_pixel_values(size=size)
        expected = theirs(pixel_values, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(ours.post_layernorm(ours(pixel_values).last_hidden_state), expected)


def test_own_tower_in_clip_shape_equals_clip():
    config = Blip2VisionConfig(
        **VISION, hidden_act="quick_gelu", layer_norm_eps=1e-5, use_pre_layernorm=True, interpolate_align_corners=True
    )
    clip_config = transformers.CLIPVisionConfig(**VISION, patch_size=14, hidden_act="quick_gelu", layer_norm_eps=1e-5)
    clip = randomize(transformers.CLIPVisionModel(clip_config)).eval()
    ours = Blip2VisionModel(config).eval()
    ours.load_state_dict(clip_to_blip2(clip.state_dict(), ours.state_dict()))
    pixel_values = make_pixel_values()
    torch.testing.assert_close(ours(pixel_values).last_hidden_state, clip(pixel_values).last_hidden_state)


def clip_to_blip2(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    source = {name.removeprefix("vision_model."): value for name, value in source.items()}
    state = dict(target)
    state["embeddings.class_embedding"] = source["embeddings.class_embedding"][None, None]
    state["embeddings.position_embedding"] = source["embeddings.position_embedding.weight"][None]
    state["embeddings.patch_embedding.weight"] = source["embeddings.patch_embedding.weight"]
    state["embeddings.patch_embedding.bias"] = torch.zeros_like(target["embeddings.patch_embedding.bias"])
    for name in target:
        if "qkv" in name:
            state[name] = torch.cat([source[name.replace("qkv", f"{x}_proj")] for x in "qkv"])
        elif name.startswith("encoder."):
            state[name] = source[name.replace("self_attn.projection", "self_attn.out_proj")]
        elif name.startswith("pre_layernorm"):
            state[name] = source[name.replace("pre_layernorm", "pre_layrnorm")]
    return state


def test_image_size_errors():
    model = Blip2VisionModel(Blip2VisionConfig(**VISION))
    with pytest.raises(ValueError, match="smaller than one patch"):
        model(make_pixel_values(size=7))
    with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
        model(make_pixel_values(size=42), interpolate_pos_encoding=False)


def test_layernorm_after_the_tower_has_eps_1e5_and_is_trained():
    for vision_config in (dict(VISION), TOWERS["clip"][0]()):
        model = make_image_side(vision_config)
        assert model.vision_model.post_layernorm.eps == 1e-5
        trained = {name for name, p in model.vision_model.named_parameters() if p.requires_grad}
        assert trained == {"post_layernorm.weight", "post_layernorm.bias"}


def test_image_embeds_stand_for_pixel_values():
    model = make_image_side(dict(VISION))
    pixel_values = make_pixel_values()
    image_embeds = model.vision_model(pixel_values).last_hidden_state
    assert torch.equal(image_embeds, model.get_image_embeds(pixel_values))
    expected = model(pixel_values).last_hidden_state
    assert torch.equal(model(image_embeds=image_embeds).last_hidden_state, expected)
    with pytest.raises(ValueError, match="either pixel_values or image_embeds"):
        model(pixel_values, image_embeds=image_embeds)


def test_timm_tower():
    timm = pytest.importorskip("timm", reason="timm is not installed, or does not import (it needs torchvision)")
    assert timm
    config = transformers.TimmWrapperConfig(architecture="resnet10t", model_args={"in_chans": 3})
    tower = transformers.AutoModel.from_config(config)
    model = Blip2Model(
        make_config(None, vision_config=config, qformer_config={**QFORMER, "encoder_hidden_size": 512}), tower
    )
    assert model.get_image_embeds(make_pixel_values(size=64)).shape == (2, 4, 512)
