"""The tasks "image-to-text" and "visual-question-answering": transformers 4's calls and outputs, on many models."""

import contextlib
import copy
import functools
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import pipeline
from transformers import pipelines as transformers_pipelines
from transformers.pipelines.pt_utils import KeyDataset

from blip2_hf import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
)
from blip2_hf._registration import register_pipelines
from blip2_hf.models.generation_presets import generation_preset
from blip2_hf.models.image_loading import ImageLoadError
from blip2_hf.models.pipeline_blip2 import ImageToTextPipeline, VisualQuestionAnsweringPipeline


WORDS = ["question", "answer", "short", "how", "many", "what", "colour", "is", "the", "a", "cat", "dog", "red", "two"]
WORDS += ["photo", "of", ":", "?", "on", "in", "and", "one"]
SPECIALS = ["<pad>", "</s>", "[CLS]", "[SEP]", "<unk>"]
VOCAB_SIZE = len(SPECIALS + WORDS)
IMAGE_TOKEN = VOCAB_SIZE  # the next id, which BLIP-2's processor gives to <image>
# exactly five words, whatever the random weights would rather say
FIVE_WORDS = {"max_new_tokens": 5, "suppress_tokens": [*range(len(SPECIALS)), IMAGE_TOKEN]}
TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {**TEXT, "image_size": 16, "patch_size": 8}


def make_tokenizer(template, **special_tokens):
    vocab = {word: i for i, word in enumerate(SPECIALS + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ids = [(token, vocab[token]) for token in SPECIALS]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", **special_tokens
    )


def bert_tokenizer():
    return make_tokenizer("[CLS] $A [SEP]", cls_token="[CLS]", sep_token="[SEP]")


def make_image_processor(name):
    size = {"height": 16, "width": 16}
    # the PIL ones, which need no torchvision
    return getattr(transformers, f"{name}ImageProcessorPil")(size=size, do_center_crop=False)


def make_blip(model_class=transformers.BlipForConditionalGeneration):
    text = {**TEXT, "vocab_size": VOCAB_SIZE, "encoder_hidden_size": 16, "projection_dim": 16}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    config = transformers.BlipConfig(text_config={**text, **ids}, vision_config=VISION, projection_dim=16)
    return model_class(config), transformers.BlipProcessor(make_image_processor("Blip"), bert_tokenizer())


def make_blip_for_answers():
    return make_blip(transformers.BlipForQuestionAnswering)


def make_git():
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = transformers.GitConfig(vocab_size=VOCAB_SIZE, vision_config=VISION, **TEXT, **ids)
    processor = transformers.GitProcessor(make_image_processor("CLIP"), bert_tokenizer())
    return transformers.GitForCausalLM(config), processor


def make_language_model_config(is_encoder_decoder):
    if is_encoder_decoder:
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        return transformers.T5Config(vocab_size=VOCAB_SIZE + 1, decoder_start_token_id=0, **sizes)
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 1}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return transformers.OPTConfig(
        vocab_size=VOCAB_SIZE + 1, num_attention_heads=2, max_position_embeddings=64, **sizes, **ids
    )


def language_model_tokenizer(is_encoder_decoder):
    template = "$A </s>" if is_encoder_decoder else "</s> $A"
    return make_tokenizer(template, bos_token="</s>", eos_token="</s>")


def make_blip2_of_transformers(is_encoder_decoder=False):
    config = transformers.Blip2Config(
        vision_config={**VISION, "initializer_range": 0.5},
        qformer_config={**TEXT, "encoder_hidden_size": 16, "vocab_size": VOCAB_SIZE},
        text_config=make_language_model_config(is_encoder_decoder).to_dict(),
        num_query_tokens=3,
        image_token_index=IMAGE_TOKEN,
    )
    model = transformers.Blip2ForConditionalGeneration(config)
    with torch.no_grad():
        model.query_tokens.normal_()
    tokenizer = language_model_tokenizer(is_encoder_decoder)
    return model, transformers.Blip2Processor(make_image_processor("Blip"), tokenizer, num_query_tokens=3)


def make_blip2_t5_of_transformers():
    return make_blip2_of_transformers(is_encoder_decoder=True)


def make_pix2struct():
    sizes = {"hidden_size": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_hidden_layers": 1}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    vision = {"num_attention_heads": 2, "patch_embed_hidden_size": 3 * 8 * 8, "seq_len": 128, "patch_size": 8}
    config = transformers.Pix2StructConfig(
        text_config={**sizes, **ids, "num_heads": 2, "vocab_size": VOCAB_SIZE}, vision_config={**sizes, **vision}
    )
    image_processor = transformers.Pix2StructImageProcessorPil(patch_size={"height": 8, "width": 8}, max_patches=16)
    processor = transformers.Pix2StructProcessor(image_processor, make_tokenizer("$A </s>", eos_token="</s>"))
    return transformers.Pix2StructForConditionalGeneration(config), processor


def make_vision_encoder_decoder():
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    decoder = transformers.GPT2Config(vocab_size=VOCAB_SIZE, n_embd=16, n_layer=1, n_head=2, n_positions=64, **ids)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**VISION), decoder
    )
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model = transformers.VisionEncoderDecoderModel(config)
    model.generation_config.decoder_start_token_id, model.generation_config.pad_token_id = 1, 0
    return model, make_tokenizer("$A", bos_token="</s>", eos_token="</s>"), make_image_processor("ViT")


