"""
Fine-tune a BLIP-2 to answer questions about pictures (appendix of the paper).

    python examples/finetune_vqa.py --model stage2 --stage1 stage1 --data train.parquet --validation val.parquet \\
        --image_size 490 --vision_layer_decay 0.95 --per_device_train_batch_size 16 --gradient_accumulation_steps 8 \\
        --bf16 --output_dir vqa

The data have columns of pictures, of questions, and of answers or lists of answers. Training draws one answer of a
list each time; validation and test use all of them. The metric is VQA accuracy: by the official protocol if every
question has ten answers, else a match with one of them. Questions are cleaned as in evaluation (lower case, no full
stops), and answers stay as they are. With --stage1 the Q-Former reads the question too, through stage 1's feed-forward
networks for text. With stored features, which need a frozen tower, add --preset stage2. --group_by prints the accuracy
for each value of a column.

The script takes all options of transformers' `TrainingArguments`, with the paper's values as defaults. It validates by
generation after each epoch, and keeps the best checkpoint. After a stop, the same command continues. Other models,
data or settings are refused in the same output_dir; --overwrite deletes its checkpoints.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer, HfArgumentParser

from blip2_hf import Blip2ForConditionalGeneration, Blip2Processor
from blip2_hf.data import ImageTextPairs, LanguageModelCollator, check_feature_size, check_held_out, load_rows
from blip2_hf.evaluation import GeneratedTextMetrics, score_answers
from blip2_hf.evaluation.metrics import choose_vqa_protocol, vqa_accuracy_scores
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
class VQAArguments:
    """Data and model."""

    model: str = field(metadata={"help": "BLIP-2 after stage 2: folder or id on the Hub."})
    data: str = field(metadata={"help": "File, or Hub id (:split behind it if it is not train)."})
    validation: str = field(metadata={"help": "Data to validate on, such as Hub id:validation."})
    stage1: str | None = field(default=None, metadata={"help": "Stage 1 whose networks for text the Q-Former gets."})
    test: str | None = field(default=None, metadata={"help": "Data for the last evaluation, instead of validation."})
    images: str | None = field(default=None, metadata={"help": "Pictures or features of data, by row number."})
    validation_images: str | None = field(default=None, metadata={"help": "Pictures or features of validation."})
    test_images: str | None = field(default=None, metadata={"help": "Pictures or features of test."})
    prompt: str = field(default="Question: {} Answer:", metadata={"help": "Prompt, with {} for the question."})
    image_column: str = field(default="image", metadata={"help": "Column of the pictures, or of rows of images."})
    question_column: str = field(default="question", metadata={"help": "Column of the questions."})
    answer_column: str = field(default="answer", metadata={"help": "Column of the answers."})
    group_by: str | None = field(default=None, metadata={"help": "Column whose values have an accuracy each."})
    language_model_dtype: str = field(default="bfloat16", metadata={"help": "Dtype of the frozen language model."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Such as sdpa, eager."})
    image_size: int = field(default=490, metadata={"help": "Side of the pictures, in pixels."})
    max_new_tokens: int = field(default=10, metadata={"help": "Largest number of tokens of an answer."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Epochs without improvement until a stop."}
    )
    allow_urls: bool = field(default=False, metadata={"help": "Fetch pictures that rows have as public URLs."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Leave out and list rows that cannot be used."})


def make_data(options: VQAArguments, seed: int) -> dict[str, ImageTextPairs]:
    columns = {
        "image_column": options.image_column,
        "text_column": options.answer_column,
        "prompt": options.prompt,
        "prompt_column": options.question_column,
        "allow_urls": options.allow_urls,
    }
    parts = {"train": (options.data, options.images), "validation": (options.validation, options.validation_images)}
    if options.test is not None:
        parts["test"] = (options.test, options.test_images)
    data = {}
    for name, (rows, images) in parts.items():
        kwargs = columns | {"images": None if images is None else load_rows(images)}
        if name == "train":
            data[name] = training_pairs(load_rows(rows), options.image_size, seed, flip=0, **kwargs)
        else:
            data[name] = ImageTextPairs(load_rows(rows), train=False, **kwargs)
    return data


def load_model(options: VQAArguments, preset: str | None) -> tuple[Blip2ForConditionalGeneration, Blip2Processor]:
    model, processor = load_writer(
        options.model,
        options.image_size,
        options.language_model_dtype,
        options.max_new_tokens,
        attn_implementation=options.attn_implementation,
    )
    if options.stage1 is not None:
        if (preset or "").startswith("lora"):
            raise SystemExit(
                "Adapters are saved without the networks of --stage1: attach these, and save the model first."
            )
        model.attach_text_networks(options.stage1)
        processor.qformer_tokenizer = AutoTokenizer.from_pretrained(options.stage1)
    return model, processor


def read_groups(options: VQAArguments) -> list[str]:
    """Return the column --group_by of the test questions, or of the validation's."""
    if options.group_by is None:
        return []
    return list(map(str, load_rows(options.test or options.validation)[options.group_by]))


def main():
    parser = HfArgumentParser((VQAArguments, FineTuningArguments))
    parser.set_defaults(metric_for_best_model="vqa_accuracy")
    options, arguments = parser.parse_args_into_dataclasses()
    check_held_out(options.data, options.validation, options.test)
    check_names([options.model, options.stage1], [options.data, options.validation, options.test])
    pictures = (options.images, options.validation_images, options.test_images)
    check_feature_size(options.image_size, options.data, options.validation, options.test, *pictures)
    model, processor = load_model(options, arguments.preset)
    data = make_data(options, arguments.seed)
    groups = read_groups(options)  # before the training, because the column may not exist
    positions = getattr(model.config.text_config, "max_position_embeddings", None)
    limit = model.config.qformer_config.max_position_embeddings
    collator = LanguageModelCollator(processor, max_positions=positions, max_qformer_positions=limit)
    if options.skip_bad_rows:
        data = without_bad_rows(data, collator, arguments.output_dir)
    metrics = {name: GeneratedTextMetrics(processor, data[name], score_answers) for name in data if name != "train"}
    trainer = make_trainer(
        model,
        processor,
        arguments,
        data["train"],
        data["validation"],
        collator,
        compute_metrics=metrics["validation"] if arguments.predict_with_generate else None,
        early_stopping_patience=options.early_stopping_patience,
    )
    train_from_last_checkpoint(trainer, vars(options), models=["model", "stage1"])
    save_result(trainer)

    name = "test" if "test" in data else "validation"
    test, test_metrics = data[name], metrics[name]
    # By generation, even if validation was not
    trainer.args.predict_with_generate, trainer.compute_metrics = True, test_metrics
    output = trainer.predict(test, metric_key_prefix="test")
    trainer.log_metrics("test", output.metrics)
    answers, references = test_metrics.texts(output.predictions), test_metrics.references_as_written
    protocol = choose_vqa_protocol(references)
    scores = vqa_accuracy_scores(answers, references, protocol)
    print(f"VQA accuracy by the protocol {protocol!r}")
    accuracy = {}
    for group in sorted(set(groups)):
        rows = [index for index in range(len(test)) if groups[test.place(index)] == group]
        if not rows:
            continue
        accuracy[group] = sum(scores[row] for row in rows) / len(rows)
        print(f"{group:20} {len(rows):7} questions  {accuracy[group]:.2%}")
    results = {"metrics": output.metrics, "protocol": protocol, "accuracy": accuracy, "answers": answers}
    (Path(arguments.output_dir) / "results.json").write_text(json.dumps(results))
    if arguments.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    with tell_errors("finetune_vqa.py"):
        main()
