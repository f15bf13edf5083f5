"""What `blip2-hf finetune` and `blip2-hf pretrain` have in common: options, data, settings, the end."""

import argparse
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ._common import check_output_apart, pick
from ._parser import above_zero, did_you_mean, positive


_LOGGERS = ("none", "tensorboard", "trackio", "wandb")
_FEW = 10  # held-out pictures, fewer than which tell less than the loss does
_NO_CHECKPOINT = "Give another --output, or --overwrite to replace what is there."


def add_data_options(add: Callable, held_out: float):
    """Add the options of what is learned from."""
    add("data")
    add("--validation", "data to validate on, such as ID:validation, in place of --held-out", metavar="DATA")
    share = "share of the pictures, or their number, that is not learned from but validated on"
    add("--held-out", share, type=float, default=held_out, metavar="SHARE")
    add("--id-column", "column of ids that are equal for rows of the same picture; without it, found if there is one")
    add("--image-column")
    add("--image-root")
    add("--allow-urls")
    add(
        "--skip-bad-rows",
        "leave out and list rows that can't be used, such as those without text",
        action="store_true",
    )


def add_training_options(add: Callable):
    """Add the options of how it is learned. All others are those of transformers' `TrainingArguments`."""
    add("--epochs", "how often all rows are learned from", type=above_zero)
    add("--max-steps", "steps, in place of epochs", type=positive)
    add("--learning-rate", "peak of the learning rate", type=above_zero)
    add("--batch-size", "pictures of a step in each process", type=positive, default=8)
    add(
        "--accumulate", "steps whose gradients are added up, for a larger batch", type=positive, default=1, metavar="N"
    )
    add("--eval-steps", "validate, and save a checkpoint, after each N steps", type=positive, metavar="N")
    add("--early-stopping", "stop after N validations without improvement", type=positive, metavar="N")
    add("--report-to", "where losses and scores are logged, besides the terminal", choices=_LOGGERS, default="none")
    add("--seed", "seed of all random choices", type=int, default=0)
    add("--num-workers", default=0)
    add("--device", "cpu; without it a GPU if there is one", choices=["cpu"])
    add("--output", "folder of the model; run again to go on after a stop", required=True, metavar="FOLDER")
    add("--overwrite", "delete the checkpoints in the folder, and begin anew", action="store_true")
    add("--push-to-hub", "repository that the model is pushed to at the end", metavar="REPOSITORY")
    add.args[0].set_defaults(takes_rest=True, parser=add.args[0])  # type: ignore[attr-defined]


def check_output(options: argparse.Namespace):
    """Refuse an output folder that holds what another command made, or is read."""
    folder = Path(options.output)
    check_output_apart(options)
    is_model = any((folder / name).exists() for name in ("config.json", "adapter_config.json"))
    if is_model and not (folder / "_settings.json").exists() and not options.overwrite:
        raise ValueError(f"{folder} holds a model that this command has not made. {_NO_CHECKPOINT}")


def training_arguments(options: argparse.Namespace, kind: type, **defaults) -> Any:
    """Return the settings of a training: the options, the rest of the command line, and otherwise `defaults`."""
    import torch
    from transformers import HfArgumentParser

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
    parser = HfArgumentParser(kind, exit_on_error=False, allow_abbrev=False)
    parser.set_defaults(**(defaults | {name: value for name, value in given.items() if value is not None}))
    try:
        arguments, rest = parser.parse_args_into_dataclasses(
            options.rest, return_remaining_strings=True, look_for_args_file=False
        )
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if rest:
        own = options.parser._option_string_actions
        known = [*own, *(name for name in parser._option_string_actions if "_" not in name)]
        raise ValueError(f"there is no option {rest[0]}.{did_you_mean(rest[0].replace('_', '-'), known)}")
    if arguments.n_gpu > 1:
        # Trainer would split each batch by DataParallel, which knows neither contrast nor generation
        arguments._n_gpu = 1
    if arguments.output_dir != options.output:
        raise ValueError("--output_dir: the folder of the model is given as --output.")
    if options.early_stopping is not None and not arguments.load_best_model_at_end:
        raise ValueError("--early-stopping needs validations: hold pictures out, and give --eval-steps.")
    return arguments


