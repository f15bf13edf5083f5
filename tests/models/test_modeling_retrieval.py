"""Blip2ForImageTextRetrieval against one pair at a time."""

import pytest
import torch
import transformers
from stage1 import make_inputs, make_retrieval, make_stage1, one_by_one
from tiny import (
    NUM_QUERIES,
    QFORMER,
    VISION,
    VOCAB_SIZE,
    make_config,
    make_pixel_values,
    randomize,
)

from blip2_hf import Blip2ForImageTextRetrieval
from blip2_hf.attention_maps import text_heat_map


IMAGE = 60
TEXT_NAMES = ("input_ids", "attention_mask")


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def model():
    return make_retrieval()


@torch.no_grad()
def test_two_images_and_three_texts(model):
    inputs = make_inputs(3)
    inputs["image_embeds"] = inputs["image_embeds"][:2]
    contrast = model(**inputs)
    assert contrast.logits_per_image.shape == (2, 3)
    close(contrast.logits_per_image, one_by_one(model, *inputs.values(), matching=False))
    close(contrast.logits_per_text, contrast.logits_per_image.T)
    matching = model(**inputs, use_image_text_matching_head=True)
    assert matching.logits_per_image.shape == (2, 3, 2)
    assert matching.logits_per_text.shape == (3, 2, 2)
    close(matching.logits_per_image, one_by_one(model, *inputs.values(), matching=True))


@torch.no_grad()
def test_pairs_are_the_diagonal_of_all_pairs(model):
    inputs = make_inputs(3)
    pairs = model(**inputs, use_image_text_matching_head=True).logits_per_image
    all_pairs = model(**inputs, use_image_text_matching_head=True, all_pairs=True).logits_per_image
    assert all_pairs.shape == (3, 3, 2)
    close(pairs, all_pairs[torch.arange(3), torch.arange(3)])
    assert (all_pairs[0, 0] - all_pairs[0, 1]).abs().max() > 0.01


@torch.no_grad()
def test_the_temperature(model):
    inputs = make_inputs(3)
    cosines = model(**inputs).logits_per_image
    assert cosines.abs().max() <= 1
    close(model(**inputs, use_temperature=True).logits_per_image, cosines / 0.5)


@torch.no_grad()
@pytest.mark.parametrize("matching", [False, True])
def test_padding_and_placeholders_have_no_say(matching):
    model = make_retrieval(image_token_index=IMAGE)
    inputs = make_inputs(4)
    expected = model(**inputs, use_image_text_matching_head=matching).logits_per_image
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    placeholders = torch.full((4, NUM_QUERIES), IMAGE)
    behind = {"input_ids": torch.cat([placeholders, ids], 1), "attention_mask": torch.cat([placeholders > 0, mask], 1)}
    ids, mask = (torch.stack([row.roll(-int(n)) for row, n in zip(x, mask.sum(1), strict=True)]) for x in (ids, mask))
    left = {"input_ids": ids, "attention_mask": mask}
    for variant in (behind, left):
        outputs = model(image_embeds=inputs["image_embeds"], **variant, use_image_text_matching_head=matching)
        close(outputs.logits_per_image, expected)


def to_the_left(inputs):
    """The same texts, padding in front."""
    lengths = inputs["attention_mask"].sum(1).tolist()
    rolled = {name: [row.roll(-n) for row, n in zip(inputs[name], lengths, strict=True)] for name in TEXT_NAMES}
    return inputs | {name: torch.stack(rows) for name, rows in rolled.items()}


@torch.no_grad()
def test_features_of_text_with_padding_on_either_side(model):
    inputs = make_inputs(4)
    texts, left = ({name: x[name] for name in TEXT_NAMES} for x in (inputs, to_the_left(inputs)))
    expected = model.get_text_features(**texts).pooler_output
    close(model.get_text_features(**left).pooler_output, expected)
    alone = [ids[mask.bool()][None] for ids, mask in zip(*texts.values(), strict=True)]
    close(torch.cat([model.get_text_features(ids).pooler_output for ids in alone]), expected)


WAYS_IN = {
    "contrast": lambda model, images, **texts: model(image_embeds=images, **texts),
    "matching": lambda model, images, **texts: model(image_embeds=images, use_image_text_matching_head=True, **texts),
    "features": lambda model, images, **texts: model.get_text_features(**texts),
    "logits": lambda model, images, **texts: model.get_matching_logits(image_embeds=images, **texts),
    "heat map": lambda model, images, **texts: text_heat_map(model, image_embeds=images, grid=(2, 2), **texts),
}


