"""`Trainer` for BLIP-2: presets, weight decay, the losses of stage 1, evaluation, epochs, and pushes to the Hub."""

import copy
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_seq2seq import Seq2SeqTrainer
from transformers.trainer_utils import HubStrategy, SaveStrategy, TrainOutput, get_last_checkpoint, set_seed
from transformers.utils import logging

from ..data.callbacks import SetEpochCallback
from ..data.pairs import ImageTextStream
from ..hub import fetch_card, is_of_this_package
from ..hub.model_card import CARD_NAME, PIPELINE_TAGS, class_name, write_model_card
from ..jobs.atomic_files import write_json
from ..jobs.state_files import read_json
from ..models.configuration_blip2 import is_hub_id, public_class_name
from ..models.modeling_blip2 import Blip2ForConditionalGeneration
from ..models.modeling_pretraining import Blip2ForPreTraining
from ..models.processing_blip2 import Blip2Processor
from .arguments import Blip2Arguments
from .checkpoints import refuse_weights_alone
from .diversity import QueryDiversityLog
from .early_stopping import EarlyStopping, is_as_good_as_the_best
from .layer_decay import split_by_scale, vision_layer_scales
from .presets import describe_trained_parts, train_only, without_adapters
from .sharding import shared_weights_in_one_group


logger = logging.get_logger(__name__)

# Besides biases and norms, which Trainer leaves out by itself; under PEFT the names continue after these
_WITHOUT_WEIGHT_DECAY = ("query_tokens.", "temperature.")
# Ends of the names of numbers that an evaluation logs besides its scores
_SPEED = ("_runtime", "_samples_per_second", "_steps_per_second", "_model_preparation_time")
_AUTO_CLASSES = {
    "Blip2ForConditionalGeneration": "AutoModelForImageTextToText",
    "Blip2ForPreTraining": "AutoModelForPreTraining",
    "Blip2ForImageTextRetrieval": "AutoModelForZeroShotImageClassification",
}
_SETTINGS_IN_CARD = ("weight_decay", "preset", "vision_layer_decay", "gradient_caching_chunk_size")


