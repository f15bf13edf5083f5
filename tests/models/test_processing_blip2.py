import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import transformers
from tiny import NUM_QUERIES, SENTENCES, make_image, make_image_processor, make_model, make_processor, make_tokenizer

import blip2_hf
from blip2_hf import Blip2Processor, ImageLoadError


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def processor():
    return make_processor()


def assert_same_inputs(actual, expected):
    assert set(actual) == set(expected)
    for key, value in expected.items():
        # Where torchvision is installed, transformers loads the image processor that uses it: it rounds otherwise
        tolerance = 0.05 if key == "pixel_values" else 0
        torch.testing.assert_close(actual[key], value, rtol=0, atol=tolerance)


def test_image_token_disturbs_no_existing_id(processor):
    before = make_tokenizer().get_vocab()
    after = processor.tokenizer.get_vocab()
    assert {token: i for token, i in after.items() if token != "<image>"} == before
    assert after["<image>"] == processor.image_token_id == len(before)
    again = Blip2Processor(make_image_processor(), processor.tokenizer, num_query_tokens=NUM_QUERIES)
    assert again.image_token_id == processor.image_token_id
    assert len(again.tokenizer) == len(before) + 1


def test_one_image_stands_in_front_of_the_text(processor):
    inputs = processor(images=make_image(), text=SENTENCES[0], return_tensors="pt")
    expected = make_tokenizer()(SENTENCES[0])["input_ids"]
    assert inputs["input_ids"].tolist() == [[processor.image_token_id] * NUM_QUERIES + expected]
    assert inputs["pixel_values"].shape == (1, 3, 28, 28)
    assert set(inputs) == {"pixel_values", "input_ids", "attention_mask"}
    marked = processor(images=make_image(), text="<image>" + SENTENCES[0], return_tensors="pt")
    assert torch.equal(marked["input_ids"], inputs["input_ids"])


def test_marks_give_the_places_of_several_images(processor):
    text = "<image>a red bus.<image>a dog"
    inputs = processor(images=[[make_image(0), make_image(1)]], text=text)
    ids, image = inputs["input_ids"][0], processor.image_token_id
    assert ids[:NUM_QUERIES] == [image] * NUM_QUERIES
    assert ids.count(image) == 2 * NUM_QUERIES
    assert processor.tokenizer.decode([t for t in ids if t != image], skip_special_tokens=True) == "a red bus.a dog"
    start = ids.index(image, NUM_QUERIES)
    assert processor.tokenizer.decode(ids[NUM_QUERIES + 1 : start]) == "a red bus."
    flat = processor(images=[make_image(0), make_image(1)], text=text)
    assert flat["input_ids"] == inputs["input_ids"]
    unmarked = processor(images=[[make_image(0), make_image(1)]], text="a dog")
    assert unmarked["input_ids"][0][: 2 * NUM_QUERIES + 1] == [image] * 2 * NUM_QUERIES + [0]


def test_padding_side_is_left_for_prompts_and_right_with_targets(processor):
    images, texts = [make_image(0), make_image(1)], ["a photo of a dog", "a"]
    prompts = processor(images=images, text=texts, return_tensors="pt")
    assert prompts["attention_mask"][1].tolist() == sorted(prompts["attention_mask"][1].tolist())
    assert prompts["input_ids"][1, 0] == processor.tokenizer.pad_token_id
    batch = processor(images=images, text=texts, text_target=["x", "y"], return_tensors="pt")
    assert batch["attention_mask"][1].tolist() == sorted(batch["attention_mask"][1].tolist(), reverse=True)
    assert batch["labels"][1, -1] == -100
    forced = processor(images=images, text=texts, padding_side="right", return_tensors="pt")
    assert forced["input_ids"][1, -1] == processor.tokenizer.pad_token_id


