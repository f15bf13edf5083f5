import copy
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
import transformers
from tiny import DECODER_ONLY, LANGUAGE_MODELS, NUM_QUERIES, VOCAB_SIZE, make_model, make_pixel_values

from blip2_hf import Blip2ForConditionalGeneration
from blip2_hf.models._compat import CACHE_NAME, CACHE_NAMES


IMAGE = VOCAB_SIZE - 1
PROMPTS = [[0, 5, 6, 7, 8, 9], [0, 30, 31], [0, 70, 71, 72]]


def pad(rows: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    ids, masks = [], []
    for row in rows:
        fill = length - len(row)
        ids.append([1] * fill + row if side == "left" else row + [1] * fill)
        masks.append([0] * fill + [1] * len(row) if side == "left" else [1] * len(row) + [0] * fill)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}


def new_tokens(model, outputs: torch.Tensor, length: int) -> list[list[int]]:
    skip = 0 if model.config.is_encoder_decoder else length
    rows = [[t for t in row if t not in (1, 2)] for row in outputs[:, skip:].tolist()]
    assert any(rows), "the models are so made that they write something"
    return rows


@pytest.mark.parametrize("placeholders", [True, False])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_caption_is_the_same_alone_and_in_a_batch(name, placeholders):
    model = make_model(name, image_token_index=IMAGE if placeholders else None)
    front = [IMAGE] * NUM_QUERIES if placeholders else []
    rows = [front + row for row in PROMPTS]
    pixel_values = make_pixel_values(3)
    kwargs = {"max_new_tokens": 6, "do_sample": False}
    alone = []
    for i, row in enumerate(rows):
        outputs = model.generate(pixel_values=pixel_values[i : i + 1], **pad([row]), **kwargs)
        alone += new_tokens(model, outputs, len(row))
    for side in ("left", "right"):
        for attn in ("eager", "sdpa"):
            model.set_attn_implementation(attn)
            batch = pad(rows, side)
            outputs = model.generate(pixel_values=pixel_values, **batch, **kwargs)
            assert new_tokens(model, outputs, batch["input_ids"].shape[1]) == alone, (side, attn)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_greedy_is_the_argmax_of_forward_step_by_step(name):
    model = make_model(name)
    pixel_values, row = make_pixel_values(1), [IMAGE] * NUM_QUERIES + PROMPTS[0]
    generated = model.generate(pixel_values=pixel_values, input_ids=torch.tensor([row]), max_new_tokens=5)
    tokens = generated[0, :1].tolist() if model.config.is_encoder_decoder else list(row)
    for _ in range(generated.shape[1] - len(tokens)):
        inputs = {"input_ids": torch.tensor([row])}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.tensor([tokens])
        else:
            inputs["input_ids"] = torch.tensor([tokens])
        tokens.append(model(pixel_values=pixel_values, **inputs).logits[0, -1].argmax().item())
    assert generated[0].tolist() == tokens


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_sees_no_padding(name, side):
    model = make_model(name)
    rows = [[IMAGE] * NUM_QUERIES + row for row in PROMPTS]
    batch, pixel_values = pad(rows, side), make_pixel_values(3)
    decoder = {"decoder_input_ids": torch.tensor([[1, 9, 8]])} if model.config.is_encoder_decoder else {}
    logits = model(pixel_values=pixel_values, **batch, **{k: v.expand(3, -1) for k, v in decoder.items()}).logits
    for i, row in enumerate(rows):
        expected = model(pixel_values=pixel_values[i : i + 1], input_ids=torch.tensor([row]), **decoder).logits[0]
        actual = logits[i] if model.config.is_encoder_decoder else logits[i][batch["attention_mask"][i].bool()]
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_prompt_and_new_tokens_are_returned_as_generation_mixin_does():
    model = make_model("llama")
    batch = pad([PROMPTS[0], PROMPTS[1]], "right")
    outputs = model.generate(
        pixel_values=make_pixel_values(), **batch, max_new_tokens=3, num_return_sequences=2, num_beams=2
    )
    assert outputs.shape[0] == 4
    assert torch.equal(outputs[:, :6], batch["input_ids"].repeat_interleave(2, dim=0))


