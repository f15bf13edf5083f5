"""`blip2-hf ask`: answers to questions about pictures and videos."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from ..jobs.errors import printable
from ..models.generation_presets import NORMALIZATIONS
from ._common import add_command, find_device, load_captioner
from ._generation import NORMALIZATION_HELP, check_generation, check_room, generation_with_preset, given_generation
from ._pictures import named_pictures
from ._quantization import quantization_bits


_LIKE_A_FILE = re.compile(r"\S*\w\.[A-Za-z]\w{1,4}|[/~.]\S*")  # cat.jgp, ../cat


def add_parser(commands: Any):
    example = "blip2-hf ask cat.jpg 'what colour is the cat?' --model Salesforce/blip2-flan-t5-xl"
    text = "Answer questions about pictures and videos."
    add = add_command(commands, "ask", _run, text, check=_check, example=example)
    arguments = (
        "pictures and videos (files, 'photos/*.jpg', URLs of pictures) and questions, in any order; each question is "
        "asked of each"
    )
    add("arguments", arguments, nargs="+", metavar="PICTURE QUESTION")
    add("--model", required=True)
    add("--prompt", "text with the question at {} (default: that of the model's fine-tuning, or the paper's)")
    add("--num-beams", "beams of the search (default: 5)")
    add("--max-new-tokens", "the most tokens that are written (default: 10)")
    choices = "answers to choose from, with their probabilities among each other, such as --choices yes no"
    add("--choices", choices, nargs="+", metavar="ANSWER")
    add("--normalization", NORMALIZATION_HELP, choices=NORMALIZATIONS)
    add("--generate")
    add("--image-size")
    add("--num-frames")
    add("--dtype")
    add("--load-in-4bit")
    add("--load-in-8bit")
    add("--device")
    add("--json", "print JSON, not a table", action="store_true")


def _run(options: argparse.Namespace):
    pictures, questions = _sort(options.arguments)

    from ..captioning import answer_questions
    from ..jobs.model_checks import WRITING, check_checkpoint

    check_checkpoint(options.model, WRITING)
    model, processor, kwargs = _load(options, pictures, questions)
    rows, is_broken = [], False
    for answers in answer_questions(model, processor, pictures, questions, options.prompt, **kwargs):
        if answers.error is not None:
            is_broken = True
            print(printable(f"blip2-hf: {answers.error}"), file=sys.stderr)
            continue
        for number, (question, answer) in enumerate(zip(questions, answers.texts, strict=True)):
            row = {"picture": pictures[answers.index], "question": question, "answer": answer}
            if options.choices is not None:
                row["probabilities"] = dict(zip(options.choices, answers.probabilities[number], strict=True))
            rows.append(row)
            if not options.json:
                for line in _lines(row, is_only=len(pictures) == len(questions) == 1):
                    print(printable(line), flush=True)
    if options.json:
        print(json.dumps(rows, indent=1))
    if is_broken:
        raise SystemExit(1)


def _lines(row: dict[str, Any], is_only: bool) -> list[str]:
    """Return the lines of an answer: with all choices if it is the only one, else with the best of them."""
    probabilities = row.get("probabilities", {})
    answers = [row["answer"]]
    if is_only:
        answers = sorted(probabilities, key=lambda answer: -probabilities[answer]) or answers
    names = [] if is_only else [row["picture"], row["question"]]
    lines = [[*names, answer, *([f"{probabilities[answer]:.1%}"] if probabilities else [])] for answer in answers]
    return ["\t".join(" ".join(cell.split()) for cell in line) for line in lines]


def _check(options: argparse.Namespace):
    quantization_bits(options)
    generation = ("num_beams", "max_new_tokens", "generate")
    if options.choices is None:
        if options.normalization is not None:
            raise ValueError("--normalization is for --choices, which were not given.")
    elif given := [f"--{name.replace('_', '-')}" for name in generation if getattr(options, name)]:
        raise ValueError(f"{' and '.join(given)}: nothing is generated if there are --choices.")
    elif len(set(options.choices)) < max(2, len(options.choices)):
        raise ValueError(f"--choices {' '.join(options.choices)}: at least two different answers were expected.")


def _load(options: argparse.Namespace, pictures: list[str], questions: list[str]) -> tuple[Any, Any, dict[str, Any]]:
    """Return the model, its processor, and the arguments of `generate`."""
    from ..data import with_image_size
    from ..jobs.inference import weights_place
    from ..models.configuration_blip2 import Blip2Config
    from ..models.generation_presets import generation_preset
    from ..models.processing_blip2 import learned_prompt
    from ..models.video_loading import is_video_name

    given = given_generation(options)
    choices = {"choices": options.choices, "normalization": options.normalization or NORMALIZATIONS[0]}
    config = Blip2Config.from_pretrained(weights_place(options.model))
    preset = generation_preset("vqa", config)
    kwargs = generation_with_preset(preset, given)
    if options.choices is None:
        check_generation(kwargs, options.model)
        check_room(config, kwargs)
    device = find_device(options.device)
    model, processor = load_captioner(options.model, options.dtype, device, bits=quantization_bits(options))
    prompt = options.prompt or learned_prompt(processor, asks=True) or preset.prompt
    prompts = [prompt.replace("{}", question) for question in questions]
    processor.frames_per_video = options.num_frames or processor.frames_per_video
    num_images = processor.frames_per_video if any(map(is_video_name, pictures)) else 1
    if options.choices is None:
        check_room(model.config, kwargs, max(map(len, processor(text=prompts).input_ids)), num_images)
    processor.image_processor = with_image_size(processor.image_processor, options.image_size)
    return model, processor, kwargs if options.choices is None else choices


def _sort(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the pictures and the questions. What looks like the name of a picture, and is none, is refused."""
    pictures: list[str] = []
    questions = []
    for argument in arguments:
        if not argument.strip():
            raise ValueError("An empty argument was given: the name of a picture, or a question, was expected.")
        if (found := named_pictures(argument)) is not None:
            pictures += found
        elif Path(argument).is_file():
            pictures.append(argument)  # the error says what it is
        elif Path(argument).is_dir():
            raise ValueError(f"{argument} is a folder. Give its pictures, such as '{argument}/*.jpg'.")
        elif _is_like_a_path(argument):
            raise ValueError(f"{argument} is neither a picture that is there nor a question. Check the path.")
        else:
            questions.append(argument)
    if not pictures or not questions:
        missing = "a question" if pictures else "a picture"
        raise ValueError(f"{missing} is missing: pictures and questions were expected, such as cat.jpg 'what is it?'.")
    return list(dict.fromkeys(pictures)), questions


def _is_like_a_path(argument: str) -> bool:
    """Tell whether an argument, which is no file, looks like the name of one, or of one in a folder that is there."""
    if argument.endswith("?"):
        return False
    is_inside = "/" in argument and " " not in argument and Path(argument).parent.is_dir()
    return is_inside or _LIKE_A_FILE.fullmatch(argument) is not None
