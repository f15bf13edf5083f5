"""A run of stage 2 on tiny parts: for the tests to run it in several processes."""

import json
from pathlib import Path

import torch
import transformers
from stage2 import remove_dropout
from tiny import CAPTIONS, make_image, make_model, make_processor

from blip2_hf.data import ImageTextPairs, LanguageModelCollator
from blip2_hf.evaluation import GeneratedTextMetrics
from blip2_hf.training import Blip2Trainer, Stage2Arguments


def train_stage2(arguments: dict):
    """Train with Stage2Arguments, and evaluate."""
    transformers.logging.set_verbosity_error()
    arguments = Stage2Arguments(**arguments)
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