def make_vilt():
    labels = {0: "yes", 1: "no", 2: "red", 3: "two"}
    config = transformers.ViltConfig(vocab_size=VOCAB_SIZE, **VISION, max_position_embeddings=20, num_labels=4)
    config.id2label, config.label2id = labels, {label: i for i, label in labels.items()}
    image_processor = transformers.ViltImageProcessorPil(size={"shortest_edge": 16}, size_divisor=8)
    return transformers.ViltForQuestionAnswering(config), transformers.ViltProcessor(image_processor, bert_tokenizer())


def make_blip2(is_encoder_decoder=False):
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**VISION),
        qformer_config=Blip2QFormerConfig(**TEXT, vocab_size=VOCAB_SIZE, bos_token_id=2),
        text_config=make_language_model_config(is_encoder_decoder),
        num_query_tokens=3,
        image_token_index=IMAGE_TOKEN,
    )
    tokenizer = language_model_tokenizer(is_encoder_decoder)
    processor = Blip2Processor(
        make_image_processor("Blip"), tokenizer, num_query_tokens=3, is_encoder_decoder=is_encoder_decoder
    )
    return Blip2ForConditionalGeneration(config), processor


def make_blip2_t5():
    return make_blip2(is_encoder_decoder=True)


CAPTIONERS = {
    "blip2 opt": make_blip2,
    "blip2 t5": make_blip2_t5,
    "blip-2 opt": make_blip2_of_transformers,
    "blip-2 t5": make_blip2_t5_of_transformers,
    "blip": make_blip,
    "git": make_git,
    "pix2struct": make_pix2struct,
}
ANSWERERS = {name: make for name, make in CAPTIONERS.items() if name not in ("blip", "pix2struct")}
ANSWERERS["blip"] = make_blip_for_answers


@functools.cache
def make(make_model):
    """The parts that `make_model` gives; the weights are large, so that images and prompts matter."""
    torch.manual_seed(0)
    model, *rest = make_model()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.4, generator=generator)
    return model.eval(), *rest


@pytest.fixture(scope="module")
def images():
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    return [Image.fromarray(noise), Image.new("RGB", (16, 16)), Image.new("RGB", (9, 33), (255, 80, 0))]


@pytest.fixture(params=CAPTIONERS)
def captioner(request):
    model, processor = make(CAPTIONERS[request.param])
    return pipeline("image-to-text", model=model, processor=processor, device="cpu")


@pytest.fixture
def blip():
    model, processor = make(make_blip)
    return pipeline("image-to-text", model=model, processor=processor, device="cpu")


def oracle(name, image, prompt):
    """The five new words, from the model and the processor themselves."""
    model, processor = make(CAPTIONERS[name])
    text = {} if prompt is None or name == "git" else {"text": prompt}
    inputs = processor(images=image, return_tensors="pt", **text)
    if name == "git" and prompt is not None:
        inputs["input_ids"] = processor.tokenizer(prompt, return_tensors="pt").input_ids[:, :-1]
    if name.startswith("blip-2") and prompt is None:
        inputs["input_ids"] = torch.tensor([[IMAGE_TOKEN] * 3 + [processor.tokenizer.eos_token_id]])
    return processor.tokenizer.decode(model.generate(**inputs, **FIVE_WORDS)[0, -5:])


# --- image-to-text ---


@pytest.mark.parametrize("prompt", [None, "a photo of"])
@pytest.mark.parametrize("name", CAPTIONERS)
def test_caption_is_the_new_text(name, prompt, images):
    model, processor = make(CAPTIONERS[name])
    captioner = pipeline("image-to-text", model=model, processor=processor, device="cpu")
    assert type(captioner) is ImageToTextPipeline
    expected = oracle(name, images[0], prompt)
    assert len(expected.split()) == 5
    assert captioner(images[0], prompt=prompt, **FIVE_WORDS) == [{"generated_text": expected}]


def test_caption_depends_on_image_and_prompt(captioner, images):
    captions = [captioner(image, **FIVE_WORDS)[0]["generated_text"] for image in images]
    assert len(set(captions)) > 1
    assert captioner(images[0], prompt="how many", **FIVE_WORDS)[0]["generated_text"] != captions[0]


@pytest.mark.parametrize("prompt", [None, "a photo of"])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_list_gives_a_list_each_as_alone(captioner, images, batch_size, prompt):
    alone = [captioner(image, prompt=prompt, **FIVE_WORDS) for image in images]
    assert captioner(images, prompt=prompt, **FIVE_WORDS, batch_size=batch_size) == alone


@pytest.mark.parametrize("batch_size", [1, 2])
def test_several_captions_an_image(captioner, images, batch_size):
    options = {"num_beams": 3, "num_return_sequences": 3}
    captions = captioner(images, **FIVE_WORDS, generate_kwargs=options, batch_size=batch_size)
    assert [len(caption) for caption in captions] == [3, 3, 3]
    best = [captioner(image, **FIVE_WORDS, generate_kwargs={"num_beams": 3})[0] for image in images]
    assert [caption[0] for caption in captions] == best


