"""The loss of stage 2, with the scores of labels alone and with all scores."""

import copy

import pytest
import torch
import transformers
from stage2 import (
    make_batch,
    trained_gradients,
)
from tiny import LANGUAGE_MODELS, ROTARY, make_config, make_model

from blip2_hf import Blip2ForConditionalGeneration
from blip2_hf.models._compat import CACHE_NAME
from blip2_hf.models.losses import language_modeling_loss
from blip2_hf.training import (
    train_only,
)


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


def test_a_wrapped_language_model_is_given_positions_and_labels():
    """PEFT's wrapper names no arguments in its forward."""
    from peft import LoraConfig, get_peft_model

    plain, batch = make_model("gpt2"), make_batch()
    batch = {name: value.flip(1) if name != "pixel_values" else value for name, value in batch.items()}
    wrapped_lm = get_peft_model(copy.deepcopy(plain.language_model), LoraConfig(target_modules=["c_attn"]))
    wrapped = Blip2ForConditionalGeneration(plain.config, plain.vision_model, wrapped_lm).eval()
    # As they were given: a new model draws the weights that transformers has not made
    assert not any(p.any() for name, p in wrapped_lm.named_parameters() if "lora_B" in name)
    for name in ("query_tokens", "qformer", "language_projection"):
        getattr(wrapped, name).load_state_dict(getattr(plain, name).state_dict())
    lengths = []
    wrapped.get_output_embeddings().register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    expected = plain(**batch, skip_logits=False).loss
    torch.testing.assert_close(wrapped(**batch, skip_logits=True).loss, expected)
    assert lengths[0] < batch["input_ids"].shape[1] - 1