class Blip2Trainer(Seq2SeqTrainer):
    r"""
    [`~transformers.Seq2SeqTrainer`] for BLIP-2. The models can also be trained with `Trainer` itself; this class adds:

    - `preset`, `vision_layer_decay` and `gradient_caching_chunk_size` of [`Blip2Arguments`] are applied;
    - queries and temperature have no weight decay, as biases and norms;
    - evaluation counts every held-out row, even with `dataloader_drop_last=True`;
    - each loss of a model's output (`loss_itc`, ...) is logged besides their sum, for training and for evaluation;
    - how different the queries of an image are is logged in training (`query_cosine`, `query_rank`, see
      [`~training.query_diversity`]), with a warning if they have become one vector;
    - a table of the trained and the frozen parts is printed when training begins;
    - of evaluations with equal metrics the best is the one with the lowest loss, and of equal losses the last one;
    - a loss that is NaN or infinite ends the training with an error;
    - a run that has ended, also by [`EarlyStopping`], is not trained on when it is resumed;
    - with `predict_with_generate`, metrics are given the new tokens, without the prompt;
    - [`~data.ImageTextPairs`] are told the epoch, and an [`~data.ImageTextStream`] that repeats is divided among
      processes, each of which reads only its own rows;
    - with `push_to_hub`, checkpoints and pushes include the code, and a card with the settings of the training and the
      last evaluation, or that of the weights to which `load_best_model_at_end` has returned.

    Args:
        model ([`Blip2PreTrainedModel`]):
            The model.
        args ([`Blip2Arguments`]):
            The settings.
        kwargs:
            Arguments of [`~transformers.Trainer`].

    Raises:
        ValueError: if `args` are not [`Blip2Arguments`], or checkpoints of a model that can't be saved are wanted; in
            training and evaluation, if the loss is NaN or infinite.
    """

    args: Blip2Arguments

    def __init__(self, model, args: Blip2Arguments, **kwargs):
        if not isinstance(args, Blip2Arguments):
            raise ValueError(
                f"Blip2Trainer takes Blip2Arguments, or those of a stage, but args is of type {type(args).__name__}. "
                "transformers' Trainer takes TrainingArguments."
            )
        if args.preset is not None:
            # Adapters are drawn, before Trainer sets the seed
            set_seed(args.seed)
            model = train_only(model, args.preset)
        if isinstance(model, Blip2ForConditionalGeneration) and args.save_strategy != SaveStrategy.NO:
            # Refused now, not at the first checkpoint
            model.check_that_it_can_be_saved()
        super().__init__(model, args, **kwargs)
        self.add_callback(SetEpochCallback())
        self._step_of_weights: int | None = None  # if they are not those of the last step
        self._losses: dict[str, _MeanLosses] = {"train": _MeanLosses(), "eval": _MeanLosses()}
        self._queries = QueryDiversityLog()
        if args.gradient_caching_chunk_size is not None and isinstance(self._bare_model(), Blip2ForPreTraining):
            self._bare_model().gradient_caching_enable(args.gradient_caching_chunk_size)
        if args.push_to_hub:
            if is_of_this_package(self._bare_model()):
                self._bare_model().saves_code = True
            if isinstance(self.processing_class, Blip2Processor):
                self.processing_class.saves_code = True

    def _bare_model(self) -> nn.Module:
        return without_adapters(self.accelerator.unwrap_model(self.model))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        last = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        refuse_weights_alone(last or None)
        if self.is_world_process_zero():
            print(describe_trained_parts(self._bare_model()))
        self._step_of_weights = None
        if last and self._is_finished(last):
            if self.is_world_process_zero():
                print(f"The training is finished: {last} is its end.")
            return self._load_finished(last)
        return super().train(resume_from_checkpoint, **kwargs)

    def _is_finished(self, checkpoint: str) -> bool:
        """
        Return whether a run ended there. Trainer would make one step more after `max_steps` within an epoch, and train
        on after an early stop.
        """
        path = os.path.join(checkpoint, TRAINER_STATE_NAME)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not os.path.exists(path):
            return False
        state = TrainerState.load_from_json(path)
        done, wanted = state.global_step, self.args.max_steps
        if wanted <= 0:
            done, wanted = state.epoch or 0, self.args.num_train_epochs
        if done >= wanted:
            return True
        stops = [callback for callback in self.callback_handler.callbacks if isinstance(callback, EarlyStopping)]
        return any(stop.is_over(self.args, state) for stop in stops)

    def _load_finished(self, checkpoint: str) -> TrainOutput:
        self.state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        self._load_from_checkpoint(checkpoint)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(self.state.global_step, 0.0, {})

    def _prepare_for_training(self, *args, **kwargs):
        with shared_weights_in_one_group(self._bare_model()) if self.is_fsdp_enabled else nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any = None) -> bool:
        if super()._determine_best_metric(metrics=metrics, trial=trial):
            return True
        if not is_as_good_as_the_best(self.args, self.state, metrics):
            return False
        self.state.best_global_step = self.state.global_step
        return True

    def _load_best_model(self):
        super()._load_best_model()
        self._step_of_weights = self.state.best_global_step

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not any(part in name for part in _WITHOUT_WEIGHT_DECAY)]

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.args.vision_layer_decay != 1:
            split_by_scale(optimizer, vision_layer_scales(self._bare_model(), self.args.vision_layer_decay))
        return optimizer

    def get_train_dataloader(self) -> DataLoader:
        stream = self.train_dataset
        if self.args.world_size == 1 or not isinstance(stream, ImageTextStream) or not stream.repeat:
            return super().get_train_dataloader()
        # With accelerate, each process would read all rows, or one process would read for all
        return DataLoader(
            stream.shared_out(self.args.process_index, self.args.world_size),
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        with self._last_batch_kept():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        with self._last_batch_kept():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _last_batch_kept(self) -> Iterator[None]:
        """Keep the last batch of held-out rows: `dataloader_drop_last` is for the negatives that training needs."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **generate_kwargs):
        if not isinstance(self._bare_model(), Blip2ForPreTraining):
            is_generated = self.args.predict_with_generate and not prediction_loss_only
            if prediction_loss_only or is_generated:
                inputs = {**inputs, "skip_logits": True}
            with self._own_generation_config() if is_generated else nullcontext():
                step = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **generate_kwargs)
            if is_generated and not self._bare_model().config.is_encoder_decoder:
                # The generated tokens come with the prompt in front
                step = (step[0], step[1][:, inputs["input_ids"].shape[1] :], step[2])
            return step
        if len(inputs["input_ids"]) * self.args.world_size > 1:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        # A last pair alone has no negatives, and therefore no loss
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            outputs = model(**inputs, return_loss=False)
        return None, (outputs.image_features, outputs.text_features), inputs.get("image_ids")

    @contextmanager
    def _own_generation_config(self) -> Iterator[None]:
        """
        Generate by a copy of the model's settings. Trainer fills in all defaults, of which `max_length` would be a
        second limit: transformers warns of it at each batch, and again with the saved model.
        """
        model = self._bare_model()
        own = model.generation_config
        model.generation_config = copy.deepcopy(own)
        if own.max_new_tokens is not None:
            model.generation_config.max_length = None
        try:
            yield
        finally:
            model.generation_config = own

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        # Read after the backward pass, because reading waits for all that a GPU has to do. A scaler skips steps of
        # which the loss is not finite, and looks for a scale without them
        is_scaled = self.accelerator.scaler is not None or self.is_deepspeed_enabled
        if not is_scaled and not bool(loss.isfinite().all()):
            raise diverged(self, f"The loss of step {self.state.global_step + 1:,} is {loss.mean().item()}")
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        losses = {name: value.detach() for name, value in outputs.items() if name.startswith("loss_")}
        self._losses["train" if model.training else "eval"].add(losses, rows=len(next(iter(inputs.values()))))
        if model.training:
            self._queries.keep(inputs)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._losses["train"].take(self.accelerator)
            # Only the whole model's own forward gathers what FSDP and DeepSpeed have divided among processes
            if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                logs |= self._queries.take(self._bare_model(), self.accelerator)
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._losses["eval"] = _MeanLosses()
        # As in Trainer, because Seq2SeqTrainer counts rows twice that fill up the last batch of a process
        self.gather_function = partial(
            self.accelerator.gather_for_metrics, use_gather_object=self.args.eval_use_gather_object
        )
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss = output.metrics.get(f"{metric_key_prefix}_loss", 0.0)
        if not math.isfinite(loss):
            raise diverged(self, f"The loss of an evaluation after step {self.state.global_step:,} is {loss}")
        losses = self._losses["eval"].take(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in losses.items()})
        return output

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
    ):
        r"""
        Write the model card into `output_dir`, unless you have written one, there or in the repository. `push_to_hub`
        calls this method with its own keyword arguments.

        Args:
            language (`str`, *optional*):
                Code of the language of the texts.
            license (`str`, *optional*):
                Identifier of the licence.
            tags (`str` or `list[str]`, *optional*):
                More tags.
            model_name (`str`, *optional*):
                Name of the model, if there is no repository.
            finetuned_from (`str` or `list[str]`, *optional*):
                Ids of the models that it was made of. Defaults to those that its configuration names.
            dataset (`str` or `list[str]`, *optional*):
                Ids of the datasets that the model was trained on.
        """
        if not self.is_world_process_zero():
            return
        if self.hub_model_id is not None and not self._has_fetched_card():
            return
        settings = extract_hyperparameters_from_trainer(self)
        settings |= {name: getattr(self.args, name) for name in _SETTINGS_IN_CARD}
        optimizer = getattr(self.args.optim, "value", self.args.optim)
        settings["optimizer"] = f"{optimizer}, betas {self.args.adam_beta1} and {self.args.adam_beta2}"
        if self.args.bf16:
            settings["mixed_precision_training"] = "bfloat16"
        write_model_card(
            self.args.output_dir,
            self.accelerator.unwrap_model(self.model),
            repo_id=self.hub_model_id or model_name,
            language=language,
            license=license,
            datasets=dataset,
            base_model=finetuned_from,
            results=self._last_evaluation(),
            training={name: value for name, value in settings.items() if value is not None},
            tags=tags,
        )

    def _has_fetched_card(self) -> bool:
        args = self.args
        try:
            fetch_card(args.output_dir, self.hub_model_id, revision=args.hub_revision, token=args.hub_token)
        except OSError as error:
            # Not an error, because it would end the training
            logger.warning(
                f"No card is written, because that of {self.hub_model_id}, which may be yours, can't be read: {error}"
            )
            return False
        return True

    def _last_evaluation(self) -> dict[str, Any] | None:
        """Return the scores of the last evaluation, or of the weights' own, on all datasets."""
        evaluations = [logs for logs in self.state.log_history if _scores(logs)]
        if self._step_of_weights is not None:
            evaluations = [logs for logs in evaluations if logs.get("step") == self._step_of_weights]
        if not evaluations:
            return None
        last = evaluations[-1]
        scores: dict[str, float] = {}
        for logs in evaluations:
            if logs.get("step") == last.get("step"):
                scores |= _scores(logs)
        settings = {name: last.get(name) for name in ("step", "epoch")}
        if self.args.predict_with_generate:
            generation = ("generation_max_length", "generation_num_beams")
            settings |= {name: getattr(self.args, name) for name in generation}
        return {
            "task": PIPELINE_TAGS[class_name(self._bare_model())],
            "scores": scores,
            "settings": {name: value for name, value in settings.items() if value is not None},
        }

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        card = Path(output_dir or self.args.output_dir) / CARD_NAME
        before = card.read_bytes() if card.exists() else None
        super()._save(output_dir, state_dict)
        adapter_config = card.with_name("adapter_config.json")
        if not adapter_config.exists():
            return
        _complete_adapter_config(adapter_config, self._bare_model(), self.args.push_to_hub)
        # PEFT writes a mostly blank card of its own with each save
        if before is not None:
            card.write_bytes(before)
        else:
            card.unlink(missing_ok=True)

    def _push_from_checkpoint(self, checkpoint_folder: str):
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            for file in Path(checkpoint_folder).glob("*.py"):
                shutil.copyfile(file, Path(self.args.output_dir or ".") / file.name)
            self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)