def test_inputs_of_every_kind(blip, images, tmp_path):
    image = images[0]
    expected = blip(image, **FIVE_WORDS)
    path = tmp_path / "image.png"
    image.save(path)
    with path.open("rb") as file:
        for same in [str(path), path, path.read_bytes(), np.asarray(image), torch.tensor(np.asarray(image)), file]:
            assert blip(same, **FIVE_WORDS) == expected
    assert blip(images=image, **FIVE_WORDS) == expected
    assert blip(inputs=image, **FIVE_WORDS) == expected
    assert blip([str(path)], **FIVE_WORDS) == [expected]
    assert blip((image, image), **FIVE_WORDS) == [expected] * 2
    assert blip([], **FIVE_WORDS) == []


def test_rgba_is_captioned_as_seen_on_white(blip):
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert blip(clear, **FIVE_WORDS) == blip(Image.new("RGB", (16, 16), "white"), **FIVE_WORDS)


def test_generator_streams(blip, images):
    taken = []

    def stream():
        for image in images:
            taken.append(image)
            yield image

    results = blip(stream(), **FIVE_WORDS)
    first = next(iter(results))
    assert len(taken) < len(images)
    assert first == blip(images[0], **FIVE_WORDS)
    assert list(blip(stream(), **FIVE_WORDS)) == blip(images, **FIVE_WORDS)
    assert list(blip(iter(images), **FIVE_WORDS)) == blip(images, **FIVE_WORDS)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_key_dataset_streams(blip, images, batch_size):
    rows = KeyDataset([{"image": image} for image in images], "image")
    results = blip(rows, batch_size=batch_size, **FIVE_WORDS)
    assert not isinstance(results, list)
    assert list(results) == blip(images, **FIVE_WORDS)


def test_torch_iterable_dataset_streams(blip, images):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(images)

    assert list(blip(Stream(), **FIVE_WORDS)) == blip(images, **FIVE_WORDS)


def test_broken_image_is_named_with_its_place(blip, images, tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"no picture")
    with pytest.raises(ImageLoadError, match=r"^image 2 of 3 \('.*broken\.jpg'\)"):
        blip([images[0], path, images[1]], batch_size=3)
    with pytest.raises(ImageLoadError, match=r"^image 3 \('.*broken\.jpg'\)"):
        list(blip(iter([*images[:2], path]), max_new_tokens=2))
    with pytest.raises(ImageLoadError, match=r"^'.*broken\.jpg'"):
        blip(str(path))


def test_generate_arguments_reach_generate(blip, images, monkeypatch):
    seen = {}
    generate = blip.model.generate

    def spy(*args, **kwargs):
        seen.update(kwargs)
        return generate(*args, **kwargs)

    monkeypatch.setattr(blip.model, "generate", spy)
    blip(images[0], max_new_tokens=3, generate_kwargs={"num_beams": 2}, do_sample=True)
    assert (seen["max_new_tokens"], seen["num_beams"], seen["do_sample"]) == (3, 2, True)
    with pytest.raises(ValueError, match="max_new_tokens"):
        blip(images[0], max_new_tokens=3, generate_kwargs={"max_new_tokens": 4})


def length_limits(pipe, **call_kwargs):
    params = pipe._with_default_length(call_kwargs)
    config = params.pop("generation_config", None)
    return {**({} if config is None else config.to_diff_dict()), **params}


def test_default_length_is_256_and_yields_to_any_limit(blip):
    blip = copy.copy(blip)
    blip.model = copy.deepcopy(blip.model)
    assert length_limits(blip)["max_new_tokens"] == 256
    assert length_limits(blip, max_new_tokens=3)["max_new_tokens"] == 3
    assert "max_new_tokens" not in length_limits(blip, max_length=9)
    config = transformers.GenerationConfig(max_new_tokens=7, num_beams=2)
    limits = length_limits(blip, generation_config=config)
    assert (limits["max_new_tokens"], limits["num_beams"]) == (7, 2)
    assert length_limits(blip, generation_config=transformers.GenerationConfig(num_beams=2))["max_new_tokens"] == 256
    blip.model.generation_config.max_length = 33
    assert "max_new_tokens" not in length_limits(blip)


def test_generation_config_of_the_model_and_of_the_call(images):
    model, processor = make(make_blip)
    expected = pipeline("image-to-text", model=model, processor=processor)(images[0], max_new_tokens=4)
    at_init = pipeline("image-to-text", model=model, processor=processor, max_new_tokens=4)
    assert at_init(images[0]) == expected
    assert at_init(images[0], max_new_tokens=2) != expected
    config = transformers.GenerationConfig(max_new_tokens=4)
    assert at_init(images[0], max_new_tokens=None, generation_config=config) == expected


def test_wrong_calls_are_refused(blip, images):
    for arguments in [{}, {"inputs": images[0], "images": images[0]}]:
        with pytest.raises(ValueError, match="Cannot call"):
            blip(**arguments)
    with pytest.raises(ValueError, match="prompt"):
        blip(images[0], prompt=["a", "b"])
    with pytest.raises(ValueError, match="promt"):
        blip(images[0], promt="a photo of")
    model, processor = make(make_vilt)
    with pytest.raises(ValueError, match="cannot generate"):
        pipeline("image-to-text", model=model, processor=processor)
    with pytest.raises(ValueError, match="pass processor="):
        pipeline("image-to-text", model=blip.model)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_vision_encoder_decoder(images, batch_size):
    model, tokenizer, image_processor = make(make_vision_encoder_decoder)
    captioner = pipeline("image-to-text", model=model, tokenizer=tokenizer, image_processor=image_processor)
    pixels = image_processor(images=images, return_tensors="pt").pixel_values
    expected = tokenizer.batch_decode(model.generate(pixels, **FIVE_WORDS)[:, 1:], skip_special_tokens=True)
    captions = captioner(images, **FIVE_WORDS, batch_size=batch_size)
    assert captions == [[{"generated_text": text.strip()}] for text in expected]
    with pytest.raises(ValueError, match="does not support conditional text generation"):
        captioner(images[0], prompt="a photo of")


