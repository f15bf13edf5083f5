"""The paper's settings of generation, by name: prompt, limits, search, and the size of the pictures."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class GenerationPreset:
    r"""
    Settings of generation.

    Args:
        name (`str`):
            Its name.
        prompt (`str`):
            What the model goes on from. The question stands at `{}`, where there is one.
        generate_kwargs (`dict`):
            Arguments of `generate`. Lengths are those of new text, for decoder-only language models and for
            encoder-decoders alike.
        image_size (`int`):
            Side of the paper's pictures, in pixels. A checkpoint's own image processor has the size that the model was
            trained with, which comes before this one.
    """

    name: str
    prompt: str
    generate_kwargs: dict[str, Any]
    image_size: int

    @property
    def asks(self) -> bool:
        """Whether there is a question."""
        return "{}" in self.prompt


# Beams and prompts are the paper's (section 4 and appendix). It is silent on lengths: they are those of LAVIS, whose
# `min_len` and `max_len` count a start token. Its `min_len=8` is 7 tokens of text, and its `min_len=1` none.
_PRESETS = {
    preset.name: preset
    for preset in (
        GenerationPreset(
            "caption",
            "a photo of",
            {
                "num_beams": 5,
                "do_sample": False,
                "length_penalty": 1.0,
                "repetition_penalty": 1.0,
                "max_new_tokens": 30,
                "min_new_tokens": 7,
            },
            364,
        ),
        GenerationPreset(
            "nocaps",
            "a photo of",
            {
                "num_beams": 5,
                "do_sample": False,
                "length_penalty": 1.0,
                "repetition_penalty": 1.0,
                "max_new_tokens": 80,
                "min_new_tokens": 9,
            },
            364,
        ),
        GenerationPreset(
            "vqa",
            "Question: {} Answer:",
            {
                "num_beams": 5,
                "do_sample": False,
                "length_penalty": -1.0,
                "repetition_penalty": 1.0,
                "max_new_tokens": 10,
            },
            224,
        ),
        GenerationPreset(
            "vqa-finetuned",
            "Question: {} Answer:",
            {
                "num_beams": 5,
                "do_sample": False,
                "length_penalty": 1.0,
                "repetition_penalty": 1.0,
                "max_new_tokens": 10,
            },
            490,
        ),
    )
}
_ENCODER_DECODER_PROMPTS = {"vqa": "Question: {} Short answer:"}

PRESET_NAMES = tuple(_PRESETS)


def generation_preset(name: str, model_config: Any) -> GenerationPreset:
    r"""
    The paper's settings for a model.

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
        raise ValueError(f"There is no preset {name!r}. Those of the paper are {', '.join(PRESET_NAMES)}.")
    if model_config.text_config is None:
        raise ValueError(f"The preset {name!r} is one for a language model, and this model has none.")
    preset = _PRESETS[name]
    prompt = preset.prompt
    if model_config.text_config.is_encoder_decoder:
        prompt = _ENCODER_DECODER_PROMPTS.get(name, prompt)
    return replace(preset, prompt=prompt, generate_kwargs=dict(preset.generate_kwargs))


__all__ = ["PRESET_NAMES", "GenerationPreset", "generation_preset"]