def test_without_text_generation_starts_from_bos():
    model = make_model("opt")
    outputs = model.generate(pixel_values=make_pixel_values(), max_new_tokens=3)
    assert outputs[0, : NUM_QUERIES + 1].tolist() == [IMAGE] * NUM_QUERIES + [0]
    model = make_model("opt", image_token_index=None)
    assert model.generate(pixel_values=make_pixel_values(), max_new_tokens=3)[0, 0] == 0


def test_beams_sampling_and_several_captions():
    model = make_model("opt")
    inputs = {"pixel_values": make_pixel_values(2), "max_new_tokens": 6}
    greedy, beams = model.generate(**inputs), model.generate(**inputs, num_beams=4)
    assert greedy.shape[0] == beams.shape[0] == 2
    several = model.generate(**inputs, num_beams=4, num_return_sequences=3)
    assert several.shape[0] == 6
    assert torch.equal(several[::3, : beams.shape[1]], beams[:, : several.shape[1]])
    torch.manual_seed(1)
    sampled = model.generate(**inputs, do_sample=True, num_return_sequences=8, top_k=50)
    assert len({tuple(row) for row in sampled[:8].tolist()}) > 1


def test_one_pass_through_the_tower_however_many_beams():
    model = make_model("opt")
    calls = []
    model.vision_model.register_forward_hook(lambda *args: calls.append(args[1][0].shape))
    model.generate(pixel_values=make_pixel_values(1), max_new_tokens=4, num_beams=5, num_return_sequences=5)
    assert calls == [torch.Size([1, 3, 28, 28])]


def test_ten_questions_cost_one_pass():
    model = make_model("llama")
    calls = []
    model.vision_model.register_forward_hook(lambda *args: calls.append("tower"))
    model.qformer.register_forward_hook(lambda *args: calls.append("qformer"))
    pixel_values = make_pixel_values(1)
    image_features = model.get_image_features(pixel_values).pooler_output
    assert calls == ["tower", "qformer"]
    questions = [[0, 10 + i, 20 + i] for i in range(10)]
    together = model.generate(image_features=image_features.expand(10, -1, -1), **pad(questions), max_new_tokens=4)
    assert calls == ["tower", "qformer"]
    for i, question in enumerate(questions):
        expected = model.generate(pixel_values=pixel_values, input_ids=torch.tensor([question]), max_new_tokens=4)
        assert together[i, : expected.shape[1]].tolist() == expected[0].tolist()


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_image_embeds_and_image_features_stand_for_pixel_values(name):
    model = make_model(name)
    pixel_values, ids = make_pixel_values(), torch.tensor([[0, 5, 6], [0, 8, 9]])
    image_embeds = model.get_image_embeds(pixel_values)
    image_features = model.get_image_features(image_embeds=image_embeds).pooler_output
    expected = model(pixel_values=pixel_values, input_ids=ids, labels=ids)
    generated = model.generate(pixel_values=pixel_values, input_ids=ids, max_new_tokens=4)
    for inputs in ({"image_embeds": image_embeds}, {"image_features": image_features}):
        assert torch.equal(model(**inputs, input_ids=ids, labels=ids).loss, expected.loss)
        assert torch.equal(model.generate(**inputs, input_ids=ids, max_new_tokens=4), generated)
    with pytest.raises(ValueError, match="only one of"):
        model(pixel_values=pixel_values, image_embeds=image_embeds, input_ids=ids)


def test_images_stand_where_their_placeholders_are():
    model = make_model("llama")
    first, second = make_pixel_values(2)
    mark = [IMAGE] * NUM_QUERIES
    few_shot = torch.tensor([mark + [0, 5, 6] + mark + [7, 8]])
    logits = model(pixel_values=torch.stack([first, second]), input_ids=few_shot).logits
    features = model.get_image_features(torch.stack([first, second])).pooler_output
    embed = model.get_input_embeddings()
    inputs_embeds = torch.cat([features[0], embed(few_shot[0, 4:7]), features[1], embed(few_shot[0, -2:])])[None]
    expected = model.language_model(inputs_embeds=inputs_embeds).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    swapped = model(pixel_values=torch.stack([second, first]), input_ids=few_shot).logits
    assert not torch.allclose(swapped, logits, atol=1e-3)