def test_parts_are_put_together(images):
    for make_model in CAPTIONERS.values():
        model, processor = make(make_model)
        whole = pipeline("image-to-text", model=model, processor=processor)
        parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
        assembled = pipeline("image-to-text", model=model, **parts)
        assert type(assembled.processor) is type(processor)
        for prompt in (None, "a photo of"):
            expected = whole(images[0], prompt=prompt, **FIVE_WORDS)
            assert assembled(images[0], prompt=prompt, **FIVE_WORDS) == expected


def test_old_blip2_processor_that_has_no_number_of_queries(images):
    model, processor = make(make_blip2_of_transformers)
    old = transformers.Blip2Processor(processor.image_processor, processor.tokenizer)
    assert old.num_query_tokens is None
    captions = [
        pipeline("image-to-text", model=model, processor=p)(images, prompt="the", **FIVE_WORDS)
        for p in (old, processor)
    ]
    assert captions[0] == captions[1]
    assert len({caption[0]["generated_text"] for caption in captions[0]}) > 1  # the images are seen


def test_half_precision(images):
    model, processor = make(make_blip)
    captioner = pipeline("image-to-text", model=copy.deepcopy(model).bfloat16(), processor=processor)
    assert captioner(images[0], **FIVE_WORDS)[0]["generated_text"]


@pytest.mark.parametrize("name", CAPTIONERS)
def test_from_a_folder_and_back(name, images, tmp_path):
    model, processor = make(CAPTIONERS[name])
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    expected = pipeline("image-to-text", model=model, processor=processor)(images, **FIVE_WORDS)
    captioner = pipeline("image-to-text", model=str(tmp_path / "model"))
    assert type(captioner.model) is type(model) and type(captioner.processor) is type(processor)
    assert captioner(images, **FIVE_WORDS) == expected
    captioner.save_pretrained(tmp_path / "pipeline")
    assert pipeline("image-to-text", model=str(tmp_path / "pipeline"))(images, **FIVE_WORDS) == expected


def test_vision_encoder_decoder_from_a_folder(images, tmp_path):
    model, tokenizer, image_processor = make(make_vision_encoder_decoder)
    captioner = pipeline("image-to-text", model=model, tokenizer=tokenizer, image_processor=image_processor)
    captioner.save_pretrained(tmp_path)
    again = pipeline("image-to-text", model=str(tmp_path))
    assert again(images, **FIVE_WORDS) == captioner(images, **FIVE_WORDS)


# --- visual-question-answering ---


@pytest.fixture
def blip2_oracle():
    model, processor = make(make_blip2)
    return pipeline("visual-question-answering", model=model, processor=processor, device="cpu", **FIVE_WORDS)


@contextlib.contextmanager
def prompts_of(pipe):
    """The prompts that the pipeline's model is asked with, placeholders and special tokens removed."""
    prompts = []
    generate = pipe.model.generate

    def spy(*args, input_ids, **kwargs):
        prompts.extend(pipe.tokenizer.batch_decode(input_ids, skip_special_tokens=True))
        return generate(*args, input_ids=input_ids, **kwargs)

    pipe.model.generate = spy
    yield prompts
    del pipe.model.generate


PAPER_PROMPTS = {
    "blip2 opt": "question : how many cat ? answer :",
    "blip2 t5": "question : how many cat ? short answer :",
    "blip-2 opt": "question : how many cat ? answer :",
    "blip-2 t5": "question : how many cat ? short answer :",
}


@pytest.mark.parametrize("name", ANSWERERS)
def test_question_is_asked_as_the_model_expects(name, images):
    model, processor = make(ANSWERERS[name])
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    pipe = pipeline("visual-question-answering", model=model, processor=processor, **FIVE_WORDS)
    assert type(pipe) is VisualQuestionAnsweringPipeline
    with prompts_of(pipe) as prompts:
        answer = pipe(images[0], "how many cat ?")
        pipe(images[0], "how many cat ?", prompt_template="is {} the answer")
        pipe(images[0], "how many cat ?", prompt_template="{}")
    expected = PAPER_PROMPTS.get(name, "how many cat ?")
    assert prompts == [expected, "is how many cat ? the answer", "how many cat ?"]
    assert [list(entry) for entry in answer] == [["answer"]]
    assert len(answer[0]["answer"].split()) == 5