def open_rows(options: argparse.Namespace) -> dict[str, Any]:
    """
    Return the rows to learn from, `train`, and those of --validation, `validation`, `None` without it. Set
    `options.image_column` to the column of the pictures.
    """
    from ..data import check_held_out, load_rows
    from ..data.rows import find_image_column

    check_held_out(options.data, options.validation)
    places = pick(options, "image_column", "image_root")
    train = load_rows(options.data, streaming=getattr(options, "streaming", False), **places)
    validation = None if options.validation is None else load_rows(options.validation, **places)
    options.image_column = options.image_column or find_image_column(train)
    return {"train": train, "validation": validation}


def find_text_column(options: argparse.Namespace, rows: Any) -> str:
    """Return the column of the captions: the one that is given, `caption`, or `text` if there is no `caption`."""
    from ..data.rows import column_names

    names = column_names(rows) or []
    return options.text_column or ("text" if "text" in names and "caption" not in names else "caption")


def prepare_rows(
    options: argparse.Namespace,
    rows: Mapping[str, Any],
    needed: Mapping[str, str],
    text_column: str,
    is_contrasted: bool = False,
) -> dict[str, Any]:
    """
    Check columns and texts, and hold rows out if there are none to validate on. `needed` has the columns by the option
    that names each. A picture that is contrasted with others is not validated on alone.
    """
    prepared = dict(rows)
    for name, place in (("train", options.data), ("validation", options.validation)):
        if prepared[name] is not None:
            check_columns(place, prepared[name], needed)
            prepared[name] = _with_ids(options, prepared[name])
            prepared[name] = _with_texts(place, prepared[name], text_column, options.skip_bad_rows)
    if prepared["validation"] is None and not getattr(options, "streaming", False):
        prepared["train"], prepared["validation"] = _hold_out(prepared["train"], options, 2 if is_contrasted else 1)
    if is_contrasted and prepared["validation"] is not None and _count(prepared["validation"], options) == 1:
        raise ValueError("One picture is to be validated on, which has no other to be told from. Hold out 2 or more.")
    return prepared


def _with_ids(options: argparse.Namespace, rows: Any) -> Any:
    """Return rows in which a column tells the pictures apart, if they have pictures."""
    from ..data import with_picture_ids

    (ids,) = find_ids(options, rows)
    return rows if ids["id_column"] is not None else with_picture_ids(rows, options.image_column)


def find_ids(options: argparse.Namespace, *parts: Any) -> list[dict[str, str | None]]:
    """Return the column of each part of the data whose ids are equal for rows of the same picture."""
    from ..data import find_id_column

    return [
        {} if rows is None else {"id_column": options.id_column or find_id_column(rows, options.image_column)}
        for rows in parts
    ]


def check_columns(data: str, rows: Any, columns: Mapping[str, str]):
    """Refuse data that lack a column. `columns` has the columns by the option that names each."""
    from ..data.feature_cache import EMBEDS
    from ..data.rows import column_names

    names = column_names(rows)
    for option, column in columns.items():
        is_picture_of_features = option == "--image-column" and EMBEDS in (names or [])
        if names is None or is_picture_of_features or column in names or column.partition(".")[0] in names:
            continue
        there = ", ".join(sorted(names)) or "none"
        raise ValueError(f"{data} has no column {column!r}; its columns are {there}. Name the right one: {option}.")


