"""Cells of a feature map get positions, by whatever road a model gets its tower; sequences stay what they are."""

import json
import math

import pytest
import torch
import transformers
from stage1 import Processor, make_pairs, make_retrieval
from tiny import QFORMER, make_config, make_image_processor, make_pixel_values, randomize
from torch.nn.functional import cosine_similarity
from towers import SMALL, TOWERS
from transformers.modeling_outputs import BaseModelOutput

from blip2_hf import Blip2Config, Blip2ForConditionalGeneration, Blip2ForPreTraining, Blip2Model
from blip2_hf.cli import main as run_command
from blip2_hf.data import VisionTower, cache_features, load_cached_features, read_cached_features
from blip2_hf.models.backbones import measure_width
from blip2_hf.models.configuration_blip2 import is_convolutional
from blip2_hf.models.modeling_vision import add_positions, flatten_feature_map
from blip2_hf.retrieval.loading import check_same_model, describe_model


CONVOLUTIONAL = ("convnext", "resnet")


def make_tower(name: str = "convnext") -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return randomize(transformers.AutoModel.from_config(TOWERS[name][0]())).eval()


@pytest.fixture(scope="module")
def bert() -> transformers.PreTrainedModel:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = transformers.BertConfig(vocab_size=30, **{n: QFORMER[n] for n in names}, max_position_embeddings=40)
    return transformers.BertModel(config)


def positions_by_loops(height: int, width: int, hidden_size: int) -> torch.Tensor:
    positions, quarter = torch.zeros(height, width, hidden_size), math.ceil(hidden_size / 4)
    for row in range(height):
        for column in range(width):
            for channel in range(hidden_size):
                part, index = divmod(channel, quarter)
                place = (row + 0.5) / height if part < 2 else (column + 0.5) / width
                angle = math.pi * place * 2 ** (3 * index / max(1, quarter - 1))
                positions[row, column, channel] = math.cos(angle) if part % 2 else math.sin(angle)
    return positions


@pytest.mark.parametrize("height, width, hidden_size", [(3, 3, 8), (2, 5, 16), (4, 1, 10)])
def test_positions_are_those_of_a_plain_loop_in_both_layouts(height, width, hidden_size):
    features = torch.randn(2, height, width, hidden_size) * torch.tensor([1.0, 3.0])[:, None, None, None] + 3
    scale = torch.stack([image.std() for image in features])[:, None, None, None]
    expected = features + positions_by_loops(height, width, hidden_size) * scale
    torch.testing.assert_close(add_positions(features), expected)
    for layout in (features, features.permute(0, 3, 1, 2).contiguous()):
        actual = flatten_feature_map(layout, hidden_size, position_embedding=True)
        torch.testing.assert_close(actual, expected.flatten(1, 2))


@pytest.mark.parametrize("shape", [(1, 32, 3, 3), (1, 3, 3, 32), (1, 9, 32)])
def test_the_width_of_features_is_measured_in_every_layout(shape):
    tower = torch.nn.Linear(1, 1)
    tower.config = transformers.TimmWrapperConfig()
    tower.forward = lambda **kwargs: BaseModelOutput(last_hidden_state=torch.zeros(shape))
    assert measure_width(tower, None) == 32


def test_all_cells_of_a_large_map_differ():
    positions = flatten_feature_map(torch.randn(1, 24, 24, 64) * 1e-3, 64, True)[0]
    positions = positions - positions.mean(dim=0)
    alike = cosine_similarity(positions[:, None], positions[None], dim=-1) - 2 * torch.eye(24 * 24)
    assert alike.max() < 0.995


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    # The sum of squares of a map exceeds what float16 holds
    features = (torch.randn(2, 12, 12, 32) * 40).to(dtype)
    actual = add_positions(features)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), add_positions(features.float()), rtol=2**-7, atol=0.25)


def test_gradients_flow_through_the_scale_and_none_of_a_blank_map_is_nan():
    features, weights = torch.randn(1, 2, 3, 8, requires_grad=True), torch.randn(1, 2, 3, 8)
    by_loops = features + positions_by_loops(2, 3, 8) * features.std()
    (expected,) = torch.autograd.grad((by_loops * weights).sum(), features)
    (actual,) = torch.autograd.grad((add_positions(features) * weights).sum(), features)
    torch.testing.assert_close(actual, expected)
    blank = torch.zeros(1, 2, 3, 8, requires_grad=True)
    add_positions(blank).sum().backward()
    assert blank.grad.isfinite().all()


