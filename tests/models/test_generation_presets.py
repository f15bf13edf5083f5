"""The paper's settings of generation, and what they come to in tokens."""

import pytest
import torch
from tiny import VOCAB_SIZE, make_config, make_model, make_pixel_values, make_processor

from blip2_hf.models.generation_presets import PRESET_NAMES, generation_preset


@pytest.mark.parametrize(
    ("name", "size", "prompt", "encoder_decoder_prompt"),
    [
        ("caption", 364, "a photo of", "a photo of"),
        ("nocaps", 364, "a photo of", "a photo of"),
        ("vqa", 224, "Question: {} Answer:", "Question: {} Short answer:"),
        ("vqa-finetuned", 490, "Question: {} Answer:", "Question: {} Answer:"),
    ],
)
def test_prompts_sizes_and_beams(name, size, prompt, encoder_decoder_prompt):
    preset = generation_preset(name, make_config("opt"))
    assert (preset.name, preset.image_size, preset.prompt) == (name, size, prompt)
    assert preset.generate_kwargs["num_beams"] == 5 and preset.generate_kwargs["do_sample"] is False
    assert generation_preset(name, make_config("t5")).prompt == encoder_decoder_prompt
    assert preset.asks == ("{}" in prompt)


def test_every_preset_is_named():
    assert PRESET_NAMES == ("caption", "nocaps", "vqa", "vqa-finetuned")
    assert generation_preset("vqa", make_config("opt")).generate_kwargs["length_penalty"] == -1
    assert generation_preset("nocaps", make_config("opt")).generate_kwargs["max_new_tokens"] == 80


def test_a_preset_is_the_callers_own():
    preset = generation_preset("vqa", make_config("opt"))
    preset.generate_kwargs["num_beams"] = 1
    assert generation_preset("vqa", make_config("opt")).generate_kwargs["num_beams"] == 5


def test_what_there_is_no_preset_for():
    with pytest.raises(ValueError, match="no preset 'vqa2'.*caption, nocaps, vqa, vqa-finetuned"):
        generation_preset("vqa2", make_config("opt"))
    with pytest.raises(ValueError, match="this model has none"):
        generation_preset("vqa", make_config(None))


@pytest.mark.parametrize("language_model", ["opt", "t5"])
@pytest.mark.parametrize("name", ["caption", "vqa"])
def test_lengths_are_those_of_new_text(language_model, name):
    model, processor = make_model(language_model), make_processor(language_model == "t5")
    preset = generation_preset(name, model.config)
    prompts = [preset.prompt.replace("{}", "what?"), preset.prompt.replace("{}", "what colour is the bus today?")]
    inputs = processor(text=prompts, return_tensors="pt")
    least = preset.generate_kwargs.get("min_new_tokens", 0)
    inputs["pixel_values"] = make_pixel_values(2)
    arguments = {**preset.generate_kwargs, "num_beams": 1}
    start = 1 if language_model == "t5" else inputs["input_ids"].shape[1]
    longest = model.generate(**inputs, **arguments, suppress_tokens=[2])
    assert longest.shape[1] - start == preset.generate_kwargs["max_new_tokens"]
    model.generation_config.update(eos_token_id=list(range(2, VOCAB_SIZE)))  # nearly every token may be the last one
    is_end = model.generate(**inputs, **arguments)[:, start:] > 1
    assert not is_end[:, :least].any() and is_end[:, least].any()


def test_the_least_length_is_that_of_lavis():
    # LAVIS gives `min_length=8` to an encoder-decoder, which counts the decoder's first token
    model, preset = make_model("t5"), generation_preset("caption", make_config("t5"))
    model.generation_config.update(eos_token_id=list(range(2, VOCAB_SIZE)))
    inputs = make_processor(True)(text=[preset.prompt] * 3, return_tensors="pt")
    inputs["pixel_values"] = make_pixel_values(3)
    arguments = {**preset.generate_kwargs, "num_beams": 1}
    tokens = model.generate(**inputs, **arguments)
    del arguments["min_new_tokens"]
    assert torch.equal(model.generate(**inputs, **arguments, min_length=8), tokens)
    assert not torch.equal(model.generate(**inputs, **arguments, min_length=9), tokens)
