import pytest
import torch
from naive_stage1 import naive_stage1
from stage1 import assert_same, gradients, make_inputs, make_stage1
from tiny import NUM_QUERIES, assert_same_model, make_pixel_values

from blip2_hf import Blip2ForPreTraining


pytestmark = pytest.mark.usefixtures("likeliest_negatives")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("image_ids", [None, torch.tensor([4, 7, 4, 1, 0])])
def test_two_passes_equal_four(dtype, tolerance, image_ids):
    model, inputs = make_stage1().train().to(dtype), make_inputs()
    inputs["image_embeds"] = inputs["image_embeds"].to(dtype)
    expected = naive_stage1(model, image_ids=image_ids, **inputs)
    expected_gradients = gradients(model, expected["loss"])
    actual = model(image_ids=image_ids, **inputs)
    actual_gradients = gradients(model, actual.loss)
    assert_same(actual, expected, tolerance)
    assert_same(actual_gradients, expected_gradients, tolerance)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == actual_gradients.keys()


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 8])
def test_gradient_caching_equals_the_whole_batch(chunk_size):
    model, inputs = make_stage1().train(), make_inputs()
    expected = model(**inputs)
    expected_gradients = gradients(model, expected.loss)
    model.gradient_caching_enable(chunk_size)
    actual = model(**inputs)
    actual_gradients = gradients(model, actual.loss)
    assert actual.itg_logits is None
    assert_same(actual, {name: value for name, value in expected.items() if name != "itg_logits"}, 1e-6)
    assert actual_gradients.keys() == expected_gradients.keys()
    assert_same(actual_gradients, expected_gradients, 1e-6)


def test_unfrozen_tower():
    model, inputs = make_stage1().train(), make_inputs()
    model.vision_model.requires_grad_(True)
    inputs.pop("image_embeds")
    pixel_values = make_pixel_values(5)
    image_embeds = model.vision_model(pixel_values).last_hidden_state
    expected = gradients(model, naive_stage1(model, image_embeds, **inputs)["loss"])
    assert any(name.startswith("vision_model.encoder") for name in expected)
    assert_same(gradients(model, model(pixel_values=pixel_values, **inputs).loss), expected, 1e-6)
    model.gradient_caching_enable(2)
    assert_same(gradients(model, model(pixel_values=pixel_values, **inputs).loss), expected, 1e-6)


def test_pixels_and_their_stored_features_are_the_same():
    model, inputs = make_stage1(), make_inputs()
    pixel_values = make_pixel_values(5)
    inputs["image_embeds"] = model.get_image_embeds(pixel_values)
    expected = model(**inputs)
    inputs.pop("image_embeds")
    actual = model(pixel_values=pixel_values, **inputs)
    assert torch.equal(actual.loss, expected.loss)


def test_left_padding_is_right_padding():
    model, inputs = make_stage1(), make_inputs()
    expected = model(**inputs)
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        for name in ("input_ids", "attention_mask"):
            inputs[name][row] = inputs[name][row].roll(inputs[name].shape[1] - length)
    assert torch.equal(model(**inputs).loss, expected.loss)


def test_attention_implementations_agree():
    model, inputs = make_stage1(), make_inputs()
    assert model.config.qformer_config._attn_implementation == "sdpa"
    expected = model(**inputs).loss
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**inputs).loss, expected, rtol=1e-6, atol=1e-6)


def test_pairs_of_one_image_are_no_negatives():
    model, inputs = make_stage1(), make_inputs()
    image_ids = torch.tensor([1, 1, 1, 1, 2])
    outputs = model(image_ids=image_ids, **inputs)
    assert outputs.negative_image_index.tolist()[:4] == [4] * 4
    assert outputs.negative_text_index.tolist()[:4] == [4] * 4


