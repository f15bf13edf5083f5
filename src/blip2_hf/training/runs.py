"""A training from its data to the saved model, as the commands and the scripts of examples/ have it."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch

from ..data.bad_rows import leave_out_bad_rows
from ..data.feature_cache import EMBEDS
from ..data.pairs import ImageTextPairs, ImageTextStream
from ..data.rows import column_names
from ..data.transforms import RandomResizedCropAndFlip
from ..evaluation.generated_text import GeneratedTextMetrics
from .arguments import Blip2Arguments
from .checkpoints import checkpoint_to_resume
from .early_stopping import EarlyStopping
from .presets import without_adapters
from .sample_table import SampleTable
from .trainer import Blip2Trainer, diverged


_OF_ADAPTERS = ("adapter_config.json", "adapter_model*")
_OF_WHOLE_MODELS = ("config.json", "generation_config.json", "model*.safetensors*")
_SHUFFLED = 10_000  # rows of a stream that are shuffled together


def training_pairs(rows: Any, image_size: int, seed: int = 0, flip: float = 0.5, **kwargs) -> Any:
    r"""
    Make pairs to learn from: the paper's random crops of pictures, or stored features as they are.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`):
            The rows, as [`~data.load_rows`] returns them. A stream is shuffled, and repeats.
        image_size (`int`):
            Side of the crops, in pixels.
        seed (`int`, *optional*, defaults to 0):
            Seed of all random choices.
        flip (`float`, *optional*, defaults to 0.5):
            Share of the pictures that are mirrored.
        kwargs:
            Arguments of [`~data.ImageTextPairs`] or [`~data.ImageTextStream`], such as `text_column` and `prompt`.

    Returns:
        [`~data.ImageTextPairs`], or [`~data.ImageTextStream`] of a stream.
    """
    images = kwargs.get("images")
    has_features = EMBEDS in (column_names(rows if images is None else images) or [])
    kwargs["transform"] = None if has_features else RandomResizedCropAndFlip(image_size, flip=flip)
    if isinstance(rows, datasets.IterableDataset):
        rows = rows.shuffle(seed=seed, buffer_size=_SHUFFLED)
        return ImageTextStream(rows, repeat=True, seed=seed, **kwargs)
    return ImageTextPairs(rows, seed=seed, **kwargs)


def without_bad_rows(data: Mapping[str, Any], collator: Callable, output_dir: str | None) -> dict[str, Any]:
    r"""
    Leave out the rows of which no batch can be made, and list them in `bad_rows-<name>.jsonl` in the output folder.

    Args:
        data (`Mapping[str, ImageTextPairs]`):
            Pairs by their name, such as `train`. A stream, which leaves them out itself, and `None` stay as they are.
        collator (`Callable`):
            The collator of their batches.
        output_dir (`str`):
            The output folder of the training.

    Returns:
        `dict`: as `data`.
    """
    folder = Path(output_dir or ".")
    return {
        name: leave_out_bad_rows(pairs, collator, folder / f"bad_rows-{name}.jsonl")
        if isinstance(pairs, ImageTextPairs)
        else pairs
        for name, pairs in data.items()
    }


def make_trainer(
    model: Any,
    processor: Any,
    arguments: Blip2Arguments,
    train: Any,
    validation: ImageTextPairs | None,
    collator: Callable,
    compute_metrics: Callable | None = None,
    early_stopping_patience: int | None = None,
) -> Blip2Trainer:
    r"""
    Make the trainer of a run. If its metrics are of generated texts, it shows some of them at each evaluation
    ([`SampleTable`]).

    Args:
        model ([`Blip2PreTrainedModel`]):
            The model.
        processor ([`Blip2Processor`]):
            Its processor, which is saved with it, and with the prompt and the number of frames of the pairs.
        arguments ([`Blip2Arguments`]):
            The settings.
        train, validation ([`~data.ImageTextPairs`]):
            What is learned from, and what is held out, if anything is.
        collator (`Callable`):
            The collator of batches.
        compute_metrics (`Callable`, *optional*):
            The metrics of `validation`.
        early_stopping_patience (`int`, *optional*):
            Number of evaluations without improvement until a stop ([`EarlyStopping`]).

    Returns:
        [`Blip2Trainer`].

    Raises:
        ValueError: if the rows make no batch.
    """
    batch = arguments.train_batch_size * arguments.world_size
    if arguments.dataloader_drop_last and isinstance(train, ImageTextPairs) and len(train) < batch:
        raise ValueError(
            f"There are {len(train)} rows to learn from, which make no batch of {batch}. Give a smaller batch size."
        )
    # What has learned behind a prompt is asked with it, in chats too
    processor.prompt = train.prompt or None
    if processor.prompt is not None and processor.chat_template == processor.tokenizer.chat_template:
        processor.chat_template = None
    if train.frames_per_video is not None:
        processor.frames_per_video = train.frames_per_video
    trainer = Blip2Trainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collator,
        compute_metrics=compute_metrics,
        processing_class=processor,
    )
    if early_stopping_patience is not None:
        trainer.add_callback(EarlyStopping(early_stopping_patience))
    if validation is not None and isinstance(compute_metrics, GeneratedTextMetrics):
        trainer.add_callback(SampleTable(validation, compute_metrics))
    return trainer


def train_from_last_checkpoint(trainer: Blip2Trainer, options: Mapping[str, Any], models: Iterable[str]):
    r"""
    Train, from the last checkpoint of the same run if there is one.

    Args:
        trainer ([`Blip2Trainer`]):
            The trainer.
        options (`Mapping`):
            What the model and the data are made of, as in [`checkpoint_to_resume`].
        models (`Iterable[str]`):
            Names of the options that are checkpoints of models.

    Raises:
        ValueError: as [`checkpoint_to_resume`].
    """
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(trainer, options, models))


def save_result(trainer: Blip2Trainer, merge: bool = False):
    r"""
    Save the model, or its adapters, and the processor into the output folder.

    Args:
        trainer ([`Blip2Trainer`]):
            The trainer, which has trained.
        merge (`bool`, *optional*, defaults to `False`):
            Whether to save the whole model with the adapters added to its weights.

    Raises:
        ValueError: if trained weights are NaN or infinite. Nothing in the folder is touched then.
    """
    _check_weights(trainer)
    folder, model = Path(trainer.args.output_dir or "."), trainer.accelerator.unwrap_model(trainer.model)
    is_whole = merge or without_adapters(model) is model
    if trainer.is_world_process_zero():
        # What an earlier run has left would be loaded in its place
        for pattern in _OF_ADAPTERS if is_whole else _OF_WHOLE_MODELS:
            for path in folder.glob(pattern):
                path.unlink()
    if not merge:
        trainer.save_model()
    elif trainer.is_world_process_zero():
        model.merge_and_unload().save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)


def _check_weights(trainer: Blip2Trainer):
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    broken = torch.tensor(sum(not weight.isfinite().all() for weight in trained), device=trainer.args.device)
    # Each process may have a part of the weights
    if trainer.accelerator.gather(broken).any():
        raise diverged(trainer, "Trained weights are NaN or infinite")


__all__ = ["make_trainer", "save_result", "train_from_last_checkpoint", "training_pairs", "without_bad_rows"]
