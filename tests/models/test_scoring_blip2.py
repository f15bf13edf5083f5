"""Scores of given texts: those of one forward for each text, with image and prompt read once."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from scoring import pad_candidates, scores_by_forward
from stage2 import remove_dropout
from tiny import (
    LANGUAGE_MODELS,
    NUM_QUERIES,
    QFORMER,
    VOCAB_SIZE,
    make_image,
    make_model,
    make_pixel_values,
    make_processor,
)


IMAGE = VOCAB_SIZE - 1
CANDIDATES = [[10, 11, 12, 2], [20, 2], [30, 31, 2], [40], [50, 51, 2]]
TEXTS = [[0, 5, 6, 7], [0, 9]]
PROMPTS = [[IMAGE] * NUM_QUERIES + text for text in TEXTS]


def padded(rows: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    pads = [[1] * (length - len(row)) for row in rows]
    ids = torch.tensor([pad + row if side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)])
    return {"input_ids": ids, "attention_mask": ids.ne(1).long()}


@pytest.fixture(params=LANGUAGE_MODELS)
def model(request):
    torch.manual_seed(0)
    return make_model(request.param)


@pytest.mark.parametrize("chunk_size", [1, 2, 32])
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_those_of_one_forward_for_each_text(model, side, chunk_size):
    pixel_values, labels = make_pixel_values(2), pad_candidates(CANDIDATES)
    expected = scores_by_forward(model, pixel_values, PROMPTS, CANDIDATES)
    actual = model.score_texts(labels, pixel_values, **padded(PROMPTS, side), chunk_size=chunk_size)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    of_each = model.score_texts(labels.expand(2, *labels.shape), pixel_values, **padded(PROMPTS, side))
    torch.testing.assert_close(of_each, expected, atol=1e-5, rtol=1e-5)
    lengths = torch.tensor([len(candidate) for candidate in CANDIDATES])
    mean = model.score_texts(labels, pixel_values, **padded(PROMPTS, side), normalization="mean")
    torch.testing.assert_close(mean, expected / lengths, atol=1e-5, rtol=1e-5)
    order = model.rank_texts(labels, pixel_values=pixel_values, **padded(PROMPTS, side))
    assert order.tolist() == expected.argsort(dim=1, descending=True).tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_relative_scores_compare_with_the_prompt_alone(model, side):
    pixel_values = make_pixel_values(2)
    expected = scores_by_forward(model, pixel_values, PROMPTS, CANDIDATES)
    expected -= scores_by_forward(model, None, TEXTS, CANDIDATES)
    labels = pad_candidates(CANDIDATES)
    actual = model.score_texts(labels, pixel_values, **padded(PROMPTS, side), normalization="relative")
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_images_in_front_of_a_text_without_placeholders(name):
    torch.manual_seed(0)
    model, pixel_values, labels = make_model(name), make_pixel_values(2), pad_candidates(CANDIDATES)
    expected = model.score_texts(labels, pixel_values, **padded(PROMPTS), normalization="relative")
    model.config.image_token_index = None
    actual = model.score_texts(labels, pixel_values, **padded(TEXTS), normalization="relative")
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    without_image = model.score_texts(labels, **padded(TEXTS))
    torch.testing.assert_close(without_image, scores_by_forward(model, None, TEXTS, CANDIDATES), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_image_and_prompt_are_read_once(name):
    torch.manual_seed(0)
    model, images, positions = make_model(name), [], []
    model.vision_model.register_forward_hook(lambda *args: images.append("tower"))
    model.qformer.register_forward_hook(lambda *args: images.append("Q-Former"))
    part = model.language_model.get_encoder() if name == "t5" else model.language_model

    def count(module, args, kwargs):
        positions.append(tuple(kwargs["inputs_embeds"].shape[:2]))

    part.register_forward_pre_hook(count, with_kwargs=True)
    model.score_texts(pad_candidates(CANDIDATES), make_pixel_values(2), **padded(PROMPTS), chunk_size=2)
    assert images == ["tower", "Q-Former"]
    prompt = (2, len(PROMPTS[0]))
    # Two candidates of two prompts at a time, of 4 tokens, 3 tokens, and 3 tokens; the last token is not read
    assert positions == ([prompt] if name == "t5" else [prompt, (4, 3), (4, 2), (2, 2)])


def test_features_of_an_image_serve_many_prompts():
    torch.manual_seed(0)
    model, pixel_values, labels = make_model(), make_pixel_values(2), pad_candidates(CANDIDATES)
    features = model.get_image_features(pixel_values).pooler_output
    expected = model.score_texts(labels, pixel_values, **padded(PROMPTS))
    torch.testing.assert_close(model.score_texts(labels, image_features=features, **padded(PROMPTS)), expected)
    embeds = model.get_image_embeds(pixel_values)
    torch.testing.assert_close(model.score_texts(labels, image_embeds=embeds, **padded(PROMPTS)), expected)


def test_adapters_in_the_language_model_count():
    torch.manual_seed(0)
    model, pixel_values, labels = make_model("llama"), make_pixel_values(2), pad_candidates(CANDIDATES)
    expected = model.score_texts(labels, pixel_values, **padded(PROMPTS))
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model.language_model = get_peft_model(model.language_model, config).eval()
    adapted = model.score_texts(labels, pixel_values, **padded(PROMPTS))
    assert not torch.allclose(adapted, expected, atol=1e-2)
    forward = scores_by_forward(model, pixel_values, PROMPTS, CANDIDATES)
    torch.testing.assert_close(adapted, forward, atol=1e-5, rtol=1e-5)


def test_a_cache_that_was_not_filled_is_not_used():
    """GPT-2 of transformers gives its layers no cache in training with gradient checkpointing, and returns one."""
    torch.manual_seed(0)
    model, pixel_values, labels = make_model("gpt2"), make_pixel_values(2), pad_candidates(CANDIDATES)
    expected = model.score_texts(labels, pixel_values, **padded(PROMPTS))
    model.language_model.requires_grad_(True)
    model.gradient_checkpointing_enable()
    remove_dropout(model).train()
    torch.testing.assert_close(model.score_texts(labels, pixel_values, **padded(PROMPTS)), expected)


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_adapters_around_the_whole_model(name):
    torch.manual_seed(0)
    model, pixel_values, labels = make_model(name), make_pixel_values(2), pad_candidates(CANDIDATES)
    targets = ["q"] if name == "t5" else ["q_proj"]
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    forward = scores_by_forward(adapted, pixel_values, PROMPTS, CANDIDATES)
    actual = adapted.score_texts(labels, pixel_values, **padded(PROMPTS))
    torch.testing.assert_close(actual, forward, atol=1e-5, rtol=1e-5)


def test_virtual_tokens_are_refused_as_in_generate():
    model = make_model("llama")
    config = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model.language_model = get_peft_model(model.language_model, config)
    with pytest.raises(ValueError, match="virtual tokens do not reach the language model in generate and score_texts"):
        model.score_texts(pad_candidates(CANDIDATES), make_pixel_values(2), **padded(PROMPTS))


def test_candidates_in_half_precision_are_those_of_forward():
    torch.manual_seed(0)
    model, pixel_values, labels = make_model("llama").bfloat16(), make_pixel_values(2), pad_candidates(CANDIDATES)
    pixel_values = pixel_values.bfloat16()
    actual = model.score_texts(labels, pixel_values, **padded(PROMPTS))
    assert actual.dtype == torch.float32
    expected = scores_by_forward(model, pixel_values, PROMPTS, CANDIDATES)
    torch.testing.assert_close(actual, expected, atol=0.1, rtol=0.02)


def test_several_images_in_a_prompt():
    torch.manual_seed(0)
    model, processor, texts = make_model(), make_processor(), ["a dog", "the sky"]
    images = [[make_image(0), make_image(1)], [make_image(2), make_image(3)]]
    inputs = processor(images=images, text="two photos of", candidates=texts, return_tensors="pt")
    for row, own in enumerate(images):
        for column, text in enumerate(texts):
            batch = processor(images=[own], text="two photos of", text_target=text, return_tensors="pt")
            with torch.no_grad():
                loss = model(**batch).loss * batch["labels"].ne(-100).sum()
            torch.testing.assert_close(model.score_texts(**inputs)[row, column], -loss, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_road_from_the_processor(name):
    """Candidates of each prompt, of differing number; each score is the loss of the same text as text_target."""
    torch.manual_seed(0)
    model, processor = make_model(name), make_processor(is_encoder_decoder=name == "t5")
    images, prompts = [make_image(0), make_image(1)], ["Question: what is it? Answer:", "a photo of"]
    candidates = [["a dog", "two people near the street"], ["the sky"]]
    inputs = processor(images=images, text=prompts, candidates=candidates, return_tensors="pt")
    scores = model.score_texts(**inputs)
    assert scores[1, 1] == -torch.inf
    assert scores.softmax(dim=-1)[1].tolist() == [1.0, 0.0]
    assert model.rank_texts(**inputs)[1].tolist() == [0, 1]
    for row, own in enumerate(candidates):
        for column, text in enumerate(own):
            batch = processor(images=images[row], text=prompts[row], text_target=text, return_tensors="pt")
            with torch.no_grad():
                loss = model(**batch).loss * batch["labels"].ne(-100).sum()
            torch.testing.assert_close(scores[row, column], -loss, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_order_is_that_of_lavis(name):
    """
    `_predict_class` of LAVIS: candidates in segments, each with the summed loss of its tokens after a copy of the
    prompt, in the order of the losses. The end token counts with T5, and not with Vicuna.
    """
    torch.manual_seed(0)
    is_t5 = name == "t5"
    model, processor = make_model(name), make_processor(is_encoder_decoder=is_t5)
    texts = ["a dog", "two people", "red", "the sky with clouds", "grass near the street", "bus"]
    inputs = processor(
        images=[make_image(0), make_image(1)],
        text="Question: what is it? Answer:",
        candidates=texts,
        end_candidates=is_t5,
        return_tensors="pt",
    )
    losses = []
    for start in (0, 2):
        segment = texts[start : 2 if start == 0 else None]
        for row in range(2):
            candidates = [processor.tokenizer(f" {text}" if not is_t5 else text)["input_ids"] for text in segment]
            candidates = [ids if is_t5 else ids[1:] for ids in candidates]
            image, prompt = inputs["pixel_values"][row : row + 1], inputs["input_ids"][row].tolist()
            losses.append(-scores_by_forward(model, image, [prompt], candidates))
    by_segment = [torch.cat(losses[:2]), torch.cat(losses[2:])]
    expected = torch.argsort(torch.cat(by_segment, dim=-1), dim=-1)
    assert model.rank_texts(**inputs).tolist() == expected.tolist()


def test_a_qformer_that_reads_the_question():
    torch.manual_seed(0)
    model = make_model(qformer_config=QFORMER | {"use_qformer_text_input": True})
    pixel_values, labels = make_pixel_values(2), pad_candidates(CANDIDATES)
    scores = [
        model.score_texts(labels, pixel_values, **padded(PROMPTS), qformer_input_ids=torch.tensor([ids] * 2))
        for ids in ([5, 6, 7], [8, 9, 10])
    ]
    assert not torch.allclose(*scores, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalization": "max"}, "one of sum, mean, relative was expected"),
        ({"chunk_size": 0}, "at least 1 was expected"),
        ({"pixel_values": None, "normalization": "relative"}, "There is no image"),
        ({"pixel_values": None}, "placeholders .* but no image was given"),
        ({"candidate_labels": torch.tensor([1, 2])}, "shape .2,. and torch.int64 for 2 prompts"),
        ({"candidate_labels": torch.ones(3, 2, 2, dtype=torch.long)}, "shape .3, 2, 2. and torch.int64 for 2 prompts"),
        ({"candidate_labels": torch.ones(3, 2)}, "torch.float32 for 2 prompts: torch.int64 of shape"),
        (
            {"candidate_labels": torch.ones(3, 200, dtype=torch.long)},
            "200 tokens, and image and prompt have 8: .* 121",
        ),
        ({"candidate_labels": torch.tensor([[-100, 5], [6, 7]])}, "padding was expected behind the tokens"),
        ({"input_ids": torch.full((2, NUM_QUERIES), IMAGE), "normalization": "relative"}, "row 0 has no token but"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    model = make_model()
    inputs = {"candidate_labels": pad_candidates(CANDIDATES), "pixel_values": make_pixel_values(2), **padded(PROMPTS)}
    if "input_ids" in change:
        del inputs["attention_mask"]
    with pytest.raises(ValueError, match=message):
        model.score_texts(**inputs | change)