def test_rows_with_different_numbers_of_images():
    model = make_model("llama")
    pixel_values, mark = make_pixel_values(3), [IMAGE] * NUM_QUERIES
    rows = [mark + [0, 5, 6] + mark + [7], mark + [0, 9]]
    together = model.generate(pixel_values=pixel_values, **pad(rows), max_new_tokens=4)
    first = model.generate(pixel_values=pixel_values[:2], input_ids=torch.tensor(rows[:1]), max_new_tokens=4)
    second = model.generate(pixel_values=pixel_values[2:], input_ids=torch.tensor(rows[1:]), max_new_tokens=4)
    length = len(rows[0])
    assert together[0, length:].tolist()[: first.shape[1] - length] == first[0, length:].tolist()
    assert together[1, length:].tolist()[: second.shape[1] - len(rows[1])] == second[0, len(rows[1]) :].tolist()


def test_several_images_in_front():
    model = make_model("llama", image_token_index=None)
    pixel_values = make_pixel_values(4)
    ids = torch.tensor([[0, 5], [0, 6]])
    expected = model(pixel_values=pixel_values, input_ids=ids).logits
    assert expected.shape[1] == 2 * NUM_QUERIES + 2
    assert torch.equal(model(pixel_values=pixel_values.unflatten(0, (2, 2)), input_ids=ids).logits, expected)


def test_images_and_placeholders_that_do_not_match_are_an_error():
    model = make_model("opt")
    with pytest.raises(ValueError, match="3 `<image>` placeholders .* 8 in all"):
        model(pixel_values=make_pixel_values(2), input_ids=torch.tensor([[IMAGE, IMAGE, 5], [IMAGE, 6, 7]]))
    with pytest.raises(ValueError, match="3 images for 2 texts"):
        model(pixel_values=make_pixel_values(3), input_ids=torch.tensor([[5], [6]]))


def test_placeholders_that_the_model_does_not_know_are_an_error():
    model = make_model("opt", image_token_index=None)
    with pytest.raises(ValueError, match="image_token_index = processor.image_token_id"):
        model(pixel_values=make_pixel_values(1), input_ids=torch.tensor([[IMAGE] * NUM_QUERIES + [0, 5]]))


def test_repetition_penalty_sees_text_alone():
    model = make_model("llama", image_token_index=VOCAB_SIZE + 7)
    inputs = {"pixel_values": make_pixel_values(1), "input_ids": torch.tensor([[0, 5, 6]]), "max_new_tokens": 6}
    marked = dict(inputs, input_ids=torch.tensor([[VOCAB_SIZE + 7] * NUM_QUERIES + [0, 5, 6]]))
    options = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 2}
    penalized = model.generate(**inputs, **options)
    assert penalized[0, 3:].tolist() == model.generate(**marked, **options)[0, 3 + NUM_QUERIES :].tolist()
    tokens = list(inputs["input_ids"][0].tolist())
    for _ in range(6):
        logits = model(pixel_values=inputs["pixel_values"], input_ids=torch.tensor([tokens])).logits[0, -1].clone()
        seen = torch.tensor(sorted(set(tokens)))
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 3.0, logits[seen] * 3.0)
        bigrams = set(zip(tokens, tokens[1:], strict=False))
        for second in {b for a, b in bigrams if a == tokens[-1]}:
            logits[second] = -torch.inf
        tokens.append(logits.argmax().item())
    assert penalized[0].tolist() == tokens[: penalized.shape[1]]


@pytest.mark.parametrize("name", DECODER_ONLY)
def test_assisted_decoding_writes_the_greedy_text(name):
    model = make_model(name)
    assistant = transformers.AutoModelForCausalLM.from_config(LANGUAGE_MODELS[name]()).eval()
    inputs = {"pixel_values": make_pixel_values(1), "input_ids": torch.tensor([[0, 5, 6, 7]]), "max_new_tokens": 8}
    expected = model.generate(**inputs)
    for helper in (assistant, model):
        assert torch.equal(model.generate(**inputs, assistant_model=helper), expected)
    assert torch.equal(model.generate(**inputs, prompt_lookup_num_tokens=2), expected)