@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize("index", [None, IMAGE])
def test_placeholders_that_are_not_known_are_refused(way, index):
    model, inputs = make_retrieval(image_token_index=index), make_inputs(3)
    unknown = torch.full((3, NUM_QUERIES), IMAGE + 1)
    ids = torch.cat([unknown, inputs["input_ids"]], 1)
    mask = torch.cat([torch.ones_like(unknown), inputs["attention_mask"]], 1)
    with pytest.raises(ValueError, match=f"Row 0 .* {NUM_QUERIES} tokens of id {IMAGE + 1} in front.*image_token_id"):
        WAYS_IN[way](model, inputs["image_embeds"], input_ids=ids, attention_mask=mask)
    left = to_the_left({"input_ids": ids, "attention_mask": mask})
    with pytest.raises(ValueError, match="look like those of an image"):
        WAYS_IN[way](model, inputs["image_embeds"], **left)
    # Beyond the vocabulary, as after a tokenizer that fills it; one is enough
    inputs["input_ids"][1, 1] = VOCAB_SIZE
    with pytest.raises(ValueError, match=f"Row 1 .* token id {VOCAB_SIZE}, beyond its vocabulary of {VOCAB_SIZE}"):
        WAYS_IN[way](model, **{"images" if name == "image_embeds" else name: x for name, x in inputs.items()})


@pytest.mark.parametrize("way", WAYS_IN)
def test_a_text_without_tokens_is_refused(way):
    inputs = make_inputs(3)
    images = inputs.pop("image_embeds")
    inputs["attention_mask"][2] = 0
    with pytest.raises(ValueError, match="Row 2 of input_ids has 0 tokens"):
        WAYS_IN[way](make_retrieval(), images, **inputs)
    # Placeholders alone are no text
    inputs = make_inputs(3)
    inputs.pop("image_embeds")
    inputs["input_ids"][1] = IMAGE
    with pytest.raises(ValueError, match="Row 1 of input_ids has 0 tokens"):
        WAYS_IN[way](make_retrieval(image_token_index=IMAGE), images, **inputs)
    inputs["attention_mask"] = inputs["attention_mask"][:, 1:]
    with pytest.raises(ValueError, match=r"attention_mask of shape \(3, 8\) for input_ids of shape \(3, 9\)"):
        WAYS_IN[way](make_retrieval(), images, **inputs)


@torch.no_grad()
def test_keys_and_values_computed_once_serve_several_texts(model):
    inputs = make_inputs(4)
    key_values = model.get_image_key_values(inputs["image_embeds"][:2])
    texts = inputs["input_ids"], inputs["attention_mask"]
    logits = model.get_matching_logits(*texts, image_key_values=key_values)
    pairs = one_by_one(model, inputs["image_embeds"][:2], *texts, matching=True)
    close(logits, torch.cat([pairs[0, :2], pairs[1, 2:]]))


@torch.no_grad()
def test_pictures_and_their_features_are_the_same(model):
    pixel_values, inputs = make_pixel_values(2), make_inputs(3)
    texts = inputs["input_ids"], inputs["attention_mask"]
    outputs = model(pixel_values, *texts)
    assert outputs.vision_model_output.last_hidden_state.shape == (2, 5, 32)
    close(outputs.logits_per_image, model(None, *texts, image_embeds=model.get_image_embeds(pixel_values))[0])


def test_what_does_not_fit(model):
    inputs = make_inputs(3)
    with pytest.raises(ValueError, match="either pixel_values or image_embeds"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="Give input_ids"):
        model(image_embeds=inputs["image_embeds"])
    inputs["image_embeds"] = inputs["image_embeds"][:2]
    with pytest.raises(ValueError, match="2 images and 3 texts"):
        model(**inputs, use_image_text_matching_head=True, all_pairs=False)
    with pytest.raises(ValueError, match="3 texts for 2 images"):
        model.get_matching_logits(**inputs)
    with pytest.raises(ValueError, match="no temperature"):
        model(**inputs, use_image_text_matching_head=True, use_temperature=True)
    with pytest.raises(ValueError, match="all_pairs is for matching"):
        model(**inputs, all_pairs=True)
    with pytest.raises(ValueError, match="no images"):
        model(**inputs | {"image_embeds": inputs["image_embeds"][:0]})
    with pytest.raises(ValueError, match="41 tokens.*40 positions"):
        model(image_embeds=inputs["image_embeds"], input_ids=torch.full((1, 41), 5))
    with pytest.raises(ValueError, match="captioner has not learned.*use_qformer_text_input=True"):
        Blip2ForImageTextRetrieval(make_config(None))


@torch.no_grad()
def test_return_dict_false():
    model, inputs = make_retrieval(), make_inputs(3)
    expected = model(**inputs).logits_per_image
    model.config.return_dict = False
    close(model(**inputs)[0], expected)