def make_symmetric(tower: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Give convolutions kernels that are their own mirror images: a mirrored picture has the mirrored feature map."""
    with torch.no_grad():
        for module in tower.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.copy_((module.weight + module.weight.flip(-1)) / 2)
    return tower


@torch.no_grad()
def test_only_positions_tell_a_picture_from_its_mirror_image():
    tower, pixel_values = make_symmetric(make_tower()), make_pixel_values(size=96)
    for has_positions in (False, True):
        config = make_config(None, vision_config=tower.config, vision_position_embedding=has_positions)
        torch.manual_seed(1)
        model = randomize(Blip2Model(config))
        model.vision_model.tower.load_state_dict(tower.state_dict())
        model.eval()
        pictures = (pixel_values, pixel_values.flip(-1))
        features, mirrored = (model.get_image_embeds(x).unflatten(1, (3, 3)) for x in pictures)
        outputs, others = (model(x).last_hidden_state for x in pictures)
        if has_positions:
            assert (mirrored.flip(2) - features).abs().mean() > 0.1 * features.abs().mean()
            assert (others - outputs).abs().max() > 0.05
        else:
            torch.testing.assert_close(mirrored.flip(2), features, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(others, outputs, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_picture_that_is_not_square():
    tower, pixel_values = make_tower(), torch.randn(2, 3, 64, 160)
    features = tower(pixel_values).last_hidden_state.permute(0, 2, 3, 1)
    assert features.shape == (2, 2, 5, 32)
    scale = torch.stack([image.std() for image in features])[:, None, None, None]
    expected = features + positions_by_loops(2, 5, 32) * scale
    torch.testing.assert_close(VisionTower(tower).get_image_embeds(pixel_values), expected.flatten(1, 2))


def test_features_of_another_width_are_an_error_with_positions_too():
    config = make_config(None, vision_config=TOWERS["convnext"][0](), vision_position_embedding=True)
    model = Blip2Model(config)
    model.vision_model.hidden_size = 31
    with pytest.raises(ValueError, match=r"shape \(1, 32, 2, 3\); patch features of width 31"):
        model.get_image_embeds(torch.zeros(1, 3, 64, 96))


def test_it_compiles_without_a_break():
    model = Blip2Model(make_config(None, vision_config=TOWERS["convnext"][0](), vision_position_embedding=True)).eval()
    pixel_values = make_pixel_values(size=64)
    with torch.no_grad():
        expected = model(pixel_values).last_hidden_state
        actual = torch.compile(model, backend="eager", fullgraph=True)(pixel_values).last_hidden_state
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "config, expected",
    [
        *((make(), name in CONVOLUTIONAL) for name, (make, _) in TOWERS.items()),
        (transformers.SwinConfig(), False),
        (transformers.PvtConfig(), False),
        (transformers.PvtV2Config(), False),
        (transformers.SegformerConfig(), False),
        (transformers.Siglip2VisionConfig(**SMALL), False),
        (transformers.ConvNextV2Config(), True),
        (transformers.EfficientNetConfig(), True),
        (transformers.RegNetConfig(), True),
        (transformers.MobileNetV2Config(), True),
        (transformers.TimmWrapperConfig(), True),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_which_configurations_are_of_convolutions(config, expected):
    assert is_convolutional(config) is expected


def test_the_configuration_keeps_it_and_older_ones_lack_it(tmp_path):
    tower = TOWERS["convnext"][0]()
    config = Blip2Config(vision_config=tower, vision_position_embedding=True)
    config.save_pretrained(tmp_path)
    assert Blip2Config.from_pretrained(tmp_path).vision_position_embedding is True
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["vision_position_embedding"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    older = Blip2Config.from_pretrained(tmp_path)
    assert older.vision_position_embedding is False
    assert Blip2Model(older).vision_model.position_embedding is False


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_a_sequence_is_left_as_it_is(name, bert):
    tower, pixel_values = make_tower(name), make_pixel_values()
    expected = tower(pixel_values).last_hidden_state
    model = Blip2ForPreTraining.from_encoders_pretrained(tower, bert).eval()
    assert not model.config.vision_position_embedding
    assert torch.equal(model.get_image_embeds(pixel_values), expected)
    model.vision_model.position_embedding = True
    assert torch.equal(model.get_image_embeds(pixel_values), expected)


@torch.no_grad()
@pytest.mark.parametrize("layer", [None, -2])
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_every_road_leads_to_the_same_features(name, layer, bert, tmp_path):
    tower, pixel_values = make_tower(name), make_pixel_values(size=64)
    outputs = tower(pixel_values, output_hidden_states=True)
    features = outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]
    expected = add_positions(features.permute(0, 2, 3, 1)).flatten(1, 2)
    torch.testing.assert_close(VisionTower(tower, layer).get_image_embeds(pixel_values), expected)

    parts = {"vision_model": tower, "text_encoder": bert, "vision_feature_layer": layer}
    model = Blip2ForPreTraining.from_encoders_pretrained(**parts).eval()
    without = Blip2ForPreTraining.from_encoders_pretrained(**parts, load_vision_tower=False)
    without.save_pretrained(tmp_path / "without")
    attached = Blip2ForPreTraining.from_pretrained(tmp_path / "without").attach_vision_tower(tower).eval()
    attached.save_pretrained(tmp_path / "attached")
    loaded = Blip2Model.from_pretrained(tmp_path / "attached").eval()
    language_model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4))
    join = Blip2ForConditionalGeneration.from_pretrained_parts
    joined = [
        join(tmp_path / "attached", language_model),
        join(tmp_path / "without", language_model, vision_model=tower),
        join(language_model=language_model, **parts),
    ]
    for made in (model, attached, loaded, *joined):
        torch.testing.assert_close(made.get_image_embeds(pixel_values), expected)


def test_a_model_from_before_stays_as_it_is(bert):
    tower, pixel_values = make_tower(), make_pixel_values(size=64)
    older = Blip2ForPreTraining.from_encoders_pretrained(tower, bert, load_vision_tower=False)
    older.config.vision_position_embedding = False
    language_model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4))
    model = Blip2ForConditionalGeneration.from_pretrained_parts(older, language_model, vision_model=tower)
    with torch.no_grad():
        expected = tower(pixel_values).last_hidden_state.flatten(2).transpose(1, 2)
        assert torch.equal(model.get_image_embeds(pixel_values), expected)


def test_stored_features(tmp_path):
    rows, processor = make_pairs().select_columns(["image"]), make_image_processor(64)
    tower = VisionTower(make_tower())
    cache_features(rows, tower, processor, tmp_path, dtype="float32")
    pixel_values = processor(images=[rows[0]["image"]], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = tower.get_image_embeds(pixel_values)[0]
    torch.testing.assert_close(read_cached_features(load_cached_features(tmp_path)[0]), expected)
    assert json.loads((tmp_path / "cache.json").read_text())["vision_position_embedding"] is True
    tower.config.vision_position_embedding = tower.vision_model.position_embedding = False
    with pytest.raises(ValueError, match="vision_position_embedding: True there, None now"):
        cache_features(rows, tower, processor, tmp_path, dtype="float32")


def test_training_refuses_features_that_the_model_would_not_compute(bert, tmp_path):
    make_tower().save_pretrained(tmp_path / "tower")
    make_image_processor(64).save_pretrained(tmp_path / "tower")
    bert.save_pretrained(tmp_path / "bert")
    Processor().tokenizer.save_pretrained(tmp_path / "bert")
    make_pairs().to_parquet(tmp_path / "pictures.parquet")
    tower = ["--vision-model", str(tmp_path / "tower")]
    features = str(tmp_path / "features")
    run_command(["cache-features", str(tmp_path / "pictures.parquet"), *tower, "--size", "64", "--output", features])
    description = json.loads((tmp_path / "features" / "cache.json").read_text())
    del description["vision_position_embedding"]
    (tmp_path / "features" / "cache.json").write_text(json.dumps(description))
    train = ["pretrain", features, "--stage", "1", *tower, "--text-encoder", str(tmp_path / "bert"), "--image-size"]
    with pytest.raises(SystemExit, match="vision_position_embedding=False, but the model has True"):
        run_command([*train, "64", "--held-out", "0", "--output", str(tmp_path / "run")])


def test_an_index_tells_models_apart_by_it(tmp_path):
    fields = {"vision_config": TOWERS["convnext"][0]()}
    plain, other = (make_retrieval(**fields, vision_position_embedding=value) for value in (False, True))
    there, now = (describe_model(model, make_image_processor()) | {"model": ""} for model in (plain, other))
    with pytest.raises(ValueError, match="vision_position_embedding: None there, True now"):
        check_same_model(tmp_path, there, now)
    with pytest.raises(ValueError, match="vision_position_embedding: True there, None now"):
        check_same_model(tmp_path, now, there)
    del there["vision_position_embedding"]
    check_same_model(tmp_path, there, describe_model(plain, make_image_processor()))
