"""Drop path, and learning rates by layer."""

import numpy as np
import pytest
import torch
import transformers
from stage2 import (
    make_arguments,
    make_trainer,
    trained_names,
)
from tiny import make_config, make_model, make_pixel_values

from blip2_hf import Blip2VisionModel
from blip2_hf.training import (
    train_only,
    vision_layer_scales,
)


def test_drop_path_leaves_branches_out_in_training_alone():
    model = make_model(vision_config={**make_config().vision_config.to_dict(), "drop_path_rate": 0.5})
    tower: Blip2VisionModel = model.vision_model
    assert [layer.drop_path.drop_prob for layer in tower.encoder.layers] == [0.0, 0.25, 0.5]
    pixel_values = make_pixel_values()
    frozen = [model.train().get_image_embeds(pixel_values) for _ in range(2)]
    torch.testing.assert_close(*frozen)
    train_only(model, "finetune").train()
    torch.manual_seed(0)
    draws = torch.stack([model.get_image_embeds(pixel_values).detach() for _ in range(10)])
    assert draws.std(dim=0).max() > 1e-3
    layer, states = tower.encoder.layers[2], torch.randn(400, 1, 32)
    dropped = layer(states).detach()
    torch.manual_seed(1)
    untouched = (dropped == states).all(dim=-1).float().mean()
    # Both branches are left out for a quarter of the samples
    assert 0.15 < untouched < 0.35
    layer.eval()
    torch.testing.assert_close(model.eval().get_image_embeds(pixel_values), frozen[0])


def test_vision_layer_scales_are_those_of_the_authors():
    model = train_only(make_model(), "finetune")
    scales = vision_layer_scales(model, 0.9)
    names = {name: scales.get(parameter, 1.0) for name, parameter in model.named_parameters()}
    for name, scale in names.items():
        if name.startswith("vision_model.embeddings."):
            assert scale == pytest.approx(0.9**4)
        elif name.startswith("vision_model.encoder.layers."):
            assert scale == pytest.approx(0.9 ** (3 - int(name.split(".")[3])))
        else:
            assert scale == 1


def test_vision_layer_scales_of_another_tower():
    tower = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, patch_size=14, image_size=28
    )
    model = train_only(make_model(vision_config=tower), "finetune")
    scales = vision_layer_scales(model, 0.5)
    names = {name: scales.get(parameter, 1.0) for name, parameter in model.named_parameters()}
    assert names["vision_model.tower.embeddings.cls_token"] == 0.125
    assert {names[n] for n in names if ".layer.0." in n and n.startswith("vision_model.")} == {0.25}
    assert {names[n] for n in names if ".layer.1." in n and n.startswith("vision_model.")} == {0.5}
    assert names["vision_model.tower.layernorm.weight"] == names["vision_model.post_layernorm.weight"] == 1


class LearningRates(transformers.TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append({parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]})


def test_layer_decay_acts_on_the_learning_rate_of_each_group_at_each_step(tmp_path):
    trainer = make_trainer(tmp_path, vision_layer_decay=0.5)
    rates = LearningRates()
    trainer.add_callback(rates)
    trainer.train()
    model, scales = trainer.model, vision_layer_scales(trainer.model, 0.5)
    assert len(set(scales.values())) == 4
    # A warm-up of two steps from a hundredth, and a cosine down to 0
    factors = [0.01, 1, *(0.5 * (1 + np.cos(np.pi * step / 4)) for step in range(1, 5))]
    assert len(rates.seen) == 6
    for seen, factor in zip(rates.seen, factors, strict=True):
        assert len(seen) == len(trained_names(model))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert seen[parameter] == pytest.approx(1e-2 * factor * scales.get(parameter, 1.0), rel=1e-6), name


def test_layer_decay_and_weight_decay_go_together(tmp_path):
    trainer = make_trainer(tmp_path, vision_layer_decay=0.5)
    trainer.create_optimizer()
    decays = {p: group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    parameters = dict(trainer.model.named_parameters())
    assert decays[parameters["vision_model.encoder.layers.0.mlp.fc1.weight"]] == 0.05
    assert decays[parameters["vision_model.encoder.layers.0.mlp.fc1.bias"]] == 0
    assert decays[parameters["query_tokens.weight"]] == 0


@pytest.mark.parametrize("decay", [0, 1.5])
def test_layer_decay_out_of_bounds(tmp_path, decay):
    with pytest.raises(ValueError, match="vision_layer_decay"):
        make_arguments(tmp_path, vision_layer_decay=decay)