class Collector(transformers.generation.streamers.BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        self.values += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_streaming_gives_what_generate_returns(name):
    model, streamer = make_model(name), Collector()
    ids = torch.tensor([[0, 5, 6, 7]])
    outputs = model.generate(pixel_values=make_pixel_values(1), input_ids=ids, max_new_tokens=5, streamer=streamer)
    assert streamer.ended
    assert streamer.values == outputs[0].tolist()


def test_max_length_counts_what_is_returned():
    for index in (IMAGE, None):
        model = make_model("llama", image_token_index=index)
        model.generation_config.eos_token_id = None
        outputs = model.generate(pixel_values=make_pixel_values(1), input_ids=torch.tensor([[0, 5]]), max_length=9)
        assert outputs.shape == (1, 9)
    assert model.generate(pixel_values=make_pixel_values(1), max_new_tokens=3).shape == (1, 4)


def test_limits_in_a_generation_config_count_the_same():
    model = make_model("llama", image_token_index=None)
    model.generation_config.eos_token_id = None
    inputs = {"pixel_values": make_pixel_values(1), "input_ids": torch.tensor([[0, 5]])}
    config = transformers.GenerationConfig(max_length=9, pad_token_id=1)
    assert model.generate(**inputs, generation_config=config).shape == (1, 9)
    assert config.max_length == 9
    model.generation_config.max_length = 7
    assert model.generate(**inputs).shape == (1, 7)
    # What a config leaves open is the model's own
    config = transformers.GenerationConfig(num_beams=2, pad_token_id=1)
    assert model.generate(**inputs, generation_config=config).shape == (1, 7)


def test_labels_are_not_shown_to_generate():
    model = make_model("llama")
    pixel_values, ids = make_pixel_values(1), torch.tensor([[0, 5, 6, 7, 8, 2]])
    labels = torch.tensor([[-100, -100, -100, 7, 8, 2]])
    actual = model.generate(pixel_values=pixel_values, input_ids=ids, labels=labels, max_new_tokens=4)
    expected = model.generate(pixel_values=pixel_values, input_ids=ids[:, :3], max_new_tokens=4)
    assert actual[0, :6].tolist() == [0, 5, 6, 1, 1, 1]
    assert actual[0, 6:].tolist() == expected[0, 3:].tolist()
    # Placeholders before it have no labels, whether they are given or not
    front = torch.full((1, model.config.num_query_tokens), model.config.image_token_index)
    given = {"pixel_values": pixel_values, "input_ids": torch.cat([front, ids], dim=1), "labels": labels}
    assert model.generate(**given, max_new_tokens=4)[0, front.shape[1] :].tolist() == actual[0].tolist()


def test_return_dict_in_generate():
    model = make_model("opt")
    outputs = model.generate(
        pixel_values=make_pixel_values(2),
        input_ids=torch.tensor([[0, 5], [0, 6]]),
        max_new_tokens=3,
        return_dict_in_generate=True,
        output_scores=True,
        output_hidden_states=True,
    )
    assert outputs.sequences.shape == (2, 5)
    assert len(outputs.scores) == len(outputs.hidden_states) == 3


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_compiled_forward_and_static_cache(name):
    model = make_model(name)
    pixel_values = make_pixel_values(1)
    ids = torch.tensor([[IMAGE] * NUM_QUERIES + [0, 5, 6]])
    expected = model(pixel_values=pixel_values, input_ids=ids).logits
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(pixel_values=pixel_values, input_ids=ids).logits, expected)
    greedy = model.generate(pixel_values=pixel_values, input_ids=ids, max_new_tokens=6)
    static = model.generate(pixel_values=pixel_values, input_ids=ids, max_new_tokens=6, cache_implementation="static")
    assert torch.equal(static, greedy)
    compile_config = transformers.CompileConfig(backend="eager", mode=None, fullgraph=True)
    compile_config._compile_all_devices = True
    static = model.generate(
        pixel_values=pixel_values,
        input_ids=ids,
        max_new_tokens=6,
        cache_implementation="static",
        compile_config=compile_config,
    )
    assert torch.equal(static, greedy)


def test_text_alone_goes_to_the_language_model():
    model = make_model("opt")
    ids = torch.tensor([[0, 5, 6]])
    expected = model.language_model.generate(input_ids=ids, max_new_tokens=4)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, prompt_lookup_num_tokens=2), expected)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4), expected)