def test_one_pair_has_nothing_to_contrast_with():
    with pytest.raises(ValueError, match="at least two"):
        make_stage1()(**make_inputs(1))


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize(
    ("row", "length", "message"),
    [(3, 0, "Row 3 of input_ids has 0 tokens"), (1, 1, "Row 1 of input_ids has 1 tokens, but at least 2")],
)
def test_a_text_with_nothing_to_learn_is_refused(row, length, message, chunk_size):
    model, inputs = make_stage1().train(), make_inputs()
    if chunk_size:
        model.gradient_caching_enable(chunk_size)
    inputs["attention_mask"][row, length:] = 0
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_without_losses_one_token_is_a_text():
    model, inputs = make_stage1(), make_inputs()
    inputs["attention_mask"][1, 1:] = 0
    assert model(return_loss=False, **inputs).logits_per_image.isfinite().all()
    inputs["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="Row 1 of input_ids has 0 tokens"):
        model(return_loss=False, **inputs)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_placeholders_are_left_out_or_refused(chunk_size):
    model, inputs = make_stage1().train(), make_inputs()
    if chunk_size:
        model.gradient_caching_enable(chunk_size)
    expected = model(**inputs)
    placeholders = torch.full((5, NUM_QUERIES), 61)
    inputs["input_ids"] = torch.cat([placeholders, inputs["input_ids"]], 1)
    inputs["attention_mask"] = torch.cat([torch.ones_like(placeholders), inputs["attention_mask"]], 1)
    for return_loss in (False, True):
        with pytest.raises(ValueError, match="4 tokens of id 61 in front, .*model.config.image_token_index"):
            model(return_loss=return_loss, **inputs)
    model.config.image_token_index = 61
    actual = model(**inputs)
    assert_same(actual, {name: value for name, value in expected.items() if value is not None}, 1e-6)


def test_pairs_without_a_negative_count_as_they_are():
    model, inputs = make_stage1(), make_inputs(3)
    outputs = model(image_ids=torch.zeros(3, dtype=torch.long), **inputs)
    expected = torch.nn.functional.cross_entropy(outputs.itm_logits[:3], torch.ones(3, dtype=torch.long))
    torch.testing.assert_close(outputs.loss_itm, expected)
    assert outputs.loss.isfinite()


def test_one_text_for_each_image():
    inputs = make_inputs()
    with pytest.raises(ValueError, match="5 images and 4 texts"):
        make_stage1()(image_embeds=inputs["image_embeds"], input_ids=inputs["input_ids"][:4])


def test_features_and_similarities_without_losses():
    model, inputs = make_stage1(), make_inputs()
    expected = model(**inputs)
    outputs = model(return_loss=False, **inputs)
    assert outputs.loss is None
    names = ("logits_per_image", "image_features", "text_features")
    assert_same(outputs, {name: expected[name] for name in names}, 1e-6)
    one = model(return_loss=False, **{name: value[:1] for name, value in inputs.items()})
    torch.testing.assert_close(one.logits_per_image, expected.logits_per_image[:1, :1], rtol=1e-5, atol=1e-5)


def test_saved_and_loaded(tmp_path):
    model, inputs = make_stage1(), make_inputs()
    model.save_pretrained(tmp_path)
    loaded, info = Blip2ForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_model(loaded, model, loaded(**inputs).loss, model(**inputs).loss)
    assert loaded.lm_head.decoder.weight is loaded.embeddings.word_embeddings.weight
    assert loaded.lm_head.decoder.bias is loaded.lm_head.bias
    assert loaded.temperature.weight.item() == model.temperature.weight.item() == 0.5


def test_more_words(tmp_path):
    model, inputs = make_stage1(), make_inputs()
    expected = model(return_loss=False, **inputs).logits_per_image
    model.resize_token_embeddings(70)
    assert model.lm_head.bias.shape == (70,) and model.config.qformer_config.vocab_size == 70
    assert model.lm_head.decoder.weight is model.embeddings.word_embeddings.weight
    torch.testing.assert_close(model(return_loss=False, **inputs).logits_per_image, expected)
    model.save_pretrained(tmp_path)
    loaded = Blip2ForPreTraining.from_pretrained(tmp_path)
    assert_same_model(loaded, model, loaded(**inputs).loss, model(**inputs).loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_keeps_what_is_trained_in_float32(tmp_path, dtype):
    make_stage1().save_pretrained(tmp_path)
    model, inputs = Blip2ForPreTraining.from_pretrained(tmp_path, dtype=dtype), make_inputs()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else dtype), name
    expected = make_stage1()
    expected.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    inputs["image_embeds"] = inputs["image_embeds"].to(dtype)
    loss = model(**inputs).loss
    inputs["image_embeds"] = inputs["image_embeds"].float()
    torch.testing.assert_close(loss, expected(**inputs).loss, rtol=1e-2, atol=1e-2)


def test_autocast():
    model, inputs = make_stage1().train(), make_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**inputs)
    outputs.loss.backward()
    assert outputs.logits_per_image.dtype == outputs.itm_logits.dtype == torch.float32
    similarity = (outputs.image_features @ outputs.text_features.T).amax(1)
    torch.testing.assert_close(outputs.logits_per_image, similarity / 0.5, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outputs.loss, model(**inputs).loss, rtol=3e-2, atol=3e-2)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    model, inputs = make_stage1().train(), make_inputs()
    expected = gradients(model, model(**inputs).loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    actual = gradients(model, model(**inputs).loss)
    assert actual.keys() == expected.keys()
    assert_same(actual, expected, 1e-6)


def test_arguments_that_would_be_ignored_are_refused_by_name():
    inputs = make_inputs(2)
    with pytest.raises(TypeError, match="was given image_id, and takes pixel_values or image_embeds"):
        make_stage1()(**inputs, image_id=torch.arange(2))
