"""Samples of benchmarks, models to evaluate, and what an evaluation of one picture at a time gives."""

import json
from dataclasses import replace

from stage1 import make_retrieval
from tiny import CAPTIONS, make_image, make_image_processor, make_tokenizer

from blip2_hf import Blip2Processor
from blip2_hf.evaluation.samples import CaptionSample, QuestionSample
from blip2_hf.models.generation_presets import generation_preset


QUESTIONS = ["What is this?", "What colour is the bus?", "How many people are near the street, and where?"]


def caption_samples(count=5):
    return [
        CaptionSample(make_image(i), 100 + i, [CAPTIONS[i], "a photo"], ("in-domain", "near-domain")[i % 2])
        for i in range(count)
    ]


def question_samples():
    """Return two questions about each picture, which do not lie together."""
    pictures = [make_image(i) for i in range(3)]
    return [
        QuestionSample(pictures[i % 3], i % 3, 70 + i, QUESTIONS[i % 2], ["bus"] * 10, ("other", "number")[i % 2])
        for i in range(6)
    ]


def fast_preset(name, model):
    """Return the paper's, but for the time it takes."""
    preset = generation_preset(name, model.config)
    fast = {"num_beams": 2, "max_new_tokens": 5, "min_new_tokens": 0}
    return replace(preset, generate_kwargs=preset.generate_kwargs | fast)


def one_by_one(model, processor, samples, prompts, preset):
    texts = []
    for sample, prompt in zip(samples, prompts, strict=True):
        inputs = processor(images=sample.image, text=prompt, return_tensors="pt")
        tokens = model.generate(**inputs, **preset.generate_kwargs)
        texts += processor.post_process_image_text_to_text(tokens, input_ids=inputs["input_ids"])
    return texts


def predictions(folder):
    return json.loads((folder / "predictions.json").read_text())


def make_retrieval_and_processor():
    return make_retrieval(), Blip2Processor(make_image_processor(), make_tokenizer(eos=True), is_encoder_decoder=False)


def command(folder, task, output, *options):
    model = folder / ("retrieval" if "retrieval" in task else "model")
    return ["evaluate", task, "--model", str(model), "--output", str(output), "--device", "cpu", *map(str, options)]