def diverged(trainer: Blip2Trainer, finding: str) -> ValueError:
    """Return the error of a training that has diverged, of which `finding` tells."""
    return ValueError(
        f"{finding}: the training has diverged, and its model is not saved. Give a lower learning rate "
        f"(--learning-rate) than {trainer.args.learning_rate:g}, and --overwrite to begin anew."
    )


def _complete_adapter_config(path: Path, model: nn.Module, is_pushed: bool):
    """
    Name the Auto class of the base model, because `AutoPeftModel` imports none of this package, and the base's folder
    so that it is found from everywhere. A folder is not pushed: it means nothing on another machine.
    """
    config = read_json(path, "It was just written.")
    base = config.get("base_model_name_or_path")
    if base and not is_hub_id(base):
        base = None if is_pushed else os.path.abspath(base)
    auto_class = _AUTO_CLASSES.get(public_class_name(model))
    if auto_class is not None:
        config["auto_mapping"] = {"base_model_class": auto_class, "parent_library": "transformers"}
    write_json(path, config | {"base_model_name_or_path": base})


def _scores(logs: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in logs if name.startswith("eval_") and not name.endswith(_SPEED)]
    return {name.removeprefix("eval_"): logs[name] for name in names}


class _MeanLosses:
    """The mean of each loss over rows, which stays on its device until it is taken."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.rows = 0

    def add(self, losses: dict[str, torch.Tensor], rows: int):
        self.rows += rows
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value * rows

    def take(self, accelerator) -> dict[str, float]:
        """Return the means over all processes, and start again."""
        means = {name: accelerator.gather(total / self.rows).mean().item() for name, total in self.sums.items()}
        self.__init__()
        return means


__all__ = ["Blip2Trainer"]