def two_turns(model, placeholders: bool):
    """`(pixel_values, first turn, its cache, both turns)` of two rows, one of them padded."""
    front = [IMAGE] * NUM_QUERIES if placeholders else []
    pixel_values, batch = make_pixel_values(2), pad([front + PROMPTS[0], front + PROMPTS[1]])
    first = model.generate(pixel_values=pixel_values, **batch, max_new_tokens=4, return_dict_in_generate=True)
    both = torch.cat([first.sequences, torch.tensor([[11, 12], [13, 14]])], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, both.shape[1] - batch["input_ids"].shape[1])], dim=1)
    return pixel_values, batch, first[CACHE_NAME], {"input_ids": both, "attention_mask": mask.long()}


@pytest.mark.parametrize("placeholders", [True, False])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_generation_goes_on_from_a_cache(name, placeholders):
    model = make_model(name, image_token_index=IMAGE if placeholders else None)
    model.generation_config.eos_token_id = None
    pixel_values, first, cache, both = two_turns(model, placeholders)
    expected = model.generate(pixel_values=pixel_values, **both, max_new_tokens=5)
    read = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: read.append(output.shape[1]))
    for cache_name in CACHE_NAMES:
        given = {**both, cache_name: copy.deepcopy(cache), "max_new_tokens": 5, "repetition_penalty": 1.0}
        assert torch.equal(model.generate(pixel_values=pixel_values, **given), expected)
        given[cache_name] = copy.deepcopy(cache)
        if placeholders:
            # The image is in the cache: what is new is read, the last token of the first turn and the second one
            read.clear()
            assert torch.equal(model.generate(**given), expected)
            assert read == [3, 1, 1, 1, 1]
        else:
            with pytest.raises(ValueError, match="Give the image again"):
                model.generate(**given)
    static = transformers.StaticCache(config=model.config.text_config, max_cache_len=64)
    model.generate(pixel_values=pixel_values, **first, max_new_tokens=4, past_key_values=static)
    assert torch.equal(model.generate(pixel_values=pixel_values, **both, max_new_tokens=5, cache=static), expected)


def test_a_prefix_is_read_once_for_several_questions():
    model = make_model("llama")
    pixel_values, prefix = make_pixel_values(1), torch.tensor([[IMAGE] * NUM_QUERIES + [0, 5, 6]])
    with torch.no_grad():
        cache = model(pixel_values=pixel_values, input_ids=prefix, use_cache=True)[CACHE_NAME]
    for question in ([7, 8], [30, 31, 32]):
        input_ids = torch.cat([prefix, torch.tensor([question])], dim=1)
        expected = model.generate(pixel_values=pixel_values, input_ids=input_ids, max_new_tokens=5)
        actual = model.generate(input_ids=input_ids, cache=copy.deepcopy(cache), max_new_tokens=5)
        assert torch.equal(actual, expected)


