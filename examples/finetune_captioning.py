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

from transformers import HfArgumentParser

from blip2_hf.data import ImageTextPairs, LanguageModelCollator, check_feature_size, check_held_out, load_rows
from blip2_hf.evaluation import GeneratedTextMetrics
from blip2_hf.evaluation.metrics import caption_metrics
from blip2_hf.jobs.errors import tell_errors
from blip2_hf.jobs.names import check_names
from blip2_hf.training import (
    FineTuningArguments,
    load_writer,
    make_trainer,
    save_result,
    train_from_last_checkpoint,
    training_pairs,
    without_bad_rows,
)


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


def main():
    options, arguments = HfArgumentParser((CaptioningArguments, FineTuningArguments)).parse_args_into_dataclasses()
    check_held_out(options.data, options.validation)
    check_names([options.model], [options.data, options.validation])
    check_feature_size(options.image_size, options.data, options.validation)
    model, processor = load_writer(
        options.model, options.image_size, options.language_model_dtype, options.max_new_tokens
    )
    names = ("image_column", "text_column", "prompt", "allow_urls")
    columns = {name: getattr(options, name) for name in names}
    data = {
        "train": training_pairs(load_rows(options.data), options.image_size, arguments.seed, **columns),
        "validation": ImageTextPairs(load_rows(options.validation), train=False, **columns),
    }
    collator = LanguageModelCollator(processor, max_length=options.max_length)
    if options.skip_bad_rows:
        data = without_bad_rows(data, collator, arguments.output_dir)
    metrics = None
    if arguments.predict_with_generate:
        metrics = GeneratedTextMetrics(processor, data["validation"], caption_metrics)
    patience = options.early_stopping_patience
    trainer = make_trainer(
        model,
        processor,
        arguments,
        **data,
        collator=collator,
        compute_metrics=metrics,
        early_stopping_patience=patience,
    )
    train_from_last_checkpoint(trainer, vars(options), models=["model"])
    save_result(trainer)
    trainer.log_metrics("eval", trainer.evaluate())
    if arguments.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    with tell_errors("finetune_captioning.py"):
        main()