def _with_texts(data: str, rows: Any, column: str, skips: bool) -> Any:
    """Return the rows that have a text. If others are not to be skipped, they are an error."""
    import datasets

    from ..data import hold_out
    from ..data.text import has_text

    if not isinstance(rows, datasets.Dataset) or column not in rows.column_names:
        return rows
    if len(rows) == 0:
        raise ValueError(f"{data} has no rows.")
    texts = rows.with_format(None).select_columns([column])
    kept = [number for number, row in enumerate(texts) if has_text(row[column])]
    missing = sorted({*range(len(rows))} - {*kept})
    if not missing:
        return rows
    if not skips:
        first = f"row {missing[0]}"
        if "file_name" in rows.column_names:
            first = rows.select_columns(["file_name"])[missing[0]]["file_name"]
        raise ValueError(
            f"{len(missing):,} of {len(rows):,} rows of {data}, {first} for one, have no text in the column "
            f"{column!r}. Write it, in a folder as a .txt file beside the picture, or leave such rows out: "
            "--skip-bad-rows."
        )
    if not kept:
        raise ValueError(f"No row of {data} has a text in the column {column!r}.")
    _tell(f"{len(missing):,} of {len(rows):,} rows of {data} have no text, and are left out.")
    # With the numbers of the rows
    return hold_out(rows, 0)[0].select(kept)


def _tell(message: str):
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(message)


def _hold_out(rows: Any, options: argparse.Namespace, least: int) -> tuple[Any, Any]:
    """Split rows by picture. A share of the pictures that is less than `least` of them is as many."""
    from ..data import hold_out

    id_column = find_ids(options, rows)[0]["id_column"]
    train, held_out = hold_out(rows, options.held_out, id_column, options.seed)
    if 0 < options.held_out < 1 and _count(held_out, options) < least:
        train, held_out = hold_out(rows, least, id_column, options.seed)
    return train, held_out if len(held_out) else None


def _count(rows: Any, options: argparse.Namespace) -> int:
    from ..data.held_out import count_pictures

    return count_pictures(rows, find_ids(options, rows)[0]["id_column"])


def prefer_loss_of_few(arguments: Any, validation: Any, metric: str):
    """Choose the best checkpoint by the loss if too few pictures are held out for the metric."""
    is_chosen = arguments.load_best_model_at_end and arguments.metric_for_best_model == metric
    if not is_chosen or validation is None:
        return
    count = len(validation.different_pictures(_FEW))
    if count < _FEW:
        _tell(f"Held-out pictures: {count}, too few for {metric}. The best checkpoint is the one with the least loss.")
        arguments.metric_for_best_model, arguments.greater_is_better = "loss", False


def find_image_size(options: argparse.Namespace, processor: Any) -> int:
    """Return the side of the pictures: the one that is given, or the checkpoint's own."""
    from ..data.image_size import own_image_size

    sides = set(own_image_size(processor.image_processor).values())
    if options.image_size is None and len(sides) != 1:
        raise ValueError("The checkpoint's pictures are no squares: give --image-size.")
    return options.image_size or sides.pop()


def check_model(name: str, need: str, advice: str = "") -> tuple[Any, Any]:
    """Return the configuration and the processor of a model, once it is whole and of the class that is needed."""
    from ..jobs.checkpoints import check_checkpoint, load_processor
    from ..jobs.inference import adapter_base
    from ..models.configuration_blip2 import Blip2Config

    if adapter_base(name) is not None:
        raise ValueError(
            f"{name} holds adapters, and a whole model is needed. Merge them: blip2-hf convert {name} --output FOLDER"
        )
    check_checkpoint(name, need, advice)
    return Blip2Config.from_pretrained(name), load_processor(name)


def finish(trainer: Any, output: str, next_command: str):
    """Push the model if that is wanted, and print where it is, how good it was, and what to do with it."""
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    if not trainer.is_world_process_zero():
        return
    name, state = trainer.args.metric_for_best_model, trainer.state
    found = [logs for logs in state.log_history if f"eval_{name}" in logs]
    best = [logs for logs in found if logs["step"] == state.best_global_step] or found
    score = "" if not best else f" ({name} {best[-1][f'eval_{name}']:.3f} at step {best[-1]['step']:,})"
    print(f"The model is in {output}{score}. Next: {next_command}")
