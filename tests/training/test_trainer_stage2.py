"""Stage 2 and fine-tuning: the loss at labels alone, presets, learning rates by layer, evaluation by generation."""

import numpy as np
import pytest
import torch
import transformers
from stage1 import make_stage1
from stage2 import CAPTIONS, Pictures, losses, make_collator
from tiny import LANGUAGE_MODELS, ROTARY, make_config, make_model, make_pixel_values, make_processor

from blip2_hf import Blip2ForConditionalGeneration, Blip2VisionModel
from blip2_hf.evaluation import GeneratedTextMetrics, exact_match, word_f1
from blip2_hf.models._compat import CACHE_NAME
from blip2_hf.models.frozen import cast_parameters
from blip2_hf.models.losses import language_modeling_loss
from blip2_hf.training import (
    Blip2Trainer,
    FineTuningArguments,
    Stage1Arguments,
    Stage2Arguments,
    describe_trained_parts,
    train_only,
    vision_layer_scales,
)
from blip2_hf.training.presets import PRESETS


def make_batch(name: str = "opt") -> dict[str, torch.Tensor]:
    """Ragged texts, with prompts that are not learned."""
    processor = make_processor(is_encoder_decoder=name == "t5")
    collate = make_collator(processor)
    return collate([Pictures()[index] for index in range(len(CAPTIONS))])


def trained_gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# The loss


@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_scores_at_labels_alone_give_the_same_loss_and_gradients(name, trains_head):
    model, batch = make_model(name).train(), make_batch(name)
    model.qformer.eval()
    head, lengths = model.get_output_embeddings(), []
    head.requires_grad_(trains_head)
    full = model(**batch, num_items_in_batch=7, skip_logits=False)
    expected = trained_gradients(model, full.loss)
    head.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    actual = model(**batch, num_items_in_batch=7)
    assert actual.logits is None and full.logits is not None and CACHE_NAME not in actual
    has_label = batch["labels"].ne(-100).any(dim=0)
    # T5 takes no logits_to_keep; all positions of its decoder have labels
    assert lengths == [len(has_label) if name == "t5" else int(has_label[1:].sum())]
    assert name == "t5" or lengths[0] < batch["input_ids"].shape[1] - 1
    torch.testing.assert_close(actual.loss, full.loss, rtol=1e-6, atol=1e-6)
    found = trained_gradients(model, actual.loss)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=2e-5, msg=key)


def test_hidden_states_are_given_to_whoever_asks():
    model, batch = make_model().train(), make_batch()
    outputs = model(**batch, skip_logits=True, output_hidden_states=True)
    assert outputs.logits is None and outputs.hidden_states is not None


def test_words_before_the_picture_can_be_run_once_for_all_rows():
    model, batch = make_model().train(), make_batch()
    model.qformer.eval()
    shared, rows = torch.tensor([[5, 9, 7]]), len(batch["input_ids"])
    whole = batch | {"input_ids": torch.cat([shared.expand(rows, -1), batch["input_ids"]], dim=1)}
    for name, value in (("labels", -100), ("attention_mask", 1)):
        whole[name] = torch.cat([torch.full((rows, 3), value), batch[name]], dim=1)
    full = model(**whole, skip_logits=False)
    expected = trained_gradients(model, full.loss)
    with torch.no_grad():
        cache = model.language_model(shared, use_cache=True)[CACHE_NAME]
    cache.batch_repeat_interleave(rows)
    given = batch | {"attention_mask": whole["attention_mask"], CACHE_NAME: cache}
    actual = model(**given, skip_logits=True)
    torch.testing.assert_close(actual.loss, full.loss, rtol=1e-6, atol=1e-6)
    found = trained_gradients(model, actual.loss)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=2e-5, msg=key)


def test_positions_that_all_rows_share():
    model, batch = make_model().train(), make_batch()
    model.qformer.eval()
    positions = torch.arange(batch["input_ids"].shape[1])[None]
    expected = model(**batch, position_ids=positions, skip_logits=False).loss
    torch.testing.assert_close(model(**batch, position_ids=positions, skip_logits=True).loss, expected)


def test_labels_without_text_are_an_error():
    batch = make_batch()
    del batch["input_ids"], batch["attention_mask"]
    with pytest.raises(ValueError, match="without input_ids"):
        make_model()(**batch)


def test_a_language_model_that_is_trained_has_gradients():
    model, batch = train_only(make_model(), "lora_language_model").train(), make_batch()
    model(**batch, skip_logits=True).loss.backward()
    assert any(p.grad.any() for n, p in model.named_parameters() if "language_model" in n and p.requires_grad)