def test_what_was_learned_behind_a_prompt_is_asked_with_it(images, tmp_path):
    model, shared = make(make_blip2)
    processor = copy.copy(shared)  # because other tests know no prompt
    processor.prompt = "a photo of two"
    processor.save_pretrained(tmp_path)
    for prompt, text in ((None, "a photo of two"), ("the cat", "the cat"), ("", "")):
        pipe = pipeline("image-to-text", model=model, processor=Blip2Processor.from_pretrained(tmp_path), **FIVE_WORDS)
        with prompts_of(pipe) as prompts:
            pipe(images[0], prompt=prompt)
        assert prompts == [text]
    # One of captions is none of questions, and the other way round
    processor.prompt = "is {} the answer"
    oracle = pipeline("visual-question-answering", model=model, processor=processor, **FIVE_WORDS)
    with prompts_of(oracle) as prompts:
        oracle(images[0], "how many cat ?")
        pipeline("image-to-text", model=model, processor=processor, **FIVE_WORDS)(images[0])
    assert prompts == ["is how many cat ? the answer", ""]


def test_template_without_a_place_is_refused(blip2_oracle, images):
    with pytest.raises(ValueError, match="prompt_template"):
        blip2_oracle(images[0], "how many ?", prompt_template="answer:")


def test_images_and_questions_are_broadcast(blip2_oracle, images, tmp_path):
    questions = ["how many cat ?", "what colour is the red dog on the photo ?"]
    answers = {
        (i, question): blip2_oracle(image=image, question=question)
        for i, image in enumerate(images)
        for question in questions
    }
    assert len({answer[0]["answer"] for answer in answers.values()}) > 1
    assert blip2_oracle(images, questions[0]) == [answers[i, questions[0]] for i in range(3)]
    assert blip2_oracle(images[0], questions) == [answers[0, question] for question in questions]
    every_pair = [answers[i, question] for question in questions for i in range(3)]
    assert blip2_oracle(images, questions) == every_pair
    assert blip2_oracle([images[0]], questions[0]) == [answers[0, questions[0]]]
    records = [{"image": image, "question": question} for question in questions for image in images]
    assert blip2_oracle(records[0]) == every_pair[0]
    assert blip2_oracle(records) == every_pair
    assert list(blip2_oracle(record for record in records)) == every_pair
    rows = KeyDataset([{"image": image} for image in images], "image")
    assert blip2_oracle(rows, questions[1]) == [answers[i, questions[1]] for i in range(3)]
    assert blip2_oracle(rows, questions) == every_pair
    assert list(blip2_oracle(iter(images), questions[0])) == [answers[i, questions[0]] for i in range(3)]


@pytest.mark.parametrize("name", ANSWERERS)
@pytest.mark.parametrize("batch_size", [2, 3])
def test_answer_in_a_batch_is_the_answer_alone(name, batch_size, images):
    model, processor = make(ANSWERERS[name])
    pipe = pipeline("visual-question-answering", model=model, processor=processor, **FIVE_WORDS)
    questions = ["how many ?", "what colour is the red dog on the photo ?", "is the cat in the photo ?"]
    alone = [pipe(image, question) for question in questions for image in images]
    assert len({answer[0]["answer"] for answer in alone}) > 1
    assert pipe(images, questions, batch_size=batch_size) == alone


def test_known_answers_have_scores(images):
    model, processor = make(make_vilt)
    pipe = pipeline("visual-question-answering", model=model, processor=processor, device="cpu")
    with torch.no_grad():
        logits = model(**processor(images=images[0], text="how many cat ?", return_tensors="pt")).logits
    scores = logits.sigmoid()[0]
    answers = pipe(images[0], "how many cat ?")
    best = scores.argsort(descending=True).tolist()
    assert [answer["answer"] for answer in answers] == [model.config.id2label[index] for index in best]
    assert [answer["score"] for answer in answers] == pytest.approx(scores.sort().values.tolist()[::-1], abs=1e-5)
    two = pipe(images[0], "how many cat ?", top_k=2)
    assert [answer["answer"] for answer in two] == [answer["answer"] for answer in answers[:2]]
    assert len(pipe(images[0], "how many cat ?", top_k=99)) == len(answers) == 4
    with pytest.raises(TypeError, match="max_new_tokens"):
        pipe(images[0], "how many cat ?", max_new_tokens=3)


def test_known_answers_in_a_batch(images):
    model, processor = make(make_vilt)
    pipe = pipeline("visual-question-answering", model=model, processor=processor, device="cpu")
    questions = ["how many ?", "what colour is the dog ?"]
    alone = [pipe(image, question) for question in questions for image in images[:2]]
    together = pipe(images[:2], questions, batch_size=4)
    assert [answers[0]["answer"] for answers in together] == [answers[0]["answer"] for answers in alone]
    for few, many in zip(alone, together, strict=True):
        assert [answer["score"] for answer in many] == pytest.approx([answer["score"] for answer in few], abs=1e-4)


