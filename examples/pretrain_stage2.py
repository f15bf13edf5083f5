"""
Train stage 2 of BLIP-2: the Q-Former of stage 1 learns to write queries that a frozen language model reads.

    python examples/pretrain_stage2.py --stage1 stage1 --language_model HuggingFaceTB/SmolLM2-135M-Instruct \\
        --data pictures.parquet --output_dir stage2

    # For an encoder-decoder: given the beginning of a text, it learns the rest
    python examples/pretrain_stage2.py --stage1 stage1 --language_model google/flan-t5-xl --bf16 --prefix_lm ...

    # Another language model for a trained BLIP-2: only the projection is trained
    python examples/pretrain_stage2.py --stage1 stage2 --language_model Qwen/Qwen3-0.6B --preset projection ...

To validate by generation: --eval_strategy steps --eval_steps 1000 --save_steps 1000. To keep the best checkpoint, and
to stop without improvement, add --load_best_model_at_end --early_stopping_patience 3.

The script takes all options of transformers' `TrainingArguments`, with the paper's values as defaults. After a stop,
the same command continues from the last complete checkpoint. Other models, data or settings are refused in the same
output_dir; --overwrite deletes its checkpoints.
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from blip2_hf.data import ImageTextPairs, LanguageModelCollator, check_feature_size, hold_out, load_rows
from blip2_hf.evaluation import GeneratedTextMetrics
from blip2_hf.evaluation.metrics import caption_metrics
from blip2_hf.jobs.errors import tell_errors
from blip2_hf.jobs.names import check_names
from blip2_hf.training import (
    Stage2Arguments,
    make_stage2,
    make_trainer,
    save_result,
    train_from_last_checkpoint,
    training_pairs,
    without_bad_rows,
)


@dataclass
class PretrainingArguments:
    """Data and parts."""

    data: str = field(metadata={"help": "File, folder of features, or Hub id (:split behind it if it is not train)."})
    stage1: str = field(metadata={"help": "BLIP-2 with the tower and the Q-Former: folder or id on the Hub."})
    language_model: str = field(metadata={"help": "Any causal or sequence-to-sequence language model."})
    vision_model: str | None = field(default=None, metadata={"help": "The tower, if stage1 has none."})
    language_model_dtype: str = field(default="bfloat16", metadata={"help": "Dtype of the frozen language model."})
    prompt: str = field(default="", metadata={"help": "Text in front of the caption."})
    prefix_lm: bool = field(default=False, metadata={"help": "Give the beginning of each text, and learn the rest."})
    image_size: int = field(default=224, metadata={"help": "Side of the pictures, in pixels."})
    image_column: str = field(default="image", metadata={"help": "Column of the pictures."})
    text_column: str = field(default="caption", metadata={"help": "Column of the texts, or of lists of texts."})
    max_length: int = field(default=32, metadata={"help": "Largest number of tokens of a text."})
    id_column: str | None = field(default=None, metadata={"help": "Column of ids: equal ones show the same image."})
    held_out: float = field(default=0.02, metadata={"help": "Share or number of images to validate on."})
    streaming: bool = field(default=False, metadata={"help": "Read the data as a stream; nothing is held out."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Validations without improvement until a stop."}
    )
    allow_urls: bool = field(default=False, metadata={"help": "Fetch pictures that rows have as public URLs."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Leave out and list rows that cannot be used."})


def make_data(options: PretrainingArguments, collator: LanguageModelCollator, seed: int) -> dict:
    """Return pairs to learn from, and pairs of all rows of some images that are held out."""
    check_feature_size(options.image_size, options.data)
    rows, held_out = load_rows(options.data, streaming=options.streaming), None
    columns = {name: getattr(options, name) for name in ("image_column", "text_column", "prompt", "allow_urls")}
    learning = columns | {"prefix_lm": options.prefix_lm}
    if not options.streaming:
        rows, held_out = hold_out(rows, options.held_out, options.id_column, seed)
    elif options.skip_bad_rows:
        learning |= {"skip_broken": True, "check": collator.check}
    return {
        "train": training_pairs(rows, options.image_size, seed, **learning),
        "held_out": ImageTextPairs(held_out, train=False, **columns) if held_out else None,
    }


def main():
    parser = HfArgumentParser((PretrainingArguments, Stage2Arguments))
    parser.set_defaults(predict_with_generate=True, metric_for_best_model="word_f1")
    options, arguments = parser.parse_args_into_dataclasses()
    check_names([options.stage1, options.language_model, options.vision_model], [options.data])
    if options.early_stopping_patience is not None and not arguments.load_best_model_at_end:
        raise SystemExit(
            "--early_stopping_patience needs a best model: give --load_best_model_at_end and --eval_strategy steps."
        )
    model, processor = make_stage2(
        options.stage1,
        options.language_model,
        options.image_size,
        vision_model=options.vision_model,
        language_model_dtype=options.language_model_dtype,
        max_new_tokens=options.max_length,
    )
    collator = LanguageModelCollator(processor, max_length=options.max_length)
    data = make_data(options, collator, arguments.seed)
    if options.skip_bad_rows:
        data = without_bad_rows(data, collator, arguments.output_dir)
    train, held_out = data["train"], data["held_out"]
    metrics = None
    if held_out is not None and arguments.predict_with_generate:
        metrics = GeneratedTextMetrics(processor, held_out, caption_metrics)
    trainer = make_trainer(
        model,
        processor,
        arguments,
        train,
        held_out,
        collator,
        compute_metrics=metrics,
        early_stopping_patience=options.early_stopping_patience,
    )
    train_from_last_checkpoint(trainer, vars(options), models=["stage1", "language_model", "vision_model"])
    save_result(trainer)
    if held_out is not None:
        trainer.log_metrics("eval", trainer.evaluate())
    if arguments.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    with tell_errors("pretrain_stage2.py"):
        main()
