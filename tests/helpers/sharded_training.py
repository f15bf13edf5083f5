"""Runs of Trainer in processes that share weights, gradients or the state of the optimizer, on CPUs."""

import json
from pathlib import Path

import torch
import transformers
from accelerate import DistributedType, PartialState
from stage1 import Processor, make_pairs
from stage2 import remove_dropout
from tiny import CAPTIONS, make_image, make_processor

from blip2_hf import Blip2ForConditionalGeneration, Blip2ForPreTraining
from blip2_hf.cli import main
from blip2_hf.data import ImageTextCollator, ImageTextPairs, LanguageModelCollator
from blip2_hf.evaluation import GeneratedTextMetrics, contrastive_retrieval_metrics
from blip2_hf.training import Blip2Trainer, Stage1Arguments, Stage2Arguments, save_result


def count_cpus_as_accelerators():
    """Let accelerate shard on CPUs: it gives FSDP and DeepSpeed to accelerators alone, although gloo has both."""
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def run_command(command: list[str]):
    """Run a command that trains, as on a machine with accelerators."""
    count_cpus_as_accelerators()
    torch.accelerator.is_available = lambda: True
    main([*command, "--dataloader-pin-memory", "false"])


def train_sharded(model: Path, arguments: dict, checkpoint: str | None = None):
    """Train the model of a folder without chance, evaluate it, and save it, as the arguments say."""
    transformers.logging.set_verbosity_error()
    torch.multinomial = lambda weights, *args, **kwargs: weights.argmax(-1, keepdim=True)
    is_sharded = "fsdp" in arguments or "deepspeed" in arguments
    if is_sharded:
        count_cpus_as_accelerators()
    arguments = {**arguments, "use_cpu": not is_sharded}
    is_stage1 = json.loads((model / "config.json").read_text())["architectures"] == ["Blip2HfForPreTraining"]
    trainer = _stage1(model, arguments) if is_stage1 else _stage2(model, arguments)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.evaluate()
    save_result(trainer)
    if trainer.is_world_process_zero():
        Path(trainer.args.output_dir, "log.json").write_text(json.dumps(trainer.state.log_history))


def _stage1(folder: Path, arguments: dict) -> Blip2Trainer:
    arguments = Stage1Arguments(**arguments)
    rows = make_pairs()
    return Blip2Trainer(
        remove_dropout(Blip2ForPreTraining.from_pretrained(folder)),
        arguments,
        train_dataset=ImageTextPairs(rows),
        eval_dataset=ImageTextPairs(rows.select(range(8)), train=False),
        data_collator=ImageTextCollator(Processor()),
        compute_metrics=contrastive_retrieval_metrics,
    )


def _stage2(folder: Path, arguments: dict) -> Blip2Trainer:
    arguments = Stage2Arguments(**arguments, predict_with_generate=True, generation_max_length=40)
    model = remove_dropout(Blip2ForConditionalGeneration.from_pretrained(folder))
    processor = make_processor(is_encoder_decoder=model.config.is_encoder_decoder)
    rows = [{"image": make_image(i), "caption": CAPTIONS[i % 6]} for i in range(24)]
    held_out = ImageTextPairs(rows[1:8], train=False, prompt="a photo of")
    return Blip2Trainer(
        model,
        arguments,
        train_dataset=ImageTextPairs(rows, prompt="a photo of"),
        eval_dataset=held_out,
        compute_metrics=GeneratedTextMetrics(processor, held_out),
        data_collator=LanguageModelCollator(processor),
    )
