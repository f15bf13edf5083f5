"""Which checkpoint a run that was stopped, at whatever moment, goes on from."""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, cached_file, extract_commit_hash, logging

from ..data.pairs import ImageTextPairs
from ..jobs.atomic_files import write_json
from ..jobs.fingerprints import check_settings_file, fingerprint
from ..jobs.output import of_first
from ..jobs.state_files import read_json


if TYPE_CHECKING:
    from .trainer import Blip2Trainer

logger = logging.get_logger(__name__)

_SETTINGS = "_settings.json"  # Trainer does not push what begins with an underscore: paths are in it
# Arguments that decide, with the options of a script, what is learned
_BINDING_ARGUMENTS = (
    "preset",
    "learning_rate",
    "min_learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "vision_layer_decay",
    "weight_decay",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "gradient_caching_chunk_size",
    "dataloader_drop_last",
    "seed",
    "data_seed",
    "metric_for_best_model",
    "greater_is_better",
)
# Options of the scripts that do not; --skip_bad_rows is what a run that a bad row has stopped goes on with
_FREE_OPTIONS = {
    "allow_urls",
    "attn_implementation",
    "early_stopping_patience",
    "group_by",
    "skip_bad_rows",
    "test",
    "test_images",
}
_DATA, _VALIDATION = ("data", "images"), ("validation", "validation_images")
_ANEW = "Give another output folder, or --overwrite to delete all checkpoints in it and begin anew"
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")


def last_complete_checkpoint(output_dir: str | os.PathLike, world_size: int = 1) -> str | None:
    r"""
    Return the newest checkpoint of `Trainer` that is whole. A run that is killed while it saves leaves a part of one,
    from which `resume_from_checkpoint=True` would fail. Those of `save_only_model` are passed over with a warning, as
    parts are. [`checkpoint_to_resume`] also looks at what made it.

    Args:
        output_dir (`str` or `os.PathLike`):
            That of the run.
        world_size (`int`, *optional*, defaults to 1):
            Number of processes of the run that goes on. A checkpoint of another number is taken with a warning: the
            data are then shared out in another way.

    Returns:
        `str` or `None`: the folder, for `trainer.train(resume_from_checkpoint=...)`; `None` if there is none yet.

    Example:

    ```python
    >>> trainer.train(resume_from_checkpoint=last_complete_checkpoint(arguments.output_dir, arguments.world_size))
    ```"""
    steps = _checkpoints(output_dir)
    # Each process leaves the state of its random numbers: as many as any checkpoint has
    processes = {step: len(list(folder.glob("rng_state*.pth"))) for step, folder in steps.items()}
    expected = max(processes.values(), default=0)
    for step in sorted(steps, reverse=True):
        folder = steps[step]
        if _has_weights_alone(folder):
            logger.warning(f"{folder} has weights alone (save_only_model), from which no training goes on.")
        elif processes[step] in (world_size, expected) and _is_complete(folder, step):
            if processes[step] != world_size:
                logger.warning(f"{folder} is of {processes[step]} processes, and goes on with {world_size}.")
            return str(folder)
        else:
            logger.warning(f"{folder} is not whole, and is passed over.")
    return None


def checkpoint_to_resume(
    trainer: "Blip2Trainer", options: Mapping[str, Any], models: Iterable[str] = ()
) -> str | None:
    r"""
    Return the checkpoint in `output_dir` that a training goes on from, if the same model, data and settings made it.
    What they are is written to `_settings.json` beside the checkpoints. All processes call this, and the first one
    compares.

    What may differ is the length of the run, how the batch is spread over processes and accumulation, and all that
    does not change what is learned: precision, devices, workers, logging, evaluation and saving. Models and data may
    have moved: their contents are compared, of a model of the Hub the revision, of data their number and 32 rows.

    The checkpoint that is named by `resume_from_checkpoint` of the arguments is taken whatever made it. With
    `overwrite` all checkpoints are deleted.

    Args:
        trainer ([`Blip2Trainer`]):
            What is about to train.
        options (`Mapping`):
            What the model and the data are made of, such as the options of a script.
        models (`Iterable[str]`, *optional*):
            Names of the options that are checkpoints of models, on this machine or on the Hub.

    Returns:
        `str` or `None`: the folder, for `trainer.train(resume_from_checkpoint=...)`; `None` if there is none yet.

    Raises:
        ValueError: if other settings made the checkpoints, or it is not known which did, or they have the weights
            alone, or the run is to be shorter than it already is.

    Example:

    ```python
    >>> checkpoint = checkpoint_to_resume(trainer, {"model": "stage2", "data": "train.parquet"}, models=["model"])
    >>> trainer.train(resume_from_checkpoint=checkpoint)
    ```"""
    return of_first(lambda: _find_checkpoint(trainer, _settings(trainer, options, models)), trainer.accelerator.state)