@pytest.mark.parametrize("name", ["blip2 opt", "blip2 t5"])
@pytest.mark.parametrize("normalization", [None, "relative"])
def test_candidates_have_scores_that_sum_to_1(name, normalization, images):
    model, processor = make(ANSWERERS[name])
    pipe = pipeline("visual-question-answering", model=model, processor=processor, device="cpu")
    questions, candidates = ["how many ?", "what colour is the red dog on the photo ?"], ["two", "a red dog", "cat"]
    options = {"candidates": candidates} | ({} if normalization is None else {"normalization": normalization})
    together = pipe(images[:2], questions, batch_size=3, **options)
    alone = [pipe(image, question, **options) for question in questions for image in images[:2]]
    for few, many in zip(alone, together, strict=True):
        assert [answer["answer"] for answer in many] == [answer["answer"] for answer in few]
        assert [answer["score"] for answer in many] == pytest.approx([answer["score"] for answer in few], abs=1e-4)
        assert sum(answer["score"] for answer in few) == pytest.approx(1)
        assert {answer["answer"] for answer in few} == {*candidates}
    prompt = "Question: how many ? Short answer:" if "t5" in name else "Question: how many ? Answer:"
    inputs = processor(images=images[0], text=prompt, candidates=candidates, return_tensors="pt")
    scores = model.score_texts(**inputs, normalization=normalization or "sum")[0].softmax(dim=0)
    assert {answer["answer"]: answer["score"] for answer in alone[0]} == pytest.approx(
        dict(zip(candidates, scores.tolist(), strict=True)), abs=1e-5
    )
    assert pipe(images[0], questions[0], top_k=1, **options) == alone[0][:1]
    fixed = pipeline("visual-question-answering", model=model, processor=processor, device="cpu", **options)
    assert fixed(images[0], questions[0]) == alone[0]
    writer = pipeline("visual-question-answering", model=model, processor=processor, device="cpu", **FIVE_WORDS)
    assert writer(images[0], questions[0], **options) == alone[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": "two"}, "a list of at least two different texts"),
        ({"candidates": ["two", "two"]}, "a list of at least two different texts"),
        ({"candidates": ["two"]}, "a list of at least two different texts"),
        ({"candidates": {"two", "one"}}, "a list of at least two different texts"),
        ({"candidates": [["two"], ["one"]]}, "a list of at least two different texts"),
        ({"candidates": ["two"], "max_new_tokens": 3}, r"\['max_new_tokens'\] have no effect"),
        ({"candidates": ["two"], "preset": "vqa"}, r"\['preset'\] have no effect"),
        ({"candidates": ["two"], "generate_kwargs": {"num_beams": 2}}, r"\['num_beams'\] have no effect"),
        ({"normalization": "mean"}, "were not given"),
        ({"candidates": ["two", "one"], "normalization": "max"}, "one of sum, mean, relative"),
    ],
)
def test_candidates_that_do_not_fit(options, message, images):
    model, processor = make(make_blip2)
    pipe = pipeline("visual-question-answering", model=model, processor=processor, device="cpu")
    with pytest.raises(ValueError, match=message):
        pipe(images[0], "how many ?", **options)


def test_other_models_have_no_candidates(images):
    model, processor = make(make_vilt)
    pipe = pipeline("visual-question-answering", model=model, processor=processor, device="cpu")
    with pytest.raises(ValueError, match="scores no candidates"):
        pipe(images[0], "how many ?", candidates=["two"])


def test_a_blip2_of_transformers_has_no_candidates(images):
    model, processor = make(make_blip2_of_transformers)
    pipe = pipeline("visual-question-answering", model=model, processor=processor, device="cpu")
    with pytest.raises(ValueError, match=r"of transformers scores no candidates: give .* of blip2_hf"):
        pipe(images[0], "how many ?", candidates=["two", "one"])


def test_wrong_questions_are_refused(blip2_oracle, images):
    with pytest.raises(ValueError, match="needs an image and a question, got Image"):
        blip2_oracle(images[0])
    with pytest.raises(ValueError, match=r"image 2 of 2.*\['image'\]"):
        blip2_oracle([{"image": images[0], "question": "how many ?"}, {"image": images[0]}])
    for question in (3, ["how many ?", None]):
        with pytest.raises(ValueError, match="a string or a list of strings"):
            blip2_oracle(images[0], question)
    with pytest.raises(ValueError, match="question is 3; a string was expected"):
        blip2_oracle({"image": images[0], "question": 3})
    with pytest.raises(ValueError, match="one question"):
        blip2_oracle(iter(images), ["how many ?", "what ?"])
    with pytest.raises(ValueError, match="without an image"):
        blip2_oracle(question="how many ?")
    with pytest.raises(ImageLoadError, match=r"^image 3 of 3 \('missing.jpg'\)"):
        blip2_oracle([*images[:2], "missing.jpg"], ["how many ?", "what ?"])


def test_question_answering_from_a_folder(images, tmp_path):
    for name, make_model in {"vilt": make_vilt, **ANSWERERS}.items():
        model, processor = make(make_model)
        options = FIVE_WORDS if model.can_generate() else {}
        pipe = pipeline("visual-question-answering", model=model, processor=processor)
        pipe.save_pretrained(tmp_path / name)
        again = pipeline("visual-question-answering", model=str(tmp_path / name))
        assert type(again.model) is type(model)
        expected = pipe(images[0], "how many ?", **options)
        answers = again(images[0], "how many ?", **options)
        assert [answer["answer"] for answer in answers] == [answer["answer"] for answer in expected]


# --- transformers' own pipelines with our model ---


def test_image_text_to_text_of_our_model(images, tmp_path):
    model, processor = make(make_blip2)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pipe = pipeline("image-text-to-text", model=str(tmp_path))
    assert type(pipe.model) is type(model) and type(pipe.processor) is type(processor)
    words = oracle("blip2 opt", images[0], "a photo of")
    results = pipe(images[0], text="a photo of", generate_kwargs=dict(FIVE_WORDS))
    assert results == [{"input_text": "a photo of", "generated_text": f"a photo of {words}"}]
    new = pipe(images[0], text="a photo of", generate_kwargs=dict(FIVE_WORDS), return_full_text=False)
    assert new[0]["generated_text"].strip() == words