@pytest.mark.parametrize("prompt", ["", "a photo of", "a photo of ", "Question: what colour? Answer:"])
def test_prompts_are_not_learned_and_the_end_is(processor, prompt):
    target = "a dog sitting"
    batch = processor(images=make_image(), text=prompt, text_target=target)
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    if not prompt.endswith(" "):
        joined = f"{prompt} {target}" if prompt else target
        assert ids[NUM_QUERIES:] == [*make_tokenizer()(joined)["input_ids"], 2]
    learned = [token for token in labels if token != -100]
    assert processor.tokenizer.decode(learned[:-1]).strip() == target
    assert learned[-1] == 2
    assert labels[: len(labels) - len(learned)] == [-100] * (len(labels) - len(learned))
    # What is learned follows the prompt as generation is given it
    given = processor(images=make_image(), text=prompt)["input_ids"][0]
    assert ids[: len(given)] == given


def test_max_length_counts_text_alone_and_keeps_the_end_token(processor):
    text = SENTENCES[3]
    whole = make_tokenizer()(text)["input_ids"]
    inputs = processor(images=make_image(), text=text, truncation=True, max_length=6)
    assert inputs["input_ids"][0] == [processor.image_token_id] * NUM_QUERIES + whole[:6]
    batch = processor(images=make_image(), text="a photo of", text_target=text, truncation=True, max_length=6)
    assert len(batch["input_ids"][0]) == NUM_QUERIES + 6
    assert batch["input_ids"][0][-1] == batch["labels"][0][-1] == 2
    padded = processor(images=make_image(), text="a", padding="max_length", max_length=6, return_tensors="pt")
    assert padded["input_ids"].shape == (1, NUM_QUERIES + 6)
    with pytest.raises(ValueError, match="cuts off"):
        processor(images=[make_image()], text=text + "<image>", truncation=True, max_length=3)


def test_encoder_decoder_targets():
    processor = make_processor(is_encoder_decoder=True)
    batch = processor(
        images=[make_image(0), make_image(1)],
        text=["a photo of", "a"],
        text_target=["a dog", "two people riding"],
        return_tensors="pt",
    )
    assert batch["input_ids"][0, -1] == 2
    assert batch["labels"][1].tolist() == processor.tokenizer("two people riding")["input_ids"]
    assert batch["labels"][0, -1] == -100
    cut = processor(text="a", text_target=SENTENCES[3], images=make_image(), truncation=True, max_length=5)
    assert len(cut["labels"][0]) == 5
    assert cut["labels"][0][-1] == 2


@pytest.mark.parametrize("prompt", ["a photo of", "a photo of ", "", "<image><image>a photo of", "Question:\n"])
def test_candidates_are_the_targets_of_their_prompt(processor, prompt):
    texts = ["a dog", "two people near the street"]
    images = [[make_image(0), make_image(1)]] if "<image>" in prompt else make_image(0)
    found = processor(images=images, text=prompt, candidates=texts)["candidate_labels"][0]
    for text, labels in zip(texts, found, strict=True):
        target = processor(images=images, text=prompt, text_target=text)["labels"][0]
        assert [label for label in labels if label != -100] == [label for label in target if label != -100]
    without_end = processor(images=images, text=prompt, candidates=texts, end_candidates=False)["candidate_labels"][0]
    assert without_end[1] == found[1][:-1]


def test_a_decoders_tokenizer_that_ends_each_text():
    """As Llama's with `add_eos_token`: a prompt that is to be continued has no end."""
    tokenizer = make_tokenizer(bos=True, eos=True)
    processor = Blip2Processor(make_image_processor(), tokenizer, num_query_tokens=4, is_encoder_decoder=False)
    plain = make_processor()
    for prompt in ("a photo of", ""):
        for options in ({}, {"text_target": "a dog"}, {"candidates": ["a dog"]}):
            found, expected = (p(text=prompt, **options) for p in (processor, plain))
            assert dict(found) == dict(expected)


def test_a_candidate_may_begin_with_a_special_token(processor):
    found = processor(text="", candidates=["<s> a dog"])["candidate_labels"][0][0]
    assert found[0] == processor.tokenizer.bos_token_id and len(found) > 2


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ("a dog", "a list of strings, or one for each text"),
        ([], "a list of strings, or one for each text"),
        ([["a dog"], []], "a list of strings, or one for each text"),
        ([["a dog"], "the sky"], "a list of strings, or one for each text"),
        ([["a dog"]], "1 lists of candidates for 2 texts"),
        (["a dog", ""], "a string that is not empty"),
        (["a dog", 3], "a string that is not empty"),
        (["a dog", "a <image>"], "'a <image>' has '<image>', which stands for an image"),
    ],
)
def test_candidates_that_do_not_fit(processor, candidates, message):
    with pytest.raises(ValueError, match=message):
        processor(text=["a photo of", "the"], candidates=candidates)


