"""The halves of retrieval: equal to the whole, and to transformers' classes of the same names."""

import pytest
import torch
import transformers
from stage1 import make_inputs, make_retrieval, make_stage1
from tiny import NUM_QUERIES, QFORMER, VISION, make_pixel_values, randomize

from blip2_hf import (
    Blip2ForImageTextRetrieval,
    Blip2TextModelWithProjection,
    Blip2VisionModelWithProjection,
)


def test_the_halves_are_the_whole(tmp_path):
    torch.manual_seed(0)
    whole = make_retrieval().eval()
    whole.save_pretrained(tmp_path)
    vision = Blip2VisionModelWithProjection.from_pretrained(tmp_path).eval()
    text = Blip2TextModelWithProjection.from_pretrained(tmp_path).eval()
    inputs, pixel_values = make_inputs(2), make_pixel_values()
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = whole(pixel_values, **texts)
        images = vision(pixel_values)
        features = text(**texts)
        embeds = vision(image_embeds=images.last_hidden_state)
    torch.testing.assert_close(images.image_embeds, expected.image_embeds)
    torch.testing.assert_close(embeds.image_embeds, expected.image_embeds)
    torch.testing.assert_close(features.text_embeds[:, 0], expected.text_embeds)
    assert not any(name.startswith("vision_model") for name, _ in text.named_parameters())
    assert not any(p.requires_grad for n, p in vision.named_parameters() if n.startswith("vision_model.encoder"))


def test_they_load_stage_1_and_come_back(tmp_path):
    torch.manual_seed(0)
    make_stage1().save_pretrained(tmp_path / "stage1")
    for model_class in (Blip2VisionModelWithProjection, Blip2TextModelWithProjection):
        model, info = model_class.from_pretrained(tmp_path / "stage1", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        model.save_pretrained(tmp_path / "again", with_code=True)
        again = model_class.from_pretrained(tmp_path / "again")
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


@pytest.fixture
def theirs(tmp_path):
    """A checkpoint of transformers' own retrieval model."""
    torch.manual_seed(0)
    config = transformers.Blip2Config(
        vision_config={**VISION, "initializer_range": 0.02},
        qformer_config={k: v for k, v in QFORMER.items() if k != "bos_token_id"} | {"use_qformer_text_input": True},
        num_query_tokens=NUM_QUERIES,
        image_text_hidden_size=16,
    )
    randomize(transformers.Blip2ForImageTextRetrieval(config)).save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def test_transformers_classes_compute_the_same(theirs):
    pixel_values, texts = make_pixel_values(), torch.tensor([[2, 5, 6, 7], [2, 8, 9, 3]])
    expected = transformers.Blip2VisionModelWithProjection.from_pretrained(theirs).eval()(pixel_values)
    actual = Blip2VisionModelWithProjection.from_pretrained(theirs).eval()(pixel_values)
    torch.testing.assert_close(actual.image_embeds, expected.image_embeds, atol=1e-5, rtol=0)
    expected = transformers.Blip2TextModelWithProjection.from_pretrained(theirs).eval()(texts)
    actual = Blip2TextModelWithProjection.from_pretrained(theirs).eval()(texts)
    torch.testing.assert_close(actual.text_embeds, expected.text_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=0)


@torch.no_grad()
def test_they_go_to_transformers(theirs, tmp_path):
    pixel_values, texts = make_pixel_values(), torch.tensor([[2, 5, 6, 7]])
    vision = Blip2VisionModelWithProjection.from_pretrained(theirs).eval()
    text = Blip2TextModelWithProjection.from_pretrained(theirs).eval()
    for model in (vision, text):
        model.save_pretrained(tmp_path / "back", transformers_compatible=True)
        back = getattr(transformers, type(model).__name__.replace("Hf", ""))
        back, info = back.from_pretrained(tmp_path / "back", output_loading_info=True)
        assert not info["unexpected_keys"] and set(info["missing_keys"]) <= {"query_tokens"}, info
        given = {"pixel_values": pixel_values} if model is vision else {"input_ids": texts}
        torch.testing.assert_close(back.eval()(**given)[0], model(**given)[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_has_no_say(tmp_path):
    torch.manual_seed(0)
    make_retrieval().save_pretrained(tmp_path)
    model = Blip2TextModelWithProjection.from_pretrained(tmp_path).eval()
    alone = model(torch.tensor([[2, 5, 6]])).text_embeds
    padded = model(torch.tensor([[0, 2, 5, 6]]), torch.tensor([[0, 1, 1, 1]])).text_embeds
    torch.testing.assert_close(padded[:, :3], alone)


def test_what_does_not_fit(tmp_path):
    whole = make_retrieval()
    whole.save_pretrained(tmp_path)
    text = Blip2TextModelWithProjection.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="There are no texts"):
        text()
    with pytest.raises(TypeError, match="was given txt, and takes input_ids"):
        text(torch.tensor([[2, 5]]), txt="a")
    whole.config.qformer_config.use_qformer_text_input = False
    with pytest.raises(ValueError, match="this one reads none"):
        Blip2TextModelWithProjection(whole.config)
    assert isinstance(whole, Blip2ForImageTextRetrieval)