def test_caches_that_do_not_fit_are_refused():
    model = make_model("llama")
    pixel_values, first, cache, both = two_turns(model, placeholders=True)
    with pytest.raises(ValueError, match="the whole text is expected"):
        model.generate(pixel_values=pixel_values, **first, cache=cache, max_new_tokens=2)
    behind = both["attention_mask"].clone()
    behind[1, -3] = 0
    with pytest.raises(ValueError, match="padding_side='left'"):
        model.generate(pixel_values=pixel_values, **(both | {"attention_mask": behind}), cache=cache)
    with pytest.raises(ValueError, match="cannot continue from a cache"):
        model.generate(pixel_values=pixel_values, **both, cache=cache, prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("placeholders", [True, False])
def test_guidance_weighs_against_the_text_without_the_image(placeholders):
    model = make_model("llama", image_token_index=IMAGE if placeholders else None)
    model.generation_config.eos_token_id = None
    prompt, negative = [IMAGE] * NUM_QUERIES * placeholders + [0, 5, 6], [0, 7]
    pixel_values, new = make_pixel_values(1), []
    for _ in range(5):
        logits = model(pixel_values=pixel_values, input_ids=torch.tensor([prompt + new])).logits[0, -1]
        without = model.language_model(input_ids=torch.tensor([negative + new])).logits[0, -1].log_softmax(-1)
        new.append((2.0 * (logits.log_softmax(-1) - without) + without).argmax().item())
    inputs = {"pixel_values": pixel_values, "input_ids": torch.tensor([prompt]), "max_new_tokens": 5}
    guided = model.generate(**inputs, guidance_scale=2.0, negative_prompt_ids=torch.tensor([negative]))
    assert guided[0].tolist() == prompt + new
    assert model.generate(**inputs, guidance_scale=2.0).shape == guided.shape
    with pytest.raises(ValueError, match="guidance_scale needs a decoder-only"):
        make_model("t5").generate(**inputs, guidance_scale=2.0)


@pytest.mark.parametrize("name", ["opt", "llama", "t5"])
@pytest.mark.parametrize("index", [IMAGE, None])
def test_embedded_text_and_inputs_stand_for_input_ids(name, index):
    model = make_model(name, image_token_index=index)
    front = [] if index is None else [IMAGE] * NUM_QUERIES
    batch, pixel_values = pad([front + PROMPTS[0], front + PROMPTS[1]]), make_pixel_values(2)
    mask = {"attention_mask": batch["attention_mask"]}
    expected = model.generate(pixel_values=pixel_values, **batch, max_new_tokens=4)
    assert torch.equal(
        model.generate(pixel_values=pixel_values, inputs=batch["input_ids"], **mask, max_new_tokens=4), expected
    )
    # The embeddings of other words show that they are what is read
    inputs_embeds = model.get_input_embeddings()(batch["input_ids"])
    embedded = model.generate(pixel_values=pixel_values, inputs_embeds=inputs_embeds, **mask, max_new_tokens=4)
    length = 0 if name == "t5" else batch["input_ids"].shape[1]
    assert torch.equal(embedded, expected[:, length:])
    other = model.generate(pixel_values=pixel_values, inputs_embeds=inputs_embeds.flip(1), max_new_tokens=4)
    assert not torch.equal(other, embedded)
    if name != "t5":
        both = {"inputs_embeds": inputs_embeds, **batch}
        assert torch.equal(model.generate(pixel_values=pixel_values, **both, max_new_tokens=4), expected)
        logits = model(pixel_values=pixel_values, inputs_embeds=inputs_embeds, **mask).logits
        torch.testing.assert_close(logits, model(pixel_values=pixel_values, **batch).logits)
    with pytest.raises(ValueError, match="another name for `input_ids`"):
        model.generate(pixel_values=pixel_values, inputs=batch["input_ids"], **batch)
    with pytest.raises(ValueError, match="token ids were expected"):
        model.generate(inputs=pixel_values)


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_a_mask_of_another_length_is_refused(name):
    model = make_model(name)
    pixel_values, input_ids = make_pixel_values(1), torch.tensor([PROMPTS[0]])
    for mask in (torch.ones(1, 3), torch.ones(1, 8), torch.ones(2, 6)):
        inputs = {"input_ids": input_ids, "attention_mask": mask.long()}
        for images in ({"pixel_values": pixel_values}, {}):
            with pytest.raises(ValueError, match=r"attention_mask of shape \(., .\) for the text of shape \(1, 6\)"):
                model.generate(**images, **inputs, max_new_tokens=2)
        with pytest.raises(ValueError, match=r"for the text of shape \(1, 6\)"):
            model(pixel_values=pixel_values, **inputs, labels=input_ids)


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_an_image_token_without_an_image_is_refused(name):
    model = make_model(name)
    inputs = {"input_ids": torch.tensor([[IMAGE] * NUM_QUERIES + PROMPTS[0]])}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="4 `<image>` placeholders .* no image was given"):
            call(**inputs)


def test_limits_without_placeholders_count_the_text():
    model = make_model("llama", image_token_index=None)
    inputs = {"pixel_values": make_pixel_values(1), "input_ids": torch.tensor([[0, 5]])}
    free = model.generate(**inputs, max_new_tokens=8)[0, 2:].tolist()
    model.generation_config.eos_token_id = free[0]
    assert model.generate(**inputs, max_new_tokens=8).shape == (1, 3)
    # A shortest length of 6 is four new tokens behind the two that were given, however the longest is said
    for longest in ({"max_new_tokens": 8}, {"max_length": 10}):
        lengths = [model.generate(**inputs, **longest, min_length=6).shape[1]]
        config = transformers.GenerationConfig(min_length=6, eos_token_id=free[0], pad_token_id=1, **longest)
        lengths.append(model.generate(**inputs, generation_config=config).shape[1])
        model.generation_config.min_length = 6
        lengths.append(model.generate(**inputs, **longest).shape[1])
        model.generation_config.min_length = None
        assert min(lengths) >= 6 and len(set(lengths)) == 1
        banned = model.generate(**inputs, **longest, min_new_tokens=4)
        assert banned.shape[1] == lengths[0]


