"""Captioning and visual question answering, scored (section 4 of the paper), in one process or several."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..data.text import clean_question
from ..jobs.fingerprints import fingerprint
from ..jobs.output import of_first, only_writer
from ..jobs.text_writing import special_token_in
from ..models.generation_presets import GenerationPreset, generation_preset
from .answer_protocols import ANSWER_PROTOCOLS, answer_scorer, check_protocol
from .metrics import caption_metrics, chair
from .metrics.chair import ObjectWords
from .prediction_store import PredictionStore
from .report import read_results, write_report
from .samples import (
    OVERALL,
    CaptionSample,
    QuestionSample,
    Sample,
    check_distinct_ids,
    check_text,
    sample_id,
    sample_name,
    sample_references,
)
from .text_prediction import predict_texts, prediction_settings


def evaluate_captioning(
    model: Any,
    processor: Any,
    samples: Sequence[CaptionSample],
    output: str | os.PathLike,
    preset: str | GenerationPreset = "caption",
    task: str = "caption",
    **kwargs,
) -> dict[str, Any]:
    r"""
    Caption pictures and score the captions: CIDEr-D, BLEU and ROUGE-L, for all pictures and for each group of them.
    All processes of accelerate call it together, and share the pictures.

    Args:
        model ([`Blip2ForConditionalGeneration`]):
            The model, on the device of this process.
        processor ([`Blip2Processor`]):
            Its processor.
        samples (`list[CaptionSample]`):
            Pictures with captions, such as [`read_karpathy`] and [`read_nocaps`] return.
        output (`str` or `os.PathLike`):
            Folder for `results.json`, `table.md`, `predictions.json`, and `parts`, with which an interrupted
            evaluation goes on.
        preset (`str` or [`~generation_presets.GenerationPreset`], *optional*, defaults to `"caption"`):
            Prompt and arguments of `generate`, or the name of the paper's.
        task (`str`, *optional*, defaults to `"caption"`):
            What results call it.
        kwargs:
            `image_size`, `batch_size`, `num_workers` and `show_progress` of [`predict_texts`].

    Returns:
        `dict`: what results.json holds, in all processes.

    Raises:
        ValueError: if `output` holds predictions that other settings made, if another run is writing to it, if two
            samples have the same id, or if arguments do not fit.
        OSError: if files are gone at the end, as when `output` was deleted meanwhile.
        ImageLoadError: if a picture can't be read.
    """
    preset = _preset(preset, model, samples)
    check_preset(preset, asks=False)
    return _evaluate(
        model,
        processor,
        samples,
        [preset.prompt] * len(samples),
        output,
        preset,
        task,
        score=caption_metrics,
        names=("image_id", "caption"),
        **kwargs,
    )


def evaluate_chair(
    model: Any,
    processor: Any,
    samples: Sequence[CaptionSample],
    output: str | os.PathLike,
    synonyms: Sequence[Sequence[str]],
    preset: str | GenerationPreset = "caption",
    task: str = "chair",
    **kwargs,
) -> dict[str, Any]:
    r"""
    Caption pictures, and score what the captions name that is not there ([`~metrics.chair`]). In a picture are its
    `objects`, and what its `captions` name. All processes of accelerate call it together, and share the pictures.

    Args:
        model, processor, output, kwargs:
            As in [`evaluate_captioning`]. In `predictions.json`, `invented` has the objects that are not there.
        samples (`list[CaptionSample]`):
            Pictures with objects, such as [`read_coco_objects`] returns.
        synonyms (`list[list[str]]`):
            The words of each object, the object's name first, such as [`read_synonyms`] returns.
        preset (`str` or [`~generation_presets.GenerationPreset`], *optional*, defaults to `"caption"`):
            Prompt and arguments of `generate`, or the name of the paper's.
        task (`str`, *optional*, defaults to `"chair"`):
            What results call it.

    Returns:
        `dict`: what results.json holds, in all processes.

    Raises:
        ValueError, OSError, ImageLoadError: as in [`evaluate_captioning`], and if an object is none of the synonyms.
    """
    preset = _preset(preset, model, samples)
    check_preset(preset, asks=False)
    words = check_objects(samples, synonyms)
    references = []
    for sample in samples:
        present = words.names_of(sample.objects or []).union(*words.find_all(sample.captions))
        references.append([] if sample.objects is None else [sorted(present)])

    def describe(text: str, own: list[list[str]]) -> dict[str, list[str]]:
        return {"invented": [name for name in words.find(text) if name not in own[0]]} if own else {}

    return _evaluate(
        model,
        processor,
        samples,
        [preset.prompt] * len(samples),
        output,
        preset,
        task,
        score=lambda texts, own: chair(texts, [objects for (objects,) in own], synonyms),
        names=("image_id", "caption"),
        references=references,
        describe=describe,
        scoring={"synonyms": fingerprint(f"{word}={name}\n".encode() for word, name in words.names.items())},
        **kwargs,
    )


def evaluate_vqa(
    model: Any,
    processor: Any,
    samples: Sequence[QuestionSample],
    output: str | os.PathLike,
    preset: str | GenerationPreset = "vqa",
    task: str = "vqa",
    protocol: str | None = None,
    lemmatize: bool = False,
    **kwargs,
) -> dict[str, Any]:
    r"""
    Answer questions, and score the answers, for all questions and for each group of them. Questions are written as
    LAVIS writes them ([`~data.clean_question`]). All processes of accelerate call it together, and share the pictures.

    Args:
        model, processor, output, kwargs:
            As in [`evaluate_captioning`].
        samples (`list[QuestionSample]`):
            Questions, such as [`read_vqa`] and [`read_gqa`] return.
        preset (`str` or [`~generation_presets.GenerationPreset`], *optional*, defaults to `"vqa"`):
            Prompt and arguments of `generate`, or the name of the paper's.
        task (`str`, *optional*, defaults to `"vqa"`):
            What results call it.
        protocol (`str`, *optional*):
            `"official"`, `"lavis"` and `"exact"` are those of [`~metrics.vqa_accuracy`], `"normalized"` and `"strict"`
            those of [`~metrics.gqa_accuracy`], `"pope"` is [`~metrics.pope`]. Without it, `"official"` if all
            questions that have answers have ten, as in VQAv2 and OK-VQA; else `"exact"`. results.json and table.md
            say which one it was.
        lemmatize (`bool`, *optional*, defaults to `False`):
            Whether predictions are scored as [`~metrics.lemmatize_answers`] writes them, as LAVIS does for OK-VQA.
            Those in `output` are as the model wrote them.

    Returns:
        `dict`: what results.json holds, in all processes.

    Raises:
        ValueError, OSError, ImageLoadError: as in [`evaluate_captioning`], and if a question has too few answers for
            its protocol.
        ImportError: if `lemmatize=True`, and spaCy or its model is not installed.
    """
    protocol = check_protocol(samples, protocol, lemmatize)
    preset = _preset(preset, model, samples)
    check_preset(preset, asks=True)
    return _evaluate(
        model,
        processor,
        samples,
        _question_prompts(samples, preset.prompt),
        output,
        preset,
        task,
        score=answer_scorer(protocol, lemmatize),
        names=(ANSWER_PROTOCOLS[protocol].question_name, ANSWER_PROTOCOLS[protocol].answer_name),
        scoring={"protocol": protocol, "lemmatize": lemmatize},
        **kwargs,
    )


def evaluate_multiple_choice(
    model: Any,
    processor: Any,
    samples: Sequence[QuestionSample],
    output: str | os.PathLike,
    preset: str | GenerationPreset = "vqa",
    task: str = "multiple-choice",
    normalization: str = "sum",
    **kwargs,
) -> dict[str, Any]:
    r"""
    Choose the likeliest of the choices of each question ([`~Blip2ForConditionalGeneration.score_texts`]), and score
    how often it is the right one, for all questions and for each group of them. Questions are written as in
    [`evaluate_vqa`]. All processes of accelerate call it together, and share the pictures.

    Args:
        model, processor, output, kwargs:
            As in [`evaluate_captioning`].
        samples (`list[QuestionSample]`):
            Questions with `choices`, such as [`read_aokvqa`] returns.
        preset (`str` or [`~generation_presets.GenerationPreset`], *optional*, defaults to `"vqa"`):
            The prompt, or the name of the preset that has it. Nothing is generated.
        task (`str`, *optional*, defaults to `"multiple-choice"`):
            What results call it.
        normalization (`str`, *optional*, defaults to `"sum"`):
            How choices of different lengths compare, as in [`~Blip2ForConditionalGeneration.score_texts`].

    Returns:
        `dict`: what results.json holds, in all processes.

    Raises:
        ValueError, OSError, ImageLoadError: as in [`evaluate_captioning`], and if a question has no choices.
    """
    preset = _preset(preset, model, samples)
    check_preset(preset, asks=True)
    for number, sample in enumerate(samples):
        if sample.choices is None:
            raise ValueError(f"{sample_name(sample, number)} has no choices, one of which is to be chosen.")
        for choice in sample.choices:
            if found := special_token_in(choice, "", processor.tokenizer):
                raise ValueError(
                    f"{sample_name(sample, number)}: the choice {choice!r} has {found!r}, a special token of the "
                    "tokenizer. Write it without."
                )
    return _evaluate(
        model,
        processor,
        samples,
        _question_prompts(samples, preset.prompt),
        output,
        replace(preset, generate_kwargs={}),
        task,
        score=_share_of_right,
        names=("question_id", "multiple_choice"),
        normalization=normalization,
        **kwargs,
    )


def _share_of_right(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    right = [prediction in own for prediction, own in zip(predictions, references, strict=True)]
    return {"accuracy": sum(right) / len(right)}


def _question_prompts(samples: Sequence[QuestionSample], template: str) -> list[str]:
    """Return the prompts of questions, and refuse a question of which nothing is left."""
    prompts = []
    for number, sample in enumerate(samples):
        question = clean_question(sample.question)
        if not question.strip():
            name = sample_name(sample, number)
            raise ValueError(f"{name}: the question is {sample.question!r}, of which cleaning leaves nothing.")
        prompts.append(template.replace("{}", question))
    return prompts


def check_objects(samples: Sequence[CaptionSample], synonyms: Sequence[Sequence[str]]) -> ObjectWords:
    """Refuse objects that are none of the synonyms, and return the words of all objects."""
    words = ObjectWords(synonyms)
    for number, sample in enumerate(samples):
        words.names_of(sample.objects or [], sample_name(sample, number))
    return words


def check_preset(preset: GenerationPreset, asks: bool):
    """Refuse a prompt that has a question where there is none, or none where there is one."""
    check_text(preset.prompt, "The prompt")
    if preset.asks and not asks:
        raise ValueError(f"The preset {preset.name!r} asks a question ({preset.prompt!r}); captioning has none.")
    if asks and not preset.asks:
        raise ValueError(f"The preset {preset.name!r} has no {{}} for the question in its prompt {preset.prompt!r}.")


def _preset(preset: str | GenerationPreset, model: Any, samples: Sequence[Sample]) -> GenerationPreset:
    if not samples:
        raise ValueError("There are no samples.")
    return generation_preset(preset, model.config) if isinstance(preset, str) else preset


def _evaluate(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    prompts: list[str],
    output: str | os.PathLike,
    preset: GenerationPreset,
    task: str,
    score: Callable,
    names: tuple[str, str],
    scoring: dict[str, Any] | None = None,
    references: Sequence[list] | None = None,
    describe: Callable[[str, list], dict[str, Any]] | None = None,
    normalization: str | None = None,
    image_size: int | None = None,
    **kwargs,
) -> dict[str, Any]:
    """
    Predict, score and report. `names` are what the benchmark calls the id and the text of a prediction. `references`
    are those of the samples if not given. `describe` says more of a text, given its references. With `normalization`,
    a text is chosen and not generated.
    """
    check_distinct_ids(samples)
    _check_prompts(samples, prompts, preset.prompt, processor.tokenizer)
    state = PartialState(cpu=model.device.type == "cpu")
    settings = prediction_settings(model, processor, preset, samples, image_size, normalization)
    kwargs |= {} if normalization is None else {"normalization": normalization}
    with only_writer(Path(output) / ".lock", output, state):
        store = PredictionStore(Path(output) / "parts", settings, state)
        texts, batch_size = predict_texts(
            model, processor, samples, prompts, preset.generate_kwargs, store, image_size=image_size, **kwargs
        )
        if state.is_main_process:
            if references is None:
                references = [sample_references(sample) for sample in samples]
            groups = _groups(samples)
            scored = {group: [n for n in numbers if references[n]] for group, numbers in groups.items()}
            if scoring and scored[OVERALL]:
                settings |= scoring
            id_name, text_name = names
            write_report(
                output,
                task,
                model,
                {"preset": preset.name, **settings},
                [
                    {id_name: sample_id(sample), text_name: text} | (describe(text, own) if describe else {})
                    for sample, text, own in zip(samples, texts, references, strict=True)
                ],
                {
                    group: score([texts[n] for n in numbers], [references[n] for n in numbers])
                    for group, numbers in scored.items()
                    if numbers
                },
                {group: len(numbers) for group, numbers in groups.items()},
                {group: len(numbers) for group, numbers in scored.items()},
                [sample_id(sample) for sample, own in zip(samples, references, strict=True) if not own],
                {"num_processes": state.num_processes, "batch_size": batch_size},
            )
        return of_first(lambda: read_results(output), state)


def _check_prompts(samples: Sequence[Sample], prompts: Sequence[str], template: str, tokenizer: Any):
    """Refuse questions that spell a special token, such as the mark of a picture; the rest of the prompt may."""
    for number, (sample, prompt) in enumerate(zip(samples, prompts, strict=True)):
        if found := special_token_in(prompt, template, tokenizer):
            raise ValueError(
                f"{sample_name(sample, number)}: the prompt is {prompt!r}, and {found!r} is a special token of "
                "the tokenizer. Write the question without it."
            )


def _groups(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Return the numbers of the samples of each group, and of all."""
    groups: dict[str, list[int]] = {}
    for number, sample in enumerate(samples):
        if sample.group is not None:
            groups.setdefault(sample.group, []).append(number)
    return dict(sorted(groups.items())) | {OVERALL: list(range(len(samples)))}


__all__ = ["evaluate_captioning", "evaluate_chair", "evaluate_multiple_choice", "evaluate_vqa"]
