"""Answers to questions about pictures and videos."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from ..data.text import clean_question
from ..jobs.batch_size import BatchSize, first_batch_size
from ..jobs.inference import eval_mode
from ..jobs.picture_inputs import PictureInputs, load_ahead
from ..jobs.text_writing import choose_texts, special_token_in, write_texts
from ..models.generation_presets import generation_preset
from ..models.processing_blip2 import learned_prompt


@dataclass
class PictureAnswers:
    r"""
    What [`answer_questions`] says of a picture.

    Args:
        index (`int`):
            Which of the pictures.
        texts (`list[str]`, *optional*):
            An answer to each question; none if the picture can't be read.
        error (`str`, *optional*):
            Why it can't be read.
        probabilities (`list[list[float]]`, *optional*):
            Those of the choices, for each question, if there were any to choose from.
    """

    index: int
    texts: list[str] = field(default_factory=list)
    error: str | None = None
    probabilities: list[list[float]] = field(default_factory=list)


def answer_questions(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence,
    questions: Sequence[str],
    prompt: str | None = None,
    batch_size: int | None = None,
    num_workers: int = 0,
    choices: Sequence[str] | None = None,
    normalization: str = "sum",
    **generate_kwargs,
) -> Generator[PictureAnswers, None, None]:
    r"""
    Answer each question about each picture. A picture goes through the tower and the Q-Former once for all questions,
    unless the Q-Former reads them (InstructBLIP). Questions are written as in training ([`~data.clean_question`]).

    Args:
        model ([`Blip2ForConditionalGeneration`]):
            The model, on its device.
        processor ([`Blip2Processor`]):
            Its processor.
        images (`list`):
            Anything that [`~image_loading.load_image`] takes, and videos: files with the ending of one, and lists of
            pictures. Of a video the model reads `processor.frames_per_video` frames.
        questions (`list[str]`):
            The questions.
        prompt (`str`, *optional*):
            What the model goes on from, with `{}` in the place of the question. Without it, the processor's `prompt`,
            if it has a `{}`, or else that of the preset `"vqa"`.
        batch_size (`int`, *optional*):
            Answers at a time, to begin with. Without it 128, or 16 on a CPU.
        num_workers (`int`, *optional*, defaults to 0):
            Processes that decode pictures; 0 takes a thread of this one.
        choices (`list[str]`, *optional*):
            Answers to choose from: the likeliest is the answer to a question, and nothing is generated.
        normalization (`str`, *optional*, defaults to `"sum"`):
            How choices are scored, as in [`~Blip2ForConditionalGeneration.score_texts`].
        generate_kwargs (`dict`):
            Arguments of [`~Blip2ForConditionalGeneration.generate`]. Those of the preset `"vqa"` hold if none are
            given.

    Returns:
        generator of [`PictureAnswers`], in the order of the pictures.

    Raises:
        ValueError: if a question is empty, or spells a special token of the tokenizer, or the prompt has no `{}`, or
            there are fewer than two choices.

    Example:

    ```python
    >>> for answers in answer_questions(model, processor, ["cat.jpg"], ["what is it?", "what colour is it?"]):
    ...     print(answers.texts)
    ```"""
    preset = generation_preset("vqa", model.config)
    prompt = learned_prompt(processor, asks=True) if prompt is None else prompt
    prompts = _prompts(questions, preset.prompt if prompt is None else prompt, processor.tokenizer)
    _check_choices(choices, generate_kwargs, processor.tokenizer)
    generate_kwargs = generate_kwargs or preset.generate_kwargs
    size = first_batch_size(batch_size, model.device)
    current = BatchSize(size)
    inputs = PictureInputs(images, processor.image_processor, "image", processor.frames_per_video)

    def answer(rows: list[tuple[str, torch.Tensor]]) -> list[tuple[str, list[float]]]:
        batches = [map(list, zip(*same, strict=True)) for _, same in groupby(rows, key=lambda row: row[1].shape)]
        if choices is None:
            return [(text, []) for batch in batches for text in write_texts(model, processor, generate_kwargs, *batch)]
        found = [own for batch in batches for own in choose_texts(model, processor, choices, normalization, *batch)]
        return [(choices[own.index(max(own))], own) for own in found]

    with eval_mode(model), torch.no_grad():
        for batch in load_ahead(inputs, num_workers, batch_size=max(1, size // len(prompts))):
            rows = [(prompt, picture) for picture in batch.pictures for prompt in prompts]
            found = iter([pair for _, part in current.run(answer, rows) for pair in part])
            for number in batch.numbers:
                error = batch.errors.get(number)
                own = [] if error else [next(found) for _ in prompts]
                probabilities = [values for _, values in own if values]
                yield PictureAnswers(number, [text for text, _ in own], error, probabilities)


def _check_choices(choices: Sequence[str] | None, generate_kwargs: dict[str, Any], tokenizer: Any):
    if choices is None:
        return
    if isinstance(choices, str) or len(choices) < 2 or len(set(choices)) < len(choices):
        raise ValueError(f"choices={choices!r}: a list of at least two different answers was expected.")
    if generate_kwargs:
        raise ValueError(f"{', '.join(generate_kwargs)}: nothing is generated if there are choices. Leave them out.")
    for choice in choices:
        if found := special_token_in(choice, "", tokenizer):
            raise ValueError(f"The choice {choice!r} has {found!r}, a special token of the tokenizer. Leave it out.")


def _prompts(questions: Sequence[str], template: str, tokenizer: Any) -> list[str]:
    if isinstance(questions, str) or not questions:
        raise ValueError(f"A list of questions was expected, got {questions!r}.")
    if "{}" not in template:
        raise ValueError(f"The prompt {template!r} has no {{}} in the place of the question.")
    prompts = [template.replace("{}", clean_question(question)) for question in questions]
    for question, prompt in zip(questions, prompts, strict=True):
        if not clean_question(question).strip():
            raise ValueError(f"The question {question!r} is empty, or has no words.")
        if found := special_token_in(prompt, template, tokenizer):
            raise ValueError(
                f"The question {question!r} has {found!r}, a special token of the tokenizer. Leave it out."
            )
    return prompts


__all__ = ["PictureAnswers", "answer_questions"]