def test_candidates_need_a_prompt_that_is_not_learned_and_a_language_model(processor):
    with pytest.raises(ValueError, match="text_target was given too"):
        processor(text="a", text_target="b", candidates=["c"])


def test_one_prompt_goes_with_every_image(processor):
    inputs = processor(images=[make_image(0), make_image(1)], text="a photo of", return_tensors="pt")
    assert inputs["input_ids"].shape[0] == inputs["pixel_values"].shape[0] == 2


def test_images_alone_and_text_alone(processor):
    empty = processor(images=make_image())
    assert set(empty) == {"pixel_values", "input_ids", "attention_mask"}
    assert empty["input_ids"] == processor(images=make_image(), text="")["input_ids"]
    bert = make_tokenizer(eos=True)
    bert.cls_token, bert.sep_token = "<s>", "</s>"
    stage1 = Blip2Processor(make_image_processor(), bert, is_encoder_decoder=False)
    assert set(stage1(images=make_image())) == {"pixel_values"}
    # As that of transformers' checkpoints for retrieval
    retrieval = Blip2Processor(make_image_processor(), bert, num_query_tokens=4, is_encoder_decoder=False)
    assert set(retrieval(images=make_image())) == {"pixel_values"}
    inputs = processor(text=["a", "a dog"])
    assert processor.image_token_id not in sum(inputs["input_ids"], [])
    with pytest.raises(ValueError, match="either images or text"):
        processor()


def test_images_and_texts_that_do_not_match_are_an_error(processor):
    with pytest.raises(ValueError, match="1 images .* for 3 texts"):
        processor(images=make_image(), text=["a", "b", "c"])
    with pytest.raises(ValueError, match="2 `<image>` marks"):
        processor(images=[make_image()], text="<image> and <image>")
    with pytest.raises(ValueError, match="2 texts, but 1 text_targets"):
        processor(images=[make_image(0), make_image(1)], text=["a", "b"], text_target="x")
    with pytest.raises(ValueError, match="a list of strings was expected"):
        processor(images=make_image(), text=3)


def test_a_broken_picture_is_named(processor, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    with pytest.raises(ImageLoadError, match=r"image 2 of 2 .*broken\.jpg"):
        processor(images=[make_image(), str(tmp_path / "broken.jpg")])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1"])
def test_pictures_of_every_mode(processor, mode):
    image = make_image() if mode != "I;16" else None
    if image is None:
        image = make_image().convert("L")
        image = transformers.image_utils.PIL.Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    pixel_values = processor(images=image, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 28, 28)
    assert torch.isfinite(pixel_values).all()
    assert pixel_values.std() > 0.1


@pytest.mark.parametrize("size", [(1, 1), (600, 2), (1, 500)])
def test_pictures_of_every_size(processor, size):
    pixel_values = processor(images=make_image(size=size), return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 28, 28)


def test_round_trip(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["num_query_tokens"] == NUM_QUERIES and "prompt" not in saved
    expected = processor(images=make_image(), text="a <image>", return_tensors="pt")
    for loaded in (Blip2Processor.from_pretrained(tmp_path), transformers.AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is Blip2Processor
        assert loaded.qformer_tokenizer is None
        assert_same_inputs(loaded(images=make_image(), text="a <image>", return_tensors="pt"), expected)


def test_a_saved_model_and_processor_come_back_as_ours(tmp_path):
    make_model().save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    assert type(transformers.AutoProcessor.from_pretrained(tmp_path)).__module__.startswith("blip2_hf.")
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is blip2_hf.Blip2Config


def test_qformer_tokenizer_round_trip(tmp_path):
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "photo", "of"])
    )
    qformer_tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    processor = make_processor(qformer_tokenizer=qformer_tokenizer)
    images, texts = [make_image(0), make_image(1)], ["a dog", "a photo of a dog"]
    expected = processor(images=images, text=texts, return_tensors="pt")
    assert expected["qformer_input_ids"].tolist()[1] == qformer_tokenizer("a photo of a dog")["input_ids"]
    assert expected["qformer_attention_mask"].sum(dim=1).tolist() == [4, 7]
    processor.save_pretrained(tmp_path / "saved")
    loaded = transformers.AutoProcessor.from_pretrained(tmp_path / "saved")
    assert_same_inputs(loaded(images=images, text=texts, return_tensors="pt"), expected)
    assert set(expected) <= set(loaded.model_input_names) | {"labels"}


