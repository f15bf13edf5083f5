"""Where a text starts that nothing precedes: at what the tokenizer writes, by every road, in training as after it."""

import json

import pytest
import torch
from tiny import NUM_QUERIES, make_image, make_image_processor, make_model, make_tokenizer
from transformers import pipeline

from blip2_hf import Blip2ForConditionalGeneration, Blip2Processor
from blip2_hf.capfilt import ModelCaptioner
from blip2_hf.captioning import caption_images
from blip2_hf.cli import main
from blip2_hf.evaluation import CaptionSample, evaluate_captioning
from blip2_hf.models.generation_presets import GenerationPreset


GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module", params=["start token", "none"])
def folder(request, tmp_path_factory):
    """A model whose configuration names a start token, which its tokenizer writes, or does not (SmolLM2, Qwen)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(bos=request.param == "start token")
    processor = Blip2Processor(make_image_processor(), tokenizer, num_query_tokens=NUM_QUERIES)
    make_model("llama", image_token_index=processor.image_token_id).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def parts(folder):
    return Blip2ForConditionalGeneration.from_pretrained(folder), Blip2Processor.from_pretrained(folder)


@pytest.fixture
def expected(parts):
    """By forward alone, from the images and what the tokenizer writes."""
    model, processor = parts
    texts = []
    for image in (make_image(0), make_image(1)):
        pixel_values = processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
        tokens = [processor.image_token_id] * NUM_QUERIES + processor.tokenizer("")["input_ids"]
        start = len(tokens)
        while len(tokens) < start + 6 and tokens[-1] != 2:
            logits = model(pixel_values=pixel_values, input_ids=torch.tensor([tokens])).logits
            tokens.append(logits[0, -1].argmax().item())
        texts.append(processor.tokenizer.decode(tokens[start:], skip_special_tokens=True).strip())
    assert all(texts)
    return texts


def test_processor_and_generate(parts, expected):
    model, processor = parts
    images = [make_image(0), make_image(1)]
    for inputs in (
        processor(images=images, return_tensors="pt"),
        processor(images=images, text="", return_tensors="pt"),
        {**processor(text=["", ""], return_tensors="pt"), **processor.image_processor(images, return_tensors="pt")},
    ):
        assert inputs["input_ids"].dtype == inputs["attention_mask"].dtype == torch.int64
        tokens = model.generate(**inputs, **GREEDY)
        assert processor.post_process_image_text_to_text(tokens, input_ids=inputs["input_ids"]) == expected
        assert processor.post_process_image_text_to_text(tokens) == expected
        features = model.get_image_features(**inputs).pooler_output
        assert torch.equal(features, model.get_image_features(inputs["pixel_values"]).pooler_output)


def test_what_is_learned_starts_there_too(parts):
    _, processor = parts
    start = processor(images=make_image())["input_ids"][0]
    learned = processor(images=make_image(), text_target="a dog")
    assert learned["input_ids"][0][: len(start)] == start
    assert learned["labels"][0][: len(start)] == [-100] * len(start)
    assert learned["labels"][0][len(start)] != -100


def test_pipeline_and_caption_images(parts, expected):
    model, processor = parts
    images = [make_image(0), make_image(1)]
    captioner = pipeline("image-to-text", model=model, processor=processor, device="cpu")
    assert [records[0]["generated_text"] for records in captioner(images, **GREEDY)] == expected
    assert [records[0]["generated_text"] for records in captioner(images, batch_size=2, **GREEDY)] == expected
    assert [caption.text for caption in caption_images(model, processor, images, **GREEDY)] == expected


def test_proposed_captions_and_evaluation(parts, expected, tmp_path):
    model, processor = parts
    images = [make_image(0), make_image(1)]
    proposed = ModelCaptioner(model, processor, num_captions=1, **GREEDY)(images)
    assert proposed == [[text] for text in expected]
    samples = [CaptionSample(image, number, ["a dog"]) for number, image in enumerate(images)]
    evaluate_captioning(model, processor, samples, tmp_path, GenerationPreset("plain", "", GREEDY, 28))
    assert [entry["caption"] for entry in read_json(tmp_path / "predictions.json")] == expected


def test_the_command(folder, expected, tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(2):
        make_image(number).save(tmp_path / "photos" / f"{number}.png")
    arguments = ["--model", str(folder), "--device", "cpu", "--max-new-tokens", "6"]
    main(["caption", str(tmp_path / "photos"), *arguments, "--output", str(tmp_path / "captions.jsonl")])
    lines = (tmp_path / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["caption"] for line in lines] == expected


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))
