"""
Fine-tune a BLIP-2 to caption pictures (appendix of the paper).

    python examples/finetune_captioning.py --model stage2 --data train.parquet --validation val.parquet \\
        --per_device_train_batch_size 16 --gradient_accumulation_steps 16 --bf16 --output_dir captioner

    # On one small GPU: adapters in the language model only, pictures of 224 pixels
    python examples/finetune_captioning.py --model Salesforce/blip2-opt-2.7b --preset lora_language_model \\
        --image_size 224 --learning_rate 1e-4 --bf16 ...

The data have a column of pictures and a column of captions, or of lists of captions. Training draws one caption of a
list each time; validation uses all of them. With stored features, which need a frozen tower, add --preset stage2.

The script takes all options of transformers' `TrainingArguments`, with the paper's values as defaults. It validates by
generation after each epoch, and keeps the checkpoint with the best word_f1, or with the best CIDEr-D if
--metric_for_best_model CIDEr-D is given. After a stop, the same command continues. Other models, data or settings are
refused in the same output_dir; --overwrite deletes its checkpoints.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import HfArgumentParser

from blip2_hf import Blip2ForConditionalGeneration, Blip2Processor
from blip2_hf.data import (
    ImageTextPairs,
    LanguageModelCollator,
    RandomResizedCropAndFlip,
    check_feature_size,
    check_held_out,
    leave_out_bad_rows,
    load_rows,
    with_image_size,
)
from blip2_hf.evaluation import GeneratedTextMetrics
from blip2_hf.evaluation.metrics import caption_metrics
from blip2_hf.models.backbones import load_whole
from blip2_hf.models.frozen import cast_parameters
from blip2_hf.training import Blip2Trainer, FineTuningArguments, checkpoint_to_resume


@dataclass
class CaptioningArguments:
    """Data and model."""

    model: str = field(metadata={"help": "BLIP-2 after stage 2: folder or id on the Hub."})
    data: str = field(metadata={"help": "File, folder of features, or Hub id (:split behind it if it is not train)."})
    validation: str = field(metadata={"help": "Data to validate on, such as Hub id:validation."})
    language_model_dtype: str = field(default="bfloat16", metadata={"help": "Dtype of the language model."})
    prompt: str = field(default="a photo of", metadata={"help": "Text in front of the captions."})
    image_column: str = field(default="image", metadata={"help": "Column of the pictures."})
    text_column: str = field(default="caption", metadata={"help": "Column of the captions, or of lists of them."})
    image_size: int = field(default=364, metadata={"help": "Side of the pictures, in pixels."})
    max_length: int = field(default=40, metadata={"help": "Largest number of tokens of prompt and caption."})
    max_new_tokens: int = field(default=30, metadata={"help": "Largest number of tokens of a generated caption."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Epochs without improvement until a stop."}
    )
    allow_urls: bool = field(default=False, metadata={"help": "Fetch pictures that rows have as public URLs."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Leave out and list rows that cannot be used."})


def make_pairs(options: CaptioningArguments, data: str, train: bool = False, seed: int = 0) -> ImageTextPairs:
    rows = load_rows(data)
    is_cached = "image_embeds" in rows.column_names
    return ImageTextPairs(
        rows,
        image_column=options.image_column,
        text_column=options.text_column,
        prompt=options.prompt,
        allow_urls=options.allow_urls,
        transform=RandomResizedCropAndFlip(options.image_size) if train and not is_cached else None,
        seed=seed,
        train=train,
    )


def load_model(options: CaptioningArguments) -> tuple[Blip2ForConditionalGeneration, Blip2Processor]:
    expected = "A Blip2ForConditionalGeneration"
    model = load_whole(Blip2ForConditionalGeneration, options.model, expected, dtype=torch.float32)
    cast_parameters(model.language_model, getattr(torch, options.language_model_dtype))
    model.generation_config.max_new_tokens = options.max_new_tokens
    processor = Blip2Processor.from_pretrained(options.model)
    processor.image_processor = with_image_size(processor.image_processor, options.image_size)
    return model, processor


def main():
    options, arguments = HfArgumentParser((CaptioningArguments, FineTuningArguments)).parse_args_into_dataclasses()
    check_held_out(options.data, options.validation)
    check_feature_size(options.image_size, options.data, options.validation)
    model, processor = load_model(options)
    data = {
        "train": make_pairs(options, options.data, train=True, seed=arguments.seed),
        "validation": make_pairs(options, options.validation),
    }
    collator = LanguageModelCollator(processor, max_length=options.max_length)
    if options.skip_bad_rows:
        for name, pairs in data.items():
            data[name] = leave_out_bad_rows(pairs, collator, Path(arguments.output_dir) / f"bad_rows-{name}.jsonl")
    is_generated = arguments.predict_with_generate
    trainer = Blip2Trainer(
        model,
        arguments,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=collator,
        compute_metrics=GeneratedTextMetrics(processor, data["validation"], caption_metrics) if is_generated else None,
        processing_class=processor,
    )
    if options.early_stopping_patience is not None:
        trainer.add_callback(transformers.EarlyStoppingCallback(options.early_stopping_patience))
    checkpoint = checkpoint_to_resume(trainer, vars(options), models=["model"])
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.log_metrics("eval", trainer.evaluate())
    if arguments.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