def test_files_of_transformers_own_processor_load(tmp_path):
    theirs = transformers.Blip2Processor(make_image_processor(), make_tokenizer(), num_query_tokens=NUM_QUERIES)
    theirs.save_pretrained(tmp_path)
    ours = Blip2Processor.from_pretrained(tmp_path)
    expected = theirs(images=make_image(), text="a photo of", return_tensors="pt")
    actual = ours(images=make_image(), text="a photo of", return_tensors="pt")
    assert_same_inputs(actual, expected)
    # As published at first: no number of queries, an image processor with a file of its own
    (tmp_path / "processor_config.json").unlink()
    make_image_processor().save_pretrained(tmp_path)
    old = Blip2Processor.from_pretrained(tmp_path)
    assert old.num_query_tokens is None
    assert old(images=make_image(), text="a dog")["input_ids"] == [make_tokenizer()("a dog")["input_ids"]]
    with pytest.raises(ValueError, match="no num_query_tokens"):
        old(images=make_image(), text="a <image> dog")


def test_the_kind_of_language_model_is_found_out(tmp_path):
    assert not Blip2Processor(make_image_processor(), make_tokenizer()).is_encoder_decoder
    assert Blip2Processor(make_image_processor(), make_tokenizer(bos=False, eos=True)).is_encoder_decoder
    # transformers' own files do not say it, the model's configuration beside them does
    make_model("t5").save_pretrained(tmp_path)
    theirs = transformers.Blip2Processor(make_image_processor(), make_tokenizer(), num_query_tokens=NUM_QUERIES)
    theirs.save_pretrained(tmp_path)
    assert Blip2Processor.from_pretrained(tmp_path).is_encoder_decoder


def test_files_for_transformers_own_processor(processor, tmp_path):
    processor.prompt = "a photo of"
    processor.save_pretrained(tmp_path, transformers_compatible=True)
    assert "prompt" not in json.loads((tmp_path / "processor_config.json").read_text())
    make_model().save_pretrained(tmp_path, transformers_compatible=True)
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert type(theirs) is transformers.Blip2Processor
    actual = theirs(images=make_image(), text="a photo of", return_tensors="pt")
    assert_same_inputs(actual, processor(images=make_image(), text="a photo of", return_tensors="pt"))


def test_the_tokenizers_own_padding_side_does_not_matter():
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "right"
    processor = Blip2Processor(make_image_processor(), tokenizer, num_query_tokens=NUM_QUERIES)
    prompts = processor(images=[make_image(0), make_image(1)], text=["a photo of a dog", "a"])
    assert prompts["attention_mask"][1][0] == 0


def test_marks_of_one_text_do_not_take_the_images_of_another(processor):
    images = [[make_image(0), make_image(1)], [make_image(2)]]
    with pytest.raises(ValueError, match=r"3 images \(\[2, 1\]\)"):
        processor(images=images, text=["<image>x", "<image>y<image>z"])


def test_new_text_alone(processor):
    model = make_model()
    inputs = processor(images=[make_image(0), make_image(1)], text=["a photo of", "a"], return_tensors="pt")
    outputs = model.generate(**inputs, max_new_tokens=4, num_beams=2, num_return_sequences=2)
    texts = processor.post_process_image_text_to_text(outputs, input_ids=inputs["input_ids"])
    new = processor.tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert texts == [text.strip() for text in new]
    assert len(texts) == 4


@dataclass
class Message:
    role: str
    content: list | None
    tool_calls: list | None = None


@dataclass
class ImagePart:
    image_url: dict | str
    type: str = "image_url"