def test_image_text_to_text_answers_messages_without_a_template_of_the_language_model(images, tmp_path):
    model, processor = make(make_blip2)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pipe = pipeline("image-text-to-text", model=str(tmp_path))
    content = [{"type": "text", "text": "how many?"}, {"type": "image", "image": images[0]}]
    options = {"generate_kwargs": dict(FIVE_WORDS), "return_full_text": False}
    answer = pipe(text=[{"role": "user", "content": content}], **options)[0]["generated_text"]
    inputs = processor(images[0], "Question: how many? Answer:", return_tensors="pt")
    expected = pipe.model.generate(**inputs, **FIVE_WORDS)
    assert answer.split() == processor.post_process_image_text_to_text(expected, inputs["input_ids"])[0].split()


def test_image_feature_extraction_of_our_model(images, tmp_path):
    model, processor = make(make_blip2)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pipe = pipeline("image-feature-extraction", model=str(tmp_path))
    features = pipe(images[0], return_tensors=True)
    pixel_values = pipe.image_processor(images=images[0], return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = transformers.AutoModel.from_pretrained(tmp_path)(pixel_values=pixel_values)[0]
    assert features.shape == (1, 3, 16)  # the queries
    torch.testing.assert_close(features, expected)


# --- the registry ---


def run_python(code, *arguments, **environment):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("first", ["from transformers import pipelines", "from blip2_hf import ImageToTextPipeline"])
def test_import_adds_the_two_tasks_and_changes_no_other(first):
    out = run_python(
        """
        import json, sys
        exec(sys.argv[1])
        from transformers import pipelines

        before = dict(pipelines.SUPPORTED_TASKS)
        aliases, exported = dict(pipelines.TASK_ALIASES), pipelines.ImageTextToTextPipeline
        import blip2_hf
        after = pipelines.SUPPORTED_TASKS
        theirs = set(before) - {"zero-shot-image-classification"}
        assert all(after[task] is before[task] for task in theirs)
        impl = after["zero-shot-image-classification"]["impl"]
        assert issubclass(impl, pipelines.ZeroShotImageClassificationPipeline)
        assert pipelines.TASK_ALIASES == aliases and pipelines.ImageTextToTextPipeline is exported
        for task in ("image-to-text", "visual-question-answering"):
            name, entry, _ = pipelines.check_task(task)
            assert name == task and entry["impl"].__module__ == "blip2_hf.models.pipeline_blip2"
        impl = pipelines.check_task("image-text-to-text")[1]["impl"]
        assert "transformers.pipelines.image_text_to_text" in str(impl), impl
        print(json.dumps([sorted(before), sorted(set(after) - set(before))]))
        """,
        first,
    )
    before, added = json.loads(out)
    assert sorted(before + added) == sorted(transformers_pipelines.SUPPORTED_TASKS)
    both = ["image-to-text", "visual-question-answering"]
    assert added == (both if "transformers" in first else [])


def test_registering_twice_changes_nothing():
    tasks = dict(transformers_pipelines.SUPPORTED_TASKS)
    check_task = transformers_pipelines.check_task
    resolve = getattr(transformers_pipelines, "_resolve_deprecated_task", None)
    register_pipelines()
    assert tasks == transformers_pipelines.SUPPORTED_TASKS
    assert all(transformers_pipelines.SUPPORTED_TASKS[task] is entry for task, entry in tasks.items())
    assert transformers_pipelines.check_task is check_task
    assert getattr(transformers_pipelines, "_resolve_deprecated_task", None) is resolve


def test_other_tasks_that_transformers_removed_stay_removed():
    for task in ("summarization", "translation_en_to_de", "image-to-image", "no-such-task"):
        with pytest.raises(KeyError):
            transformers_pipelines.check_task(task)


def test_image_text_to_text_is_as_before(images):
    model, processor = make(make_git)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    assert type(pipe) is transformers.ImageTextToTextPipeline
    result = pipe(images[0], text="a photo of", **FIVE_WORDS)
    assert result[0]["input_text"] == "a photo of"
    assert result[0]["generated_text"].startswith("a photo of")
    with pytest.raises(ValueError, match="text"):
        pipe(images[0])


def test_pipeline_class_works_for_a_task_of_transformers(images):
    model, processor = make(make_blip2)
    arguments = {"model": model, "processor": processor, **FIVE_WORDS}
    pipe = pipeline("image-text-to-text", pipeline_class=VisualQuestionAnsweringPipeline, **arguments)
    picture = images[0]
    assert pipe(picture, "how many ?") == VisualQuestionAnsweringPipeline(**arguments)(picture, "how many ?")


# --- remote code ---


def save_with_code(pipe, folder, monkeypatch):
    """What someone does who uploads a pipeline, with the code of our classes, for people without this package."""
    for part in (pipe.model.config, pipe.model, pipe.processor, pipe):
        part_class = type(part)
        if part_class.__module__.startswith("blip2_hf"):
            name = "_registered_impl" if part is pipe else "_auto_class"
            monkeypatch.setattr(part_class, name, None, raising=False)
            part_class.register_for_auto_class(*(["AutoModelForImageTextToText"] if part is pipe.model else []))
    pipe.save_pretrained(folder)
    monkeypatch.undo()


def test_saved_pipelines_run_without_this_package(images, tmp_path, monkeypatch):
    images[0].save(tmp_path / "image.png")
    tasks = {"git": "image-to-text", "git answers": "visual-question-answering", "blip2": "image-to-text"}
    expected = {}
    for name, task in tasks.items():
        model, processor = make(make_blip2 if name == "blip2" else make_git)
        pipe = pipeline(task, model=copy.deepcopy(model), processor=processor, **FIVE_WORDS)
        pipe.save_pretrained(tmp_path / "plain")
        assert not list((tmp_path / "plain").glob("*.py"))
        save_with_code(pipe, tmp_path / name, monkeypatch)
        expected[name] = pipe(images[0], **({"question": "how many ?"} if "question" in task else {}))
    out = run_python(
        """
        import json, os, sys
        sys.modules["blip2_hf"] = None  # cannot be imported
        from transformers import pipeline

        folder, tasks, options = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
        answers = {}
        for name, task in tasks.items():
            pipe = pipeline(task, model=os.path.join(folder, name), trust_remote_code=True, **options)
            for part in [pipe, pipe.model, pipe.processor] if name == "blip2" else [pipe]:
                assert type(part).__module__.startswith("transformers_modules"), type(part)
            question = {"question": "how many ?"} if "question" in task else {}
            answers[name] = pipe(os.path.join(folder, "image.png"), **question)
        print(json.dumps(answers))
        """,
        tmp_path,
        json.dumps(tasks),
        json.dumps(FIVE_WORDS),
        HF_MODULES_CACHE=str(tmp_path / "modules"),
    )
    assert json.loads(out.splitlines()[-1]) == expected


# --- the paper's settings by name ---


def generate_arguments(pipe, *args, **kwargs) -> dict:
    seen = {}
    generate = pipe.model.generate

    def spy(**arguments):
        seen.update(arguments)
        return generate(**arguments)

    with mock.patch.object(pipe.model, "generate", spy):
        pipe(*args, **kwargs)
    seen["prompt"] = pipe.tokenizer.decode(seen["input_ids"][0], skip_special_tokens=True)
    return seen


@pytest.mark.parametrize("make_model", [make_blip2, make_blip2_t5])
def test_presets(make_model, images):
    model, processor = make(make_model)
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    captioner = pipeline("image-to-text", model=model, processor=processor)
    seen = generate_arguments(captioner, images[0], preset="caption", max_new_tokens=8)
    assert (seen["prompt"], seen["num_beams"], seen["max_new_tokens"]) == ("a photo of", 5, 8)
    seen = generate_arguments(captioner, images[0], preset="caption", prompt="a", generate_kwargs={"num_beams": 2})
    assert (seen["prompt"], seen["num_beams"], seen["max_new_tokens"]) == ("a", 2, 30)
    answerer = pipeline("visual-question-answering", model=model, processor=processor, preset="vqa")
    seen = generate_arguments(answerer, images[0], "how many cat ?", num_beams=3)
    short = " short" if make_model is make_blip2_t5 else ""
    assert seen["prompt"] == f"question : how many cat ?{short} answer :"
    assert (seen["num_beams"], seen["length_penalty"], seen["max_new_tokens"]) == (3, -1.0, 10)


def test_a_preset_under_fewer_tokens_than_it_asks_for(images):
    model, processor = make(make_blip2)
    captioner = pipeline("image-to-text", model=model, processor=processor)
    for options in ({"max_new_tokens": 4}, {"generate_kwargs": {"max_new_tokens": 4}}):
        seen = generate_arguments(captioner, images[0], preset="caption", num_beams=1, **options)
        assert (seen["min_new_tokens"], seen["max_new_tokens"]) == (4, 4)
    seen = generate_arguments(captioner, images[0], preset="caption", num_beams=1, max_new_tokens=9)
    assert (seen["min_new_tokens"], seen["max_new_tokens"]) == (7, 9)
    seen = generate_arguments(captioner, images[0], preset="caption", num_beams=1, max_new_tokens=9, min_new_tokens=1)
    assert (seen["min_new_tokens"], seen["max_new_tokens"]) == (1, 9)


def test_presets_of_ones_own(images):
    model, processor = make(make_blip2)
    short = replace(generation_preset("caption", model.config), prompt="a", generate_kwargs={"max_new_tokens": 3})
    captioner = pipeline("image-to-text", model=model, processor=processor)
    seen = generate_arguments(captioner, images[0], preset=short)
    assert (seen["prompt"], seen["max_new_tokens"]) == ("a", 3) and "num_beams" not in seen
    answerer = pipeline("visual-question-answering", model=model, processor=processor)
    question = replace(short, name="mine", prompt="how {}")
    assert generate_arguments(answerer, images[0], "many", preset=question)["prompt"] == "how many"
    with pytest.raises(ValueError, match="'mine' asks a question"):
        captioner(images[0], preset=question)


def test_presets_that_do_not_fit(blip, images):
    model, processor = make(make_blip2)
    captioner = pipeline("image-to-text", model=model, processor=processor)
    with pytest.raises(ValueError, match="'vqa' asks a question.*image-to-text"):
        captioner(images[0], preset="vqa")
    with pytest.raises(ValueError, match="no preset 'coco'"):
        captioner(images[0], preset="coco")
