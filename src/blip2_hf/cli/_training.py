"""Options, data, checks and the last line that `blip2-hf finetune` and `blip2-hf pretrain` share."""

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ._common import check_columns, check_output_apart, pick, stop
from ._parser import above_zero, positive, repository, seed, share_or_number, training_device


_LOGGERS = ("none", "tensorboard", "trackio", "wandb")
_FEW = 10  # held-out pictures, fewer than which tell less than the loss does
_MODELS = ("model", "stage1", "vision_model", "language_model")  # options that name what is begun with
_NO_CHECKPOINT = "Give another --output, or --overwrite to replace what is there."


def add_data_options(add: Callable, held_out: float):
    """Add the options of what is learned from."""
    add("data")
    add("--validation", "data to validate on, such as ID:validation, in place of --held-out", metavar="DATA")
    share = "share of the pictures, or their number, that is not learned from but validated on"
    add("--held-out", share, type=share_or_number, default=held_out, metavar="SHARE")
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
    add("--accumulate", "batches whose gradients are added up before each step", type=positive, default=1, metavar="N")
    add("--eval-steps", "validate, and save a checkpoint, after each N steps", type=positive, metavar="N")
    add("--early-stopping", "stop after N validations without improvement", type=positive, metavar="N")
    add("--report-to", "where losses and scores are logged, besides the terminal", choices=_LOGGERS, default="none")
    add("--seed", "seed of all random choices", type=seed, default=0)
    add("--num-workers", default=0)
    add("--device", "cpu; without it a GPU if there is one; CUDA_VISIBLE_DEVICES chooses it", type=training_device)
    add("--output", "folder of the model; run again to go on after a stop", required=True, metavar="FOLDER")
    add("--overwrite", "delete the checkpoints in the folder, and begin anew", action="store_true")
    add("--push-to-hub", "repository that the model is pushed to at the end", type=repository, metavar="REPOSITORY")
    add.args[0].set_defaults(takes_rest=True, parser=add.args[0])  # type: ignore[attr-defined]


def check_output(options: argparse.Namespace):
    """Refuse an output folder that holds what another command made, or is read."""
    folder = Path(options.output)
    check_output_apart(options)
    models = [Path(name).resolve() for kind in _MODELS if (name := getattr(options, kind, None)) is not None]
    is_deleted = any(path.match("checkpoint-*") and path.parent == folder.resolve() for path in models)
    if options.overwrite and is_deleted:
        raise ValueError(
            f"--overwrite deletes the checkpoints in {folder}, and the model to start from is one. Give another "
            "--output."
        )
    is_model = any((folder / name).exists() for name in ("config.json", "adapter_config.json"))
    if is_model and not (folder / "_settings.json").exists() and not options.overwrite:
        raise ValueError(f"{folder} holds a model that this command has not made. {_NO_CHECKPOINT}")


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
            check_columns(place, prepared[name], {**needed, "--id-column": options.id_column})
            if not options.skip_bad_rows:
                _check_pictures(place, prepared[name], options.image_column)
            prepared[name] = _with_ids(options, prepared[name])
            prepared[name] = _with_texts(options, name, place, prepared[name], text_column)
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


def _with_texts(options: argparse.Namespace, name: str, data: str, rows: Any, column: str) -> Any:
    """
    Return the rows that have a text. Others are an error or, with --skip-bad-rows, added to `options.textless` by the
    name of the rows.
    """
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
    if not options.skip_bad_rows:
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
    options.textless = {**getattr(options, "textless", {}), name: missing}
    # With the numbers of the rows
    return hold_out(rows, 0)[0].select(kept)


def _check_pictures(data: str, rows: Any, column: str):
    """Refuse rows whose pictures are files here that are not there, without opening any."""
    import datasets

    from ..data.rows import column_names, select_columns

    if not isinstance(rows, datasets.Dataset) or column not in (column_names(rows) or []):
        return
    if isinstance(rows.features[column], (datasets.Image, datasets.Video)) and not all(
        chunk.field("bytes").null_count == len(chunk) for chunk in rows.data.column(column).chunks
    ):
        return  # pictures that are in the data would be read, too
    missing, first = 0, ""
    seen: dict[str, bool] = {}
    for number, row in enumerate(select_columns(rows.with_format(None), [column])):
        path = _local_file(row[column])
        if path is not None and not seen.setdefault(path, os.path.isfile(path)):
            first = first or f"row {number} ({path})"
            missing += 1
    if missing:
        raise ValueError(
            f"The pictures of {missing:,} of {len(rows):,} rows of {data} are not there, that of {first} for one. "
            "Restore them, name the folder that their paths start from (--image-root), or leave such rows out: "
            "--skip-bad-rows."
        )


def _local_file(picture: Any) -> str | None:
    """Return the path of a picture that is a file here: no URL, no part of an archive, no picture in base64."""
    from ..jobs.picture_files import is_picture_or_video_name

    path = picture.get("path") if isinstance(picture, Mapping) and picture.get("bytes") is None else picture
    return path if isinstance(path, str) and is_picture_or_video_name(path) and "://" not in path else None


def leave_out_bad_rows(options: argparse.Namespace, data: Mapping[str, Any], collator: Callable) -> dict[str, Any]:
    """Leave out the rows of which no batch can be made, and list them together with those without text."""
    from accelerate import PartialState

    from ..data.bad_rows import TEXT_MISSING, BadRow
    from ..jobs.state_files import json_line
    from ..training import without_bad_rows

    rest = without_bad_rows(data, collator, options.output)
    for name, numbers in getattr(options, "textless", {}).items():
        if PartialState().is_main_process:
            rows = (BadRow(number, None, f"Row {number} has no text.", TEXT_MISSING) for number in numbers)
            with open(Path(options.output, f"bad_rows-{name}.jsonl"), "ab") as file:
                file.writelines(json_line(asdict(row)) for row in rows)
    return rest


@contextmanager
def told_how_to_go_on(options: argparse.Namespace) -> Iterator[None]:
    """Say after Ctrl-C what the same command does."""
    try:
        yield
    except KeyboardInterrupt:
        is_saved = any(Path(options.output).glob("checkpoint-*"))
        goes_on = "goes on from the last checkpoint" if is_saved else "begins again: no checkpoint was saved yet"
        stop(f"stopped. The same command {goes_on}.")


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