@pytest.mark.parametrize("wrap", [lambda path: {"url": path}, str], ids=["as OpenAI", "bare"])
def test_chat_template_of_message_objects(processor, tmp_path, wrap):
    """As the clients of chat services hand them over: objects, whose empty fields the template must not see."""
    template = TEMPLATE.replace("m['role'] }}", "m['role'] }} ({{ m | length }})")
    path = str(tmp_path / "picture.png")
    make_image().save(path)
    messages = [Message("user", [ImagePart(wrap(path)), {"type": "text", "text": "hi"}]), Message("assistant", None)]
    assert processor.apply_chat_template(messages, chat_template=template) == "<s>[user (2)]<image>hi[assistant (2)]"
    of_dicts = [{"role": "user", "content": [{"type": "image", "path": path}, {"type": "text", "text": "hi"}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "chat_template": TEMPLATE}
    actual = processor.apply_chat_template(messages[:1], **options)
    expected = processor.apply_chat_template(of_dicts, **options)
    torch.testing.assert_close(dict(actual), dict(expected))


def test_chat_template(processor):
    processor.chat_template = TEMPLATE
    conversation = [
        {
            "role": "user",
            "content": [{"type": "image", "image": make_image()}, {"type": "text", "text": "What is it?"}],
        }
    ]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert text == "<s>[user]<image>What is it?[assistant]"
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["pixel_values"].shape == (1, 3, 28, 28)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == NUM_QUERIES
    assert (inputs["input_ids"] == 0).sum() == 1
    both = processor.apply_chat_template(
        [conversation, [{"role": "user", "content": "hello"}]], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert both["input_ids"].shape[0] == 2
    assert make_model().generate(**both, max_new_tokens=2).shape[0] == 2
    with pytest.raises(ValueError, match="'audio'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "audio", "audio": "x"}]}])
    with pytest.raises(TypeError, match="'hello' of type str"):
        processor.apply_chat_template(["hello"])


def asked(*parts) -> list[dict]:
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return [{"role": "user", "content": content}]


DEFAULT_CHATS = [
    (None, asked(None, "what is it?"), "<image>Question: what is it? Answer:"),
    (None, asked("what is it?", None), "<image>Question: what is it? Answer:"),
    (None, asked(None, None, "same?"), "<image><image>Question: same? Answer:"),
    (None, [{"role": "user", "content": "hello?"}], "Question: hello? Answer:"),
    (None, asked(None), "<image>"),
    (
        None,
        [{"role": "system", "content": "Be brief."}, *asked(None, "why?")],
        "Be brief. <image>Question: why? Answer:",
    ),
    ("a photo of", asked(None), "<image>a photo of"),
    ("a photo of", asked(None, "what is it?"), "<image>Question: what is it? Answer:"),
    ('Q: "{}" A:', asked(None, "what?"), '<image>Q: "what?" A:'),
    (
        None,
        [*asked(None, "what is it?"), {"role": "assistant", "content": "a dog"}, *asked("where?")],
        "<image>Question: what is it? Answer: a dog</s>Question: where? Answer:",
    ),
]


@pytest.mark.parametrize(("prompt", "messages", "expected"), DEFAULT_CHATS)
def test_default_chat_template(prompt, messages, expected, processor):
    processor.prompt = prompt
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == expected


def test_default_chat_template_of_an_encoder_decoder_has_the_papers_other_prompt():
    tokenizer = make_tokenizer(bos=False, eos=True)
    processor = Blip2Processor(make_image_processor(), tokenizer, num_query_tokens=NUM_QUERIES)
    assert processor.is_encoder_decoder
    chat = [*asked(None, "what is it?"), {"role": "assistant", "content": "a dog"}, *asked("where?")]
    assert processor.apply_chat_template(chat) == (
        "<image>Question: what is it? Short answer: a dog Question: where? Short answer:"
    )


def test_default_chat_template_gives_the_inputs_of_its_text(processor):
    image, question = make_image(), "Question: what is it? Answer:"
    chat = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, {"type": "image", "image": image}]}]
    expected = processor(images=image, text=question, return_tensors="pt")
    assert processor.tokenizer.bos_token_id in expected["input_ids"]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    torch.testing.assert_close(dict(inputs), dict(expected))
    encoder_decoder = make_processor(is_encoder_decoder=True)
    expected = encoder_decoder(images=image, text="Question: what is it? Short answer:", return_tensors="pt")
    inputs = encoder_decoder.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    torch.testing.assert_close(dict(inputs), dict(expected))


def test_default_chat_template_is_understood_by_transformers_own_processor(processor, tmp_path):
    processor.save_pretrained(tmp_path, transformers_compatible=True)
    theirs = transformers.Blip2Processor.from_pretrained(tmp_path)
    path = tmp_path / "picture.png"
    make_image().save(path)
    chat = [
        {"role": "user", "content": [{"type": "image", "path": str(path)}, {"type": "text", "text": "what is it?"}]}
    ]
    # Its __init__ drops the template of the processor, so that it is given that of the tokenizer
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    actual = theirs.apply_chat_template(chat, chat_template=theirs.tokenizer.chat_template, **options)
    text = "Question: what is it? Answer:"
    assert theirs.tokenizer.decode(actual["input_ids"][0], skip_special_tokens=True) == text
    torch.testing.assert_close(dict(actual), dict(processor(images=path, text=text, return_tensors="pt")))


def test_default_chat_template_is_saved_and_follows_the_prompt(processor, tmp_path):
    processor.prompt = "a photo of"
    processor.save_pretrained(tmp_path)
    assert "a photo of" in (tmp_path / "chat_template.jinja").read_text()
    loaded = Blip2Processor.from_pretrained(tmp_path)
    assert loaded.apply_chat_template(asked(None)) == "<image>a photo of"
    loaded.prompt = "Q: {} A:"
    loaded.save_pretrained(tmp_path)
    assert Blip2Processor.from_pretrained(tmp_path).apply_chat_template(asked("what?")) == "Q: what? A:"


def test_language_models_chat_template_is_used_unless_a_prompt_is_learned(processor, tmp_path):
    processor.tokenizer.chat_template = TEMPLATE
    own = Blip2Processor(processor.image_processor, processor.tokenizer, num_query_tokens=NUM_QUERIES)
    assert own.apply_chat_template(asked("hi")) == "<s>[user]hi"
    own.save_pretrained(tmp_path)
    loaded = Blip2Processor.from_pretrained(tmp_path)
    assert loaded.apply_chat_template(asked("hi")) == "<s>[user]hi"
    learned = Blip2Processor(
        processor.image_processor, processor.tokenizer, num_query_tokens=NUM_QUERIES, prompt="a photo of"
    )
    assert learned.apply_chat_template(asked("hi")) == "Question: hi Answer:"


def test_processor_of_stage1_has_no_chat_template():
    tokenizer = make_tokenizer(eos=True)
    tokenizer.cls_token = "<s>"  # as BERT's has
    processor = Blip2Processor(make_image_processor(), tokenizer, is_encoder_decoder=False)
    assert processor.chat_template is None
    with pytest.raises(ValueError, match="no chat template because its model writes no text"):
        processor.apply_chat_template(asked("hi"))


def test_assistant_masks_of_a_padded_batch(processor):
    chats = [
        [*asked(None, "what is it?"), {"role": "assistant", "content": "a dog"}],
        [*asked("hello?"), {"role": "assistant", "content": "grass and sky"}, *asked("why?")],
    ]
    chats[0][0]["content"][0]["image"] = make_image()
    for padding_side in ("left", "right"):
        inputs = processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding_side": padding_side},
        )
        masks = inputs["assistant_masks"].bool()
        learned = [processor.tokenizer.decode(ids[mask]) for ids, mask in zip(inputs["input_ids"], masks, strict=True)]
        assert [text.strip() for text in learned] == ["a dog</s>", "grass and sky</s>"]
    with pytest.raises(ValueError, match="needs tokenize=True"):
        processor.apply_chat_template(chats, return_assistant_tokens_mask=True)


@pytest.mark.parametrize("name", ["txt", "audio", "images_kwarg"])
def test_arguments_that_would_be_ignored_are_refused_by_name(processor, name):
    with pytest.raises(TypeError, match=f"was given {name}, and takes images, text"):
        processor(images=make_image(), text="a", **{name: "a cat"})
    # Generic callers say that there are none
    processor(images=make_image(), text="a", videos=None, audio=None)
