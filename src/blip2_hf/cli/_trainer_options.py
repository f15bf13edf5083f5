"""Options of transformers' `TrainingArguments` on a command line, checked before anything is loaded."""

import argparse
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ._parser import did_you_mean


# Options that a command has itself, by the names that transformers gives them
_OWN = {
    "output_dir": "--output",
    "num_train_epochs": "--epochs",
    "per_device_train_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--accumulate",
    "dataloader_num_workers": "--num-workers",
    "use_cpu": "--device cpu",
    "hub_model_id": "--push-to-hub",
}
# What a validation tells besides the loss, by the score that chooses the checkpoint
_TEXTS = ("exact_match", "word_f1")
_METRICS = {
    "CIDEr-D": (*_TEXTS, "CIDEr-D", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"),
    "vqa_accuracy": (*_TEXTS, "vqa_accuracy"),
    "mean_recall": ("mean_recall", *(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))),
}
_ABOVE_ZERO = ("per_device_eval_batch_size", "save_steps", "eval_steps", "logging_steps")
_LONGEST_LIST = 160  # characters of the values that a message tells


def training_arguments(options: argparse.Namespace, kind: type, **defaults) -> Any:
    """Return the settings of a training: the options, the rest of the command line, and otherwise `defaults`."""
    import torch

    if options.report_to != "none" and find_spec(options.report_to) is None:
        name = options.report_to
        package = '"blip2-hf[training]"' if name == "tensorboard" else name
        raise ImportError(f"--report-to {name} needs the package {name}: pip install {package}")
    on_cpu = options.device == "cpu" or not torch.accelerator.is_available()
    given = {
        "output_dir": options.output,
        "num_train_epochs": options.epochs,
        "max_steps": options.max_steps,
        "learning_rate": options.learning_rate,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulate,
        "dataloader_num_workers": options.num_workers,
        "report_to": options.report_to,
        "seed": options.seed,
        "overwrite": options.overwrite,
        "use_cpu": on_cpu,
        "push_to_hub": options.push_to_hub is not None,
        "hub_model_id": options.push_to_hub,
    }
    defaults = {"logging_steps": 10, "dataloader_pin_memory": not on_cpu} | defaults
    if options.eval_steps is not None:
        is_stream = getattr(options, "streaming", False)
        if options.validation is None and (is_stream or options.held_out == 0):
            raise ValueError("--eval-steps: nothing is held out to validate on. Give --validation.")
        steps = {"eval_steps": options.eval_steps, "save_steps": options.eval_steps}
        defaults |= {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True, **steps}
    arguments = _parse(options, kind, defaults | {name: value for name, value in given.items() if value is not None})
    if arguments.n_gpu > 1:
        # Trainer would split each batch by DataParallel, which knows neither contrast nor generation
        arguments._n_gpu = 1
    if options.early_stopping is not None and not arguments.load_best_model_at_end:
        raise ValueError("--early-stopping needs validations: hold pictures out, and give --eval-steps.")
    _check_metric(arguments, defaults["metric_for_best_model"])
    return arguments


def _parse(options: argparse.Namespace, kind: type, defaults: dict[str, Any]) -> Any:
    """Parse the rest of the command line, in which an unknown option is as bad as elsewhere."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(kind, exit_on_error=False, allow_abbrev=False)
    parser.set_defaults(**defaults)
    for option in options.rest:
        name = option.partition("=")[0].removeprefix("--").replace("-", "_")
        if option.startswith("--") and name in _OWN:
            options.parser.error(f"--{name} is called {_OWN[name]} in this command.")
    try:
        values, rest = parser.parse_known_args(options.rest)
    except argparse.ArgumentError as error:
        options.parser.error(_shorten_choices(str(error)))
    if rest:
        if not rest[0].startswith("-"):
            options.parser.error(f"{rest[0]!r} was given, and nothing like it is expected.")
        own = options.parser._option_string_actions
        known = [*own, *(name for name in parser._option_string_actions if "_" not in name)]
        options.parser.error(f"there is no option {rest[0]}.{did_you_mean(rest[0].replace('_', '-'), known)}")
    for name in _ABOVE_ZERO:
        if (value := getattr(values, name)) is not None and value <= 0:
            options.parser.error(f"--{name.replace('_', '-')} {value:g}: a number above 0 was expected.")
    if (checkpoint := values.resume_from_checkpoint) is not None and not Path(checkpoint).is_dir():
        raise FileNotFoundError(
            f"--resume-from-checkpoint {checkpoint}: there is no such folder. Leave the option out to go on from the "
            "last checkpoint in --output."
        )
    try:
        (arguments,) = parser.parse_dict(vars(values))
    except ValueError as error:
        raise ValueError(_explain(error, vars(values))) from error
    return arguments


def _shorten_choices(message: str) -> str:
    """Return the message of argparse about a value that is none of many, with a guess in place of all of them."""
    match = re.fullmatch(r"(argument \S+): invalid choice: (\S+) \(choose from (.*)\)", message)
    if match is None or len(match[3]) <= _LONGEST_LIST:
        return message
    known = [name.strip("'") for name in match[3].split(", ")]
    guess = did_you_mean(match[2].strip("'"), known)
    return f"{match[1]}: {match[2]} was given, one of {len(known)} names of transformers was expected.{guess}"


def _explain(error: ValueError, given: dict[str, Any]) -> str:
    """Return what users can do about an error of `TrainingArguments`, whose messages are long."""
    message = str(error)
    if "load_best_model_at_end" in message:
        return (
            "the best checkpoint is kept, for which validations and checkpoints come at the same steps. Give "
            "--eval-steps N alone, or --load-best-model-at-end false beside --eval-strategy and --save-strategy."
        )
    if match := re.match(r"'?(\w+)'? is not a valid \w+, please select one of \[(.*)\]", message):
        option = next((name for name, value in given.items() if value == match[1]), "").replace("_", "-")
        return f"--{option} {match[1]}: one of {match[2]} was expected.".replace("'", "")
    return " ".join(message.split())


def _check_metric(arguments: Any, own: str):
    """Refuse a metric that a task does not have. `own` is its best."""
    name = (arguments.metric_for_best_model or "loss").removeprefix("eval_")
    if arguments.predict_with_generate and own == "mean_recall":
        raise ValueError("--predict-with-generate: nothing is generated in this training. Leave it out.")
    generates = arguments.predict_with_generate or own == "mean_recall"
    if not generates and name == own:
        name = "loss"
        arguments.metric_for_best_model, arguments.greater_is_better = name, False
    known = ("loss", *(_METRICS[own] if generates else ()))
    if name not in known:
        raise ValueError(
            f"--metric-for-best-model {name}: one of {', '.join(known)} was expected.{did_you_mean(name, known)}"
        )