def test_own_functions_see_the_text_as_it_was_given():
    model = make_model("llama", image_token_index=None)
    model.generation_config.eos_token_id = None
    rows = [PROMPTS[0], PROMPTS[1]]
    seen: dict[str, list] = {"stops": [], "scores": [], "tries": []}

    class Stops(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen["stops"].append(input_ids.tolist())
            return torch.tensor([len(row) >= 8 for row in input_ids])

    class Scores(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen["scores"].append(input_ids.tolist())
            return scores

    def allowed(row, input_ids):
        seen["tries"].append((row, input_ids.tolist()))
        return list(range(VOCAB_SIZE))

    outputs = model.generate(
        pixel_values=make_pixel_values(2),
        **pad(rows, "right"),
        max_new_tokens=6,
        stopping_criteria=transformers.StoppingCriteriaList([Stops()]),
        logits_processor=transformers.LogitsProcessorList([Scores()]),
        prefix_allowed_tokens_fn=allowed,
    )
    prompts = pad(rows)["input_ids"].tolist()
    assert outputs.shape == (2, 8)
    assert seen["scores"][0] == prompts
    assert seen["tries"][:2] == list(enumerate(prompts))
    assert seen["stops"] == [
        [p + new[6 : 6 + n] for p, new in zip(prompts, outputs.tolist(), strict=True)] for n in (1, 2)
    ]


def test_assisted_decoding_in_threads():
    model = make_model("llama")
    inputs = [
        {"pixel_values": make_pixel_values(1), "input_ids": torch.tensor([row]), "max_new_tokens": 8}
        for row in ([0, 5, 6, 7], [IMAGE] * NUM_QUERIES + [0, 30, 31, 30, 31], [0, 9]) * 4
    ]
    expected = [model.generate(**kwargs) for kwargs in inputs]
    with ThreadPoolExecutor(4) as threads:
        actual = list(threads.map(lambda kwargs: model.generate(**kwargs, prompt_lookup_num_tokens=2), inputs))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", ["opt", "t5"])
@pytest.mark.parametrize("index", [IMAGE, None])
def test_a_mask_of_any_type(name, index):
    model = make_model(name, image_token_index=index)
    front = [] if index is None else [IMAGE] * NUM_QUERIES
    batch, pixel_values = pad([front + PROMPTS[0], front + PROMPTS[1]], "right"), make_pixel_values(2)
    labels = (
        batch["input_ids"]
        .masked_fill(batch["attention_mask"] == 0, -100)
        .masked_fill(batch["input_ids"] == IMAGE, -100)
    )
    expected = model(pixel_values, **batch, labels=labels).loss
    tokens = model.generate(pixel_values, **batch, max_new_tokens=4)
    for dtype in (torch.bool, torch.float32, torch.uint8):
        batch["attention_mask"] = batch["attention_mask"].to(dtype)
        assert torch.equal(model(pixel_values, **batch, labels=labels).loss, expected), dtype
        assert torch.equal(model.generate(pixel_values, **batch, max_new_tokens=4), tokens), dtype


@pytest.mark.parametrize("wrap", ["peft", "compile"])
def test_drafts_for_a_wrapped_language_model(wrap):
    model = make_model("llama")
    if wrap == "peft":
        config = peft.LoraConfig("CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model.language_model = peft.get_peft_model(model.language_model, config)
    else:
        model.language_model = torch.compile(model.language_model, backend="eager")
    before = set(vars(next(part for part in model.language_model.modules() if hasattr(part, "lm_head"))))
    inputs = {"pixel_values": make_pixel_values(1), "input_ids": torch.tensor([[0, 30, 31, 30, 31, 30]])}
    expected = model.generate(**inputs, max_new_tokens=8)
    drafting = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 8}
    assert torch.equal(model.generate(**inputs, **drafting), expected)
    inputs["input_ids"] = inputs["input_ids"][:, :3]
    assert torch.equal(model.generate(**inputs, **drafting), model.generate(**inputs, max_new_tokens=8))
    assert set(vars(next(part for part in model.language_model.modules() if hasattr(part, "lm_head")))) == before


def test_transformers_own_functions_beside_those_of_generate():
    """With images in front, they replace what `generate` makes of their type, as without."""
    model = make_model("llama", image_token_index=None)
    model.generation_config.eos_token_id = None
    inputs = {"pixel_values": make_pixel_values(1), "input_ids": torch.tensor([[0, 5, 6, 5, 6]])}
    penalty = transformers.RepetitionPenaltyLogitsProcessor(4.0)
    expected = model.generate(**inputs, max_new_tokens=8, repetition_penalty=4.0)
    given = {"repetition_penalty": 2.0, "logits_processor": transformers.LogitsProcessorList([penalty])}
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, **given), expected)
    longest = transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(5 + 30)])
    assert model.generate(**inputs, stopping_criteria=longest).shape == (1, 35)


