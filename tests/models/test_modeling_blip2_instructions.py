"""A Q-Former that reads the question too."""

import pytest
import torch
from stage1 import make_stage1
from tiny import make_model, make_pixel_values

from blip2_hf import Blip2ForConditionalGeneration
from blip2_hf.training import (
    train_only,
)


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