def test_scores_that_the_language_model_bounds_stay_bounded():
    config = transformers.Gemma2Config(**ROTARY, query_pre_attn_scalar=8, final_logit_softcapping=2.0)
    model = Blip2ForConditionalGeneration(make_config(text_config=config)).train()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(50)
    model.qformer.eval()
    batch = make_batch()
    expected = model(**batch, skip_logits=False)
    assert expected.logits.abs().max() <= 2
    torch.testing.assert_close(model(**batch, skip_logits=True).loss, expected.loss)


def test_labels_of_nothing_are_no_loss_and_no_nan():
    model, batch = make_model().train(), make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for kwargs in ({"skip_logits": True}, {"skip_logits": False}):
        loss = model(**batch, **kwargs).loss
        loss.backward()
        assert loss.item() == 0
    assert language_modeling_loss(torch.randn(1, 2, 5), torch.full((1, 2), -100)).item() == 0


def test_scores_are_there_for_whoever_calls_the_model():
    model, batch = make_model(), make_batch()
    assert model.train()(**batch).logits is not None
    assert model.eval()(**batch, num_items_in_batch=3).logits is not None


# Presets


def trained_names(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


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


# Instructions


def test_stage_2_leaves_the_networks_for_text_behind():
    stage1 = make_stage1(num_query_tokens=4)
    language_model = make_model().language_model
    model = Blip2ForConditionalGeneration.from_pretrained_parts(stage1, language_model)
    assert not model.config.qformer_config.use_qformer_text_input and not model.training
    assert stage1.config.qformer_config.use_qformer_text_input
    names = {name for name in dict(stage1.qformer.named_parameters()) if not _is_text_network(name)}
    assert set(dict(model.qformer.named_parameters())) == names
    pixel_values = make_pixel_values()
    expected = stage1.eval().get_image_features(pixel_values).last_hidden_state
    actual = model.get_image_features(pixel_values).qformer_outputs.last_hidden_state
    torch.testing.assert_close(actual, expected)
    # All that is trained has a gradient, as DistributedDataParallel wants it
    inputs = {"input_ids": torch.tensor([[5, 6], [7, 8]]), "labels": torch.tensor([[5, 6], [7, 8]])}
    model.train()(pixel_values=pixel_values, **inputs).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def _is_text_network(name: str) -> bool:
    return ".intermediate." in name or (".output." in name and "attention" not in name)


@pytest.mark.parametrize("attached", [False, True])
def test_instructions_reach_the_qformer(attached):
    stage1, language_model = make_stage1(num_query_tokens=4), make_model().language_model
    direct = Blip2ForConditionalGeneration.from_pretrained_parts(stage1, language_model, instruction_aware=True)
    model = direct
    if attached:
        model = Blip2ForConditionalGeneration.from_pretrained_parts(stage1, language_model)
        model.language_projection = direct.language_projection
        model.attach_text_networks(stage1)
    # An optimizer's states are kept by the order of the weights
    wanted = [(name, p.requires_grad) for name, p in direct.named_parameters()]
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == wanted
    pixel_values, question = make_pixel_values(), torch.tensor([[2, 8, 9, 3], [2, 8, 3, 0]])
    mask = question.ne(0).long()
    features = model.get_image_features(pixel_values, qformer_input_ids=question, qformer_attention_mask=mask)
    assert features.pooler_output.shape[:2] == (2, 4)
    # The obvious: queries and question through all of the last layer, the queries taken from what comes out
    query_embeds = model.embeddings(input_ids=question, query_embeds=model.query_tokens(2))
    full = model.qformer(
        query_embeds=query_embeds,
        query_length=4,
        attention_mask=torch.cat([torch.ones(2, 4).long(), mask], dim=1),
        encoder_hidden_states=model.vision_model.post_layernorm(model.get_image_embeds(pixel_values)),
    ).last_hidden_state[:, :4]
    torch.testing.assert_close(features.pooler_output, model.language_projection(full))
    other = model.get_image_features(pixel_values, qformer_input_ids=question + 1, qformer_attention_mask=mask)
    assert not torch.allclose(other.pooler_output, features.pooler_output)
    model.train()
    inputs = {"input_ids": torch.tensor([[5, 6], [7, 8]]), "labels": torch.ones(2, 2).long()}
    model(pixel_values=pixel_values, qformer_input_ids=question, qformer_attention_mask=mask, **inputs).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert any("intermediate." in n and p.grad is not None for n, p in model.named_parameters())


def test_a_question_that_does_not_reach_the_qformer_is_told(monkeypatch):
    stage1, language_model = make_stage1(num_query_tokens=4), make_model().language_model
    told = []
    monkeypatch.setattr("blip2_hf.models.modeling_blip2.logger.warning_once", told.append)
    question = torch.tensor([[2, 8, 9, 3], [2, 8, 3, 0]])
    for aware, given, expected in ((False, None, 0), (True, question, 0), (True, None, 1)):
        model = Blip2ForConditionalGeneration.from_pretrained_parts(stage1, language_model, instruction_aware=aware)
        model.generate(make_pixel_values(), qformer_input_ids=given, max_new_tokens=1)
        assert len(told) == expected
    assert "qformer_tokenizer" in told[0]


def test_text_networks_leave_the_rest_as_it_was():
    stage1 = make_stage1(num_query_tokens=4)
    model = Blip2ForConditionalGeneration.from_pretrained_parts(stage1, make_model().language_model)
    train_only(model, "projection")
    model.gradient_checkpointing_enable()
    before = dict(model.named_parameters())
    model.attach_text_networks(stage1)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert {name for name, p in after.items() if p.requires_grad} == {
        "language_projection.weight",
        "language_projection.bias",
    }
    assert all(layer.gradient_checkpointing for layer in model.qformer.encoder.layer)
    torch.testing.assert_close(
        model.qformer.encoder.layer[0].intermediate.state_dict(),
        stage1.qformer.encoder.layer[0].intermediate.state_dict(),
    )


def test_instructions_need_the_networks_of_stage_1(tmp_path):
    stage1, language_model = make_stage1(num_query_tokens=4), make_model().language_model
    model = Blip2ForConditionalGeneration.from_pretrained_parts(stage1, language_model)
    with pytest.raises(ValueError, match="checkpoint of stage 1"):
        Blip2ForConditionalGeneration.from_pretrained_parts(model, language_model, instruction_aware=True)
    with pytest.raises(ValueError, match="no feed-forward networks for text"):
        model.attach_text_networks(model)
    aware = Blip2ForConditionalGeneration.from_pretrained_parts(stage1, language_model, instruction_aware=True)
    aware.save_pretrained(tmp_path)
    # A trained Q-Former that reads instructions goes on doing so with another language model
    other = Blip2ForConditionalGeneration.from_pretrained_parts(tmp_path, make_model("gpt2").language_model)
    assert other.config.qformer_config.use_qformer_text_input
    torch.testing.assert_close(other.qformer.state_dict(), aware.qformer.state_dict())


# Drop path and learning rates by layer


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


def make_arguments(folder, kind=FineTuningArguments, **kwargs):
    fields = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "max_steps": 6,
        "warmup_steps": 0.3,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "load_best_model_at_end": False,
    }
    return kind(str(folder), **(fields | kwargs))


