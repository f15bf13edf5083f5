"""A run of stage 1 on tiny parts: for the tests to stop it, resume it, and run it in several processes."""

import json
from pathlib import Path

import torch
import transformers
from stage1 import Processor, make_pairs, make_stage1

from blip2_hf.data import ImageTextCollator, ImageTextPairs, ImageTextStream, RandomResizedCropAndFlip
from blip2_hf.evaluation import contrastive_retrieval_metrics
from blip2_hf.training import Blip2Trainer, Stage1Arguments, checkpoint_to_resume


def train_stage1(arguments: dict, stream: bool = False, without_chance: bool = False):
    """Train with Stage1Arguments: without chance means without dropout and with the likeliest negatives."""
    transformers.logging.set_verbosity_error()
    if without_chance:
        torch.multinomial = lambda weights, *args, **kwargs: weights.argmax(-1, keepdim=True)
    arguments = Stage1Arguments(**arguments)
    torch.manual_seed(0)
    model = make_stage1(qformer_dropout=0.0 if without_chance else 0.1)
    rows, transform = make_pairs(), RandomResizedCropAndFlip(28)
    if stream:
        train = ImageTextStream(
            rows.to_iterable_dataset(num_shards=2).shuffle(seed=0), transform=transform, repeat=True
        )
    else:
        train = ImageTextPairs(rows, transform=transform)
    trainer = Blip2Trainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=ImageTextPairs(rows.select(range(8)), train=False),
        data_collator=ImageTextCollator(Processor()),
        compute_metrics=contrastive_retrieval_metrics,
    )
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(trainer, {"stream": stream}))
    if trainer.is_world_process_zero():
        Path(arguments.output_dir, "log.json").write_text(json.dumps(trainer.state.log_history))
