"""
Train stage 1 of BLIP-2: a Q-Former learns from a frozen vision tower by contrast, matching and captioning.

    python examples/pretrain_stage1.py --data pictures.parquet --vision_model facebook/dinov2-small --output_dir run

    # In several processes, with the paper's batch and stored features of the tower
    blip2-hf cache-features pictures.parquet --vision-model facebook/dinov2-small --output features
    accelerate launch examples/pretrain_stage1.py --data features --vision_model facebook/dinov2-small \\
        --per_device_train_batch_size 100 --bf16 --report_to tensorboard --output_dir run

    # WebDataset's tar files, as a stream
    python examples/pretrain_stage1.py --data "shards/*.tar" --image_column jpg --text_column txt --streaming \\
        --validation held_out.tar ...

To validate on held-out images, by loss and recall: --eval_strategy steps --eval_steps 1000.

The script takes all options of transformers' `TrainingArguments`, with the paper's values as defaults. After a stop,
the same command continues from the last complete checkpoint. Other models, data or settings are refused in the same
output_dir; --overwrite deletes its checkpoints.
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from blip2_hf.data import (
    ImageTextCollator,
    ImageTextPairs,
    check_feature_size,
    check_held_out,
    hold_out,
    load_rows,
)
from blip2_hf.evaluation import contrastive_retrieval_metrics
from blip2_hf.jobs.errors import tell_errors
from blip2_hf.jobs.names import check_names
from blip2_hf.training import (
    Stage1Arguments,
    make_stage1,
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
    vision_model: str = field(metadata={"help": "Any tower of AutoModel: folder or id on the Hub."})
    text_encoder: str = field(default="google-bert/bert-base-uncased", metadata={"help": "BERT to start from."})
    vision_feature_layer: int | None = field(default=None, metadata={"help": "Index into the tower's hidden states."})
    num_query_tokens: int = field(default=32, metadata={"help": "Number of queries."})
    query_initialization: str = field(default="words", metadata={"help": "How the queries start: words or normal."})
    image_size: int = field(default=224, metadata={"help": "Side of the pictures, in pixels."})
    image_column: str = field(default="image", metadata={"help": "Column of the pictures."})
    text_column: str = field(default="caption", metadata={"help": "Column of the texts, or of lists of texts."})
    id_column: str | None = field(default=None, metadata={"help": "Column of ids: equal ones show the same image."})
    held_out: float = field(default=0.02, metadata={"help": "Share or number of images to validate on."})
    validation: str | None = field(default=None, metadata={"help": "Data to validate on, instead of held_out."})
    streaming: bool = field(default=False, metadata={"help": "Read the data as a stream."})
    allow_urls: bool = field(default=False, metadata={"help": "Fetch pictures that rows have as public URLs."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Leave out and list rows that cannot be used."})


def make_data(options: PretrainingArguments, seed: int) -> dict:
    check_held_out(options.data, options.validation)
    check_feature_size(options.image_size, options.data, options.validation)
    rows = load_rows(options.data, streaming=options.streaming)
    held_out = load_rows(options.validation) if options.validation else None
    columns = {name: getattr(options, name) for name in ("image_column", "text_column", "id_column", "allow_urls")}
    stream = {"skip_broken": options.skip_bad_rows} if options.streaming else {}
    if held_out is None and not options.streaming:
        rows, held_out = hold_out(rows, options.held_out, options.id_column, seed)
    return {
        "train": training_pairs(rows, options.image_size, seed, **columns, **stream),
        "held_out": ImageTextPairs(held_out, train=False, **columns) if held_out else None,
    }


def main():
    options, arguments = HfArgumentParser((PretrainingArguments, Stage1Arguments)).parse_args_into_dataclasses()
    check_names([options.vision_model, options.text_encoder], [options.data, options.validation])
    data = make_data(options, arguments.seed)
    model, processor = make_stage1(
        options.vision_model,
        options.text_encoder,
        options.image_size,
        vision_feature_layer=options.vision_feature_layer,
        num_query_tokens=options.num_query_tokens,
        query_initialization=options.query_initialization,
        load_vision_tower=not data["train"].has_features,
    )
    collator = ImageTextCollator(processor)
    if options.skip_bad_rows:
        data = without_bad_rows(data, collator, arguments.output_dir)
    train, held_out = data["train"], data["held_out"]
    trainer = make_trainer(
        model, processor, arguments, train, held_out, collator, compute_metrics=contrastive_retrieval_metrics
    )
    train_from_last_checkpoint(trainer, vars(options), models=["vision_model", "text_encoder"])
    save_result(trainer)
    if held_out is not None:
        trainer.log_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    with tell_errors("pretrain_stage1.py"):
        main()
