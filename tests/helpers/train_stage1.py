"""
A run of stage 1 on tiny parts, as a program: for the tests to stop it, resume it, and run it in several processes.
`--without-chance` leaves out dropout and draws the likeliest negatives; `--stream` reads a stream.

    python tests/helpers/train_stage1.py FOLDER --max_steps 8 ...
"""

import json
import os
import sys
from pathlib import Path

import torch
import transformers
from stage1 import Processor, make_pairs, make_stage1

from blip2_hf.data import ImageTextCollator, ImageTextPairs, ImageTextStream, RandomResizedCropAndFlip
from blip2_hf.evaluation import contrastive_retrieval_metrics
from blip2_hf.training import Blip2Trainer, Stage1Arguments, checkpoint_to_resume


def main():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    stream, without_chance = ("--stream" in sys.argv, "--without-chance" in sys.argv)
    options = [argument for argument in sys.argv[1:] if argument not in ("--stream", "--without-chance")]
    if without_chance:
        torch.multinomial = lambda weights, *args, **kwargs: weights.argmax(-1, keepdim=True)
    (arguments,) = transformers.HfArgumentParser(Stage1Arguments).parse_args_into_dataclasses(options)
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
    # gloo's threads abort a process now and then that ends by way of the interpreter (pytorch/pytorch#179291); where
    # the process group is destroyed, with DistributedDataParallel, they can stop it for good
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