def make_trainer(folder, name="opt", kind=FineTuningArguments, model=None, compute_metrics=None, **kwargs):
    processor = make_processor(is_encoder_decoder=name == "t5")
    model = model or make_model(name)
    model.generation_config.max_new_tokens = 6
    return Blip2Trainer(
        model,
        make_arguments(folder, kind, **kwargs),
        train_dataset=Pictures(),
        eval_dataset=Pictures(),
        data_collator=make_collator(processor),
        compute_metrics=compute_metrics and compute_metrics(processor),
        processing_class=processor,
    )


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


# The trainer


def test_the_papers_settings(tmp_path):
    stage2 = Stage2Arguments(str(tmp_path))
    assert (stage2.max_steps, stage2.learning_rate, stage2.adam_beta2, stage2.weight_decay) == (
        80_000,
        1e-4,
        0.98,
        0.05,
    )
    assert stage2.lr_scheduler_kwargs["min_lr_rate"] == pytest.approx(0.5)
    assert Stage2Arguments(str(tmp_path), num_train_epochs=3).max_steps == -1
    tuning = FineTuningArguments(str(tmp_path))
    assert (tuning.num_train_epochs, tuning.learning_rate, tuning.warmup_steps) == (5, 1e-5, 1000)
    assert (tuning.adam_beta2, tuning.preset, tuning.predict_with_generate) == (0.999, "finetune", True)