def _find_checkpoint(trainer: "Blip2Trainer", settings: dict[str, Any]) -> str | None:
    args, folder = trainer.args, Path(trainer.args.output_dir)
    path = folder / _SETTINGS
    if args.overwrite and args.resume_from_checkpoint is not None:
        raise ValueError("--overwrite deletes what --resume_from_checkpoint would go on from. Give one of the two.")
    if args.overwrite:
        for old in _checkpoints(folder).values():
            shutil.rmtree(old)
    checkpoint = args.resume_from_checkpoint or last_complete_checkpoint(folder, args.world_size)
    alone = [str(old) for old in _checkpoints(folder).values() if _has_weights_alone(old)]
    refuse_weights_alone(checkpoint or (alone[-1] if alone else None))
    if checkpoint is not None:
        if args.resume_from_checkpoint is None:
            advice = (
                f"Give the same options to go on from it. {_ANEW}, or --resume_from_checkpoint {checkpoint} to go on "
                "from it all the same."
            )
            # A model or dataset may have moved
            free = {name for name in settings if _contents(name) in settings}
            check_settings_file(path, settings, checkpoint, advice, free)
        else:
            _check_neighbours(checkpoint, folder, settings)
        _check_length(checkpoint, args)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)
    return checkpoint


def _check_neighbours(checkpoint: str, folder: Path, settings: dict[str, Any]):
    """Refuse a folder in which later checkpoints, that other settings made, would be taken for those of this run."""
    path, found = folder / _SETTINGS, _checkpoints(folder)
    own = next((step for step, old in found.items() if old.resolve() == Path(checkpoint).resolve()), -1)
    later = [old.name for step, old in found.items() if step > own]
    if later and not (path.exists() and read_json(path, f"{_ANEW}.") == settings):
        raise ValueError(
            f"{folder} has checkpoints that other settings made ({', '.join(later)}), and the next run would take "
            f"them for those of this one. To go on from {checkpoint}, give another output folder, or move them away."
        )


def refuse_weights_alone(checkpoint: str | os.PathLike | None):
    """Refuse a checkpoint of `save_only_model`: `Trainer` would go on at its step with a schedule that begins anew."""
    if checkpoint is not None and _has_weights_alone(Path(checkpoint)):
        raise ValueError(
            f"{checkpoint} has weights alone (save_only_model), without the state of the optimizer and the schedule: "
            f"training can't go on from it. {_ANEW}."
        )


def _settings(trainer: "Blip2Trainer", options: Mapping[str, Any], models: Iterable[str]) -> dict[str, Any]:
    """Return what decides what is learned, by the names that a user gave."""
    arguments = trainer.args.to_dict()
    values = {name: value for name, value in options.items() if name not in _FREE_OPTIONS}
    settings = {f"--{name}": value for name, value in values.items()}
    settings |= {f"--{name}": arguments[name] for name in _BINDING_ARGUMENTS}
    batch = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size
    settings["batch over all processes"] = batch
    contents = {name: _model_contents(values[name]) for name in models if values.get(name) is not None}
    for names, pairs in ((_DATA, trainer.train_dataset), (_VALIDATION, trainer.eval_dataset)):
        if isinstance(pairs, ImageTextPairs):
            fingerprint = pairs.fingerprint()
            contents |= {name: fingerprint for name in names if values.get(name) is not None}
    settings |= {_contents(f"--{name}"): value for name, value in contents.items() if value is not None}
    return json.loads(json.dumps(settings, default=str))


def _contents(name: str) -> str:
    return f"contents of {name}"


def _check_length(checkpoint: str, args: Any):
    try:
        state = read_json(Path(checkpoint) / TRAINER_STATE_NAME, f"Give another checkpoint. {_ANEW}.")
    except OSError:
        raise ValueError(f"{checkpoint} is no checkpoint of a training: it has no {TRAINER_STATE_NAME}.") from None
    done, wanted, unit = state["global_step"], args.max_steps, "steps"
    if wanted <= 0:
        done, wanted, unit = state["epoch"] or 0, args.num_train_epochs, "epochs"
    if done > wanted:
        raise ValueError(f"{checkpoint} has learned for {done:g} {unit}, and the run is to have {wanted:g}. {_ANEW}.")


def _model_contents(name: str) -> str | None:
    """Return a hash of the weights and the configuration in a folder, or the revision of a model of the Hub."""
    folder = Path(name)
    if not folder.is_dir():
        try:
            return extract_commit_hash(cached_file(name, CONFIG_NAME), None)
        except OSError:
            return None
    return fingerprint(_model_files(folder))


def _model_files(folder: Path) -> Iterator[bytes]:
    """Yield the names and the contents of the files that make a model what it is."""
    for path in sorted(folder.iterdir()):
        is_weights = path.suffix in (".safetensors", ".bin") and path.name not in _NO_WEIGHTS
        if is_weights or path.name == CONFIG_NAME:
            yield path.name.encode()
            with open(path, "rb") as file:
                while block := file.read(2**24):
                    yield block


def _checkpoints(output_dir: str | os.PathLike) -> dict[int, Path]:
    """Return the folders of checkpoints, whole or not, by their step."""
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    found = {int(match[1]): folder for folder in folders if (match := pattern.fullmatch(folder.name))}
    return dict(sorted(found.items()))


def _has_weights_alone(folder: Path) -> bool:
    """Tell whether a checkpoint is of save_only_model, without the optimizer and the state of the random numbers."""
    return (folder / TRAINER_STATE_NAME).exists() and not any(folder.glob("rng_state*.pth"))


def _is_complete(folder: Path, step: int) -> bool:
    """Tell whether all files of a checkpoint are there."""
    # Process 0 writes the state of the training last, the others that of their random numbers before it or after
    try:
        state = json.loads((folder / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    # The directory of a zip file, which torch writes, is at its end
    files = folder.glob("rng_state*.pth")
    return state["global_step"] == step and all(zipfile.is_zipfile(file) for file in files)


__all__ = ["checkpoint_to_resume", "last_complete_checkpoint"]
