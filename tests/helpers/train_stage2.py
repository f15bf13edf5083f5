"""
A run of stage 2 on tiny parts, as a program: for the tests to run it in several processes.

    python tests/helpers/train_stage2.py FOLDER --max_steps 4 ...
"""

import json
import os
import sys
from pathlib import Path

import torch
import transformers
from stage2 import remove_dropout
from tiny import CAPTIONS, make_image, make_model, make_processor

from blip2_hf.data import ImageTextPairs, LanguageModelCollator
from blip2_hf.evaluation import GeneratedTextMetrics
from blip2_hf.training import Blip2Trainer, Stage2Arguments


def main():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    (arguments,) = transformers.HfArgumentParser(Stage2Arguments).parse_args_into_dataclasses(sys.argv[1:])
    torch.manual_seed(0)
    model = make_model()
    remove_dropout(model)
    rows = [{"image": make_image(i), "caption": CAPTIONS[i % 6]} for i in range(24)]
    held_out = ImageTextPairs(rows[1:8], train=False, prompt="a photo of")
    metrics = GeneratedTextMetrics(make_processor(), held_out)

    def keeps_the_order(prediction):
        is_kept = [[text] for text in metrics.texts(prediction.label_ids)] == metrics.references
        return metrics(prediction) | {"keeps_the_order": is_kept}

    trainer = Blip2Trainer(
        model,
        arguments,
        train_dataset=ImageTextPairs(rows, prompt="a photo of"),
        eval_dataset=held_out,
        compute_metrics=keeps_the_order,
        data_collator=LanguageModelCollator(make_processor()),
    )
    trainer.train()
    if arguments.predict_with_generate:
        trainer.evaluate()
    if trainer.is_world_process_zero():
        Path(arguments.output_dir, "log.json").write_text(json.dumps(trainer.state.log_history))
    # gloo's threads abort a process now and then that ends by way of the interpreter (pytorch/pytorch#179291); where
    # the process group is destroyed, with DistributedDataParallel, they can stop it for good
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