def test_a_learning_rate_below_the_papers_last_one_does_not_rise(tmp_path):
    assert Stage2Arguments(str(tmp_path), learning_rate=1e-5).lr_scheduler_kwargs["min_lr_rate"] == 1
    assert Stage2Arguments(str(tmp_path), learning_rate=0.0).lr_scheduler_kwargs["min_lr_rate"] == 0


def test_other_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        make_arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="no numbered blocks that are trained"):
        make_trainer(tmp_path, preset="stage2", vision_layer_decay=0.5).create_optimizer()
    with pytest.raises(ValueError, match="Blip2Trainer takes Blip2Arguments"):
        Blip2Trainer(make_model(), transformers.TrainingArguments(str(tmp_path)))


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_metrics_see_the_new_text_alone(name, tmp_path):
    seen = []

    class Metrics(GeneratedTextMetrics):
        def __call__(self, prediction):
            seen.append((self.texts(prediction.predictions), self.texts(prediction.label_ids)))
            return super().__call__(prediction)

    trainer = make_trainer(tmp_path, name, compute_metrics=Metrics)
    metrics = trainer.evaluate()
    model, processor = trainer.model, trainer.processing_class
    texts, wanted = seen[0]
    assert wanted == CAPTIONS
    for row, text in zip(Pictures(), texts, strict=True):
        inputs = processor(images=row["image"], text="a photo of", return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=6)
        alone = processor.post_process_image_text_to_text(tokens, input_ids=inputs["input_ids"])[0]
        assert text == alone.partition("\n")[0].strip()
    assert metrics["eval_exact_match"] == exact_match(texts, wanted)
    assert metrics["eval_word_f1"] == word_f1(texts, wanted)
    assert np.isfinite(metrics["eval_loss"])


def test_the_best_checkpoint_is_kept(tmp_path):
    scores = iter([0.1, 0.9, 0.2, 0.3])
    trainer = make_trainer(
        tmp_path,
        compute_metrics=lambda processor: lambda prediction: {"word_f1": next(scores)},
        max_steps=8,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.add_callback(transformers.EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = Blip2ForConditionalGeneration.from_pretrained(trainer.state.best_model_checkpoint)
    torch.testing.assert_close(best.query_tokens.weight, trainer.model.query_tokens.weight)


def test_adapters_in_the_trainer(tmp_path):
    """Evaluation by generation, checkpoints of adapters alone, the same losses after a stop."""
    options = {"preset": "lora_language_model", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    torch.manual_seed(0)
    whole = make_trainer(tmp_path / "whole", compute_metrics=GeneratedTextMetrics, **options)
    whole.train()
    assert whole.evaluate()["eval_word_f1"] >= 0
    assert (tmp_path / "whole" / "checkpoint-2" / "adapter_config.json").exists()
    assert not (tmp_path / "whole" / "checkpoint-2" / "model.safetensors").exists()
    torch.manual_seed(0)
    rest = make_trainer(tmp_path / "rest", **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    np.testing.assert_allclose(losses(rest)[-2:], losses(whole)[-2:], rtol=1e-5)


def test_resuming_with_a_learning_rate_for_each_layer(tmp_path):
    options = {"vision_layer_decay": 0.5, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = make_trainer(tmp_path / "whole", model=without_dropout(make_model()), **options)
    whole.train()
    rest = make_trainer(tmp_path / "rest", model=without_dropout(make_model()), **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    np.testing.assert_allclose(losses(rest)[-2:], losses(whole)[-2:], rtol=1e-5)


def test_adapters_in_stage_1_are_still_stage_1(tmp_path):
    arguments = Stage1Arguments(str(tmp_path), preset="lora_qformer", gradient_caching_chunk_size=2, use_cpu=True)
    trainer = Blip2Trainer(make_stage1(), arguments)
    assert trainer.model.get_base_model().gradient_caching_chunk_size == 2


def test_exact_match_and_word_f1():
    assert exact_match(["A  dog", "cat"], ["a dog", "bird"]) == 0.5
    assert word_f1(["a dog", "two"], ["a cat", "two"]) == pytest.approx((0.5 + 1) / 2)


def test_accumulated_batches_weigh_each_label_alike(tmp_path):
    histories = []
    for batch_size, steps in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        trainer = make_trainer(
            tmp_path,
            kind=Stage2Arguments,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            max_steps=3,
            seed=1,
            model=without_dropout(make_model()),
        )
        trainer.train()
        histories.append(losses(trainer))
    np.testing.assert_allclose(histories[1], histories[0], rtol=1e-4)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model