def test_texts_that_can_not_be_read_without_a_mask_or_an_image():
    model = make_model("llama")
    pixel_values, first, cache, both = two_turns(model, placeholders=True)
    with pytest.raises(ValueError, match="no attention_mask was given"):
        model.generate(input_ids=both["input_ids"], cache=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="neither an image nor a token"):
        model.generate(input_ids=torch.zeros(1, 0, dtype=torch.long))
    model = make_model("llama", image_token_index=None)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="look like placeholders"):
            call(input_ids=torch.tensor([[IMAGE] * NUM_QUERIES + [0, 5]]))


def test_labels_of_embedded_text():
    model = make_model("llama")
    ids = torch.tensor([[IMAGE] * NUM_QUERIES + [0, 5, 6]])
    inputs = {"pixel_values": make_pixel_values(1), "inputs_embeds": model.get_input_embeddings()(ids)}
    labels = torch.tensor([[-100] * NUM_QUERIES + [-100, 5, 6]])
    expected = model(inputs["pixel_values"], input_ids=ids, labels=labels).loss
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)
    with pytest.raises(ValueError, match="one label for each embedding"):
        model(**inputs, labels=labels[:, NUM_QUERIES:])


def test_an_image_behind_a_cache():
    """Of a model without placeholders: it stands between what the cache holds and the new text."""
    model = make_model("llama", image_token_index=None)
    batch, pixel_values = pad([PROMPTS[0], PROMPTS[1]]), make_pixel_values(2)
    with torch.no_grad():
        cache = model(**batch, use_cache=True)[CACHE_NAME]
        more, mask = torch.tensor([[7, 8], [9, 10]]), batch["attention_mask"]
        mask = torch.cat([mask, torch.ones(2, 2, dtype=torch.long)], dim=1)
        actual = model(pixel_values, input_ids=more, attention_mask=mask, **{CACHE_NAME: cache}).logits
        embed, features = model.get_input_embeddings(), model.get_image_features(pixel_values).pooler_output
        embeds = torch.cat([embed(batch["input_ids"]), features, embed(more)], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, NUM_QUERIES + 2, dtype=torch.long)], dim=1)
        expected = model(inputs_embeds=embeds, attention_mask=mask).logits
    torch.testing.assert_close(actual[:, -2:], expected[:, -2:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("on_the_whole", [True, False])
def test_virtual_tokens_are_refused(on_the_whole):
    model = adapted = make_model("llama")
    config = peft.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=3)
    if on_the_whole:
        adapted = peft.get_peft_model(model, config)
    else:
        model.language_model = peft.get_peft_model(model.language_model, config)
    with pytest.raises(ValueError, match="virtual tokens do not reach"):
        adapted.generate(pixel_values=make_pixel_values(1), input_ids=torch.tensor([[0, 5]]), max_new_tokens=2)


def test_a_model_needs_a_language_model():
    from tiny import make_config

    with pytest.raises(ValueError, match="needs a language model"):
        Blip2ForConditionalGeneration(make_config(None))
