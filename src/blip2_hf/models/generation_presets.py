"""The paper's settings of generation, by name: prompt, limits, search, and the size of the images."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class GenerationPreset:
    r"""
    Settings of generation.

    Args:
        name (`str`):
            Name of the preset.
        prompt (`str`):
            Text that the model continues, with `{}` in the place of a question.
        generate_kwargs (`dict`):
            Arguments of `generate`. Lengths count new text alone, for any language model.
        image_size (`int`):
            Side of the paper's images, in pixels. The size in a checkpoint's own image processor, with which the model
            was trained, takes precedence.
    """

    name: str
    prompt: str
    generate_kwargs: dict[str, Any]
    image_size: int

    @property
    def asks(self) -> bool:
        """Return whether the prompt asks a question."""
        return "{}" in self.prompt


# Beams and prompts are the paper's (section 4 and appendix). Lengths are those of LAVIS, because the paper gives none.
# LAVIS's `min_len` and `max_len` count a start token: its `min_len=8` is 7 tokens of text, and its `min_len=1` none.
_BEAM_SEARCH = {"num_beams": 5, "do_sample": False, "length_penalty": 1.0, "repetition_penalty": 1.0}
_PRESETS = {
    preset.name: preset
    for preset in (
        GenerationPreset("caption", "a photo of", _BEAM_SEARCH | {"max_new_tokens": 30, "min_new_tokens": 7}, 364),
        GenerationPreset("nocaps", "a photo of", _BEAM_SEARCH | {"max_new_tokens": 80, "min_new_tokens": 9}, 364),
        GenerationPreset(
            "vqa", "Question: {} Answer:", _BEAM_SEARCH | {"length_penalty": -1.0, "max_new_tokens": 10}, 224
        ),
        GenerationPreset("vqa-finetuned", "Question: {} Answer:", _BEAM_SEARCH | {"max_new_tokens": 10}, 490),
    )
}
_ENCODER_DECODER_PROMPTS = {"vqa": "Question: {} Short answer:"}

PRESET_NAMES = tuple(_PRESETS)
# How texts of different lengths compare in `score_texts`
NORMALIZATIONS = ("sum", "mean", "relative")


def generation_preset(name: str, model_config: Any) -> GenerationPreset:
    r"""
    Return the paper's settings for a model.

    Args:
        name (`str`):
            `"caption"` (COCO), `"nocaps"`, `"vqa"` (zero-shot) or `"vqa-finetuned"`.
        model_config ([`Blip2Config`] or transformers' own):
            Configuration of the model: prompts differ between decoder-only language models and encoder-decoders.

    Returns:
        [`GenerationPreset`]

    Raises:
        ValueError: if there is no such preset, or no language model.

    Example:

    ```python
    >>> preset = generation_preset("vqa", model.config)
    >>> inputs = processor(images="cat.jpg", text=preset.prompt.format("what is it?"), return_tensors="pt")
    >>> model.generate(**inputs, **preset.generate_kwargs)
    ```"""
    if name not in _PRESETS:
        raise ValueError(f"There is no preset {name!r}: one of {', '.join(PRESET_NAMES)} was expected.")
    if model_config.text_config is None:
        raise ValueError(f"The preset {name!r} needs a language model, and this model has none.")
    preset = _PRESETS[name]
    prompt = preset_prompt(name, model_config.text_config.is_encoder_decoder)
    return replace(preset, prompt=prompt, generate_kwargs=dict(preset.generate_kwargs))


def preset_prompt(name: str, is_encoder_decoder: bool) -> str:
    """Return the prompt of a preset for one kind of language model."""
    prompt = _PRESETS[name].prompt
    return _ENCODER_DECODER_PROMPTS.get(name, prompt) if is_encoder_decoder else prompt


__all__ = ["NORMALIZATIONS", "PRESET_NAMES", "GenerationPreset", "generation_preset", "preset_prompt"]