# Checkpoints


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_half_precision_are_told_apart(tmp_path, model, dtype):
    model.save_pretrained(tmp_path)
    half = Blip2ForImageTextRetrieval.from_pretrained(tmp_path, dtype=dtype)
    assert half.itm_head.weight.dtype == half.vision_projection.weight.dtype == torch.float32
    assert half.vision_model.embeddings.patch_embedding.weight.dtype == dtype
    torch.manual_seed(0)
    texts = torch.randint(4, 60, (64, 6))
    image = make_inputs(2)["image_embeds"][:1]
    logits = half(image_embeds=image, input_ids=texts, use_image_text_matching_head=True).logits_per_image
    assert logits.dtype == torch.float32
    assert len(logits[0, :, 1].unique()) == 64
    close(logits, model(image_embeds=image, input_ids=texts, use_image_text_matching_head=True).logits_per_image, 0.2)


@torch.no_grad()
def test_what_stage_1_learned_is_loaded(tmp_path):
    stage1, inputs = make_stage1().eval(), make_inputs(3)
    stage1.save_pretrained(tmp_path)
    model, info = Blip2ForImageTextRetrieval.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    expected = stage1(**inputs, return_loss=False).logits_per_image
    close(model(**inputs, use_temperature=True).logits_per_image, expected)
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForZeroShotImageClassification.from_pretrained(tmp_path / "again")
    assert type(again) is Blip2ForImageTextRetrieval
    assert again.temperature.weight.item() == 0.5
    close(again(**inputs)[0], model(**inputs)[0])


@torch.no_grad()
@pytest.mark.parametrize("image_token_index", [None, IMAGE])
def test_transformers_own_checkpoint_and_calls(tmp_path, image_token_index):
    config = transformers.Blip2Config(
        vision_config={**VISION, "initializer_range": 0.02},
        qformer_config={k: v for k, v in QFORMER.items() if k != "bos_token_id"} | {"use_qformer_text_input": True},
        num_query_tokens=NUM_QUERIES,
        image_text_hidden_size=16,
        image_token_index=image_token_index,
    )
    theirs = randomize(transformers.Blip2ForImageTextRetrieval(config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, info = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert ours.temperature.weight.item() == pytest.approx(0.07)
    inputs, pixel_values = make_inputs(3), make_pixel_values(3)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if image_token_index is not None:
        placeholders = torch.full((3, NUM_QUERIES), IMAGE)
        ids, mask = torch.cat([placeholders, ids], 1), torch.cat([torch.ones_like(placeholders), mask], 1)
    for matching in (False, True):
        call = {"input_ids": ids, "attention_mask": mask, "use_image_text_matching_head": matching}
        expected, actual = theirs(pixel_values, **call), ours(pixel_values, **call)
        for name in ("logits_per_image", "logits_per_text"):
            close(actual[name], expected[name])
        if not matching:
            close(actual.image_embeds, expected.image_embeds)
            close(actual.text_embeds, expected.text_embeds)
    ours.save_pretrained(tmp_path / "back", transformers_compatible=True)
    back, info = transformers.Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values())
    for name, weight in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name


@torch.no_grad()
def test_stage_1_goes_to_transformers(tmp_path):
    stage1, inputs, pixel_values = make_stage1().eval(), make_inputs(3), make_pixel_values(3)
    stage1.save_pretrained(tmp_path, transformers_compatible=True)
    theirs, info = transformers.Blip2ForImageTextRetrieval.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    texts = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    # transformers has the eps of the blocks after the tower
    stage1.vision_model.post_layernorm.eps = stage1.config.vision_config.layer_norm_eps
    expected = stage1(pixel_values, **texts, return_loss=False).logits_per_image * 0.5
    close(theirs.eval()(pixel_values, **texts).logits_per_image, expected)


def test_gradients_reach_what_is_trained(model):
    model = make_retrieval().train()
    outputs = model(**make_inputs(3), use_image_text_matching_head=True, all_pairs=True)
    outputs.logits_per_image.square().sum().backward()
    assert model.query_tokens.weight.grad.abs().max() > 0
    assert model.vision_model.post_layernorm.weight.grad.abs().max() > 0


def test_arguments_that_would_be_ignored_are_refused_by_name(model):
    with pytest.raises(TypeError, match="was given txt, and takes pixel_values or image_embeds, input_ids"):
        model(torch.zeros(1, 3, 28, 28), torch.tensor([[2, 3]]), txt="a cat")


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (make_retrieval, {}),
        (make_retrieval, {"use_image_text_matching_head": True}),
        (make_stage1, {"return_loss": False}),
    ],
)
@torch.no_grad()
def test_all_that_the_tokenizer_of_bert_returns_is_taken(make, options):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog"]
    tokenizer = transformers.BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    texts = tokenizer(["a cat", "dog"], padding=True, return_tensors="pt")
    assert texts["token_type_ids"].shape == (2, 4)
    model, pixel_values = make().eval(), make_pixel_values(2)
    expected = model(pixel_values, **{name: texts[name] for name in TEXT_NAMES}, **options).logits_per_image
    assert torch.equal(model(pixel_values, **texts, **options).logits_per_image, expected)
    assert model.get_text_features(**texts).pooler_output.shape == (2, 16)
