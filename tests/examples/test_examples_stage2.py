"""The scripts of stage 2 and fine-tuning, as a user runs them, on tiny parts."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from paths import EXAMPLES
from processes import run_script
from stage1 import STAGE1_QFORMER, Processor, make_stage1
from tiny import LANGUAGE_MODELS, assert_sees_the_whole, make_cropping_image_processor, make_image, make_tokenizer

from blip2_hf import Blip2ForConditionalGeneration, Blip2Processor
from blip2_hf.cli import main
from blip2_hf.data import clean_question
from blip2_hf.evaluation.metrics import vqa_accuracy_scores
from blip2_hf.jobs.errors import shorten


FEATURES = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})


def write_rows(path: Path, broken: bool = False):
    captions = ["a dog", "a red bus", "two people", "the sky", "" if broken else "grass", "a woman"]
    rows = {"image": [make_image(i) for i in range(6)], "caption": captions}
    questions = [f"what is it {i}?" for i in range(5)] + ["what " * 600 if broken else "where?"]
    rows |= {"question": questions, "kind": ["animal", "thing"] * 3}
    rows |= {
        "answers": [[caption, *["an answer"] * 9] for caption in captions],
        "picture": ["a", "a", "a", "b", "b", "b"],
    }
    features = FEATURES | {name: datasets.Value("string") for name in ("question", "kind", "picture")}
    features["answers"] = datasets.List(datasets.Value("string"))
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)


def run(script: str, folder: Path, *options: str, error: str | None = None) -> str:
    common = "--per_device_train_batch_size 2 --max_steps 2 --warmup_steps 1 --logging_steps 1 --report_to none"
    options = ("--output_dir", str(folder), "--use_cpu", "--image_size", "28", *common.split(), *options)
    printed = run_script(EXAMPLES / script, *options, folder=folder.parent, fails=error is not None)
    assert error is None or error in printed.stderr
    return printed.stdout


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    make_stage1(num_query_tokens=4).save_pretrained(folder / "stage1")
    tokenizer = Processor().tokenizer
    Blip2Processor(make_cropping_image_processor(), tokenizer, is_encoder_decoder=False).save_pretrained(
        folder / "stage1"
    )
    assert len(tokenizer) <= STAGE1_QFORMER["vocab_size"]
    for name, model in {"llama": transformers.LlamaForCausalLM, "t5": transformers.T5ForConditionalGeneration}.items():
        model(LANGUAGE_MODELS[name]()).save_pretrained(folder / name)
        make_tokenizer(bos=name != "t5", eos=name == "t5").save_pretrained(folder / name)
    write_rows(folder / "rows.parquet")
    write_rows(folder / "other.parquet")
    write_rows(folder / "broken.parquet", broken=True)
    return folder


@pytest.mark.parametrize("language_model", ["llama", "t5"])
def test_stage_2_then_captions_then_answers(parts, tmp_path, language_model):
    options = ("--prefix_lm",) if language_model == "t5" else ()
    stage2 = tmp_path / "stage2"
    printed = run(
        "pretrain_stage2.py",
        stage2,
        *("--stage1", str(parts / "stage1"), "--language_model", str(parts / language_model), "--held_out", "2"),
        *("--data", str(parts / "broken.parquet"), "--skip_bad_rows", "--save_strategy", "no", *options),
    )
    assert "language_projection" in printed and "1 bad row: 1 text empty." in printed
    files = [stage2 / f"bad_rows-{part}.jsonl" for part in ("train", "held_out")]
    bad = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert [row["kind"] for row in bad] == ["text empty"]
    model = Blip2ForConditionalGeneration.from_pretrained(stage2)
    assert model.config.text_config.model_type == language_model
    data = ("--data", str(parts / "rows.parquet"), "--validation", str(parts / "other.parquet"))
    long = ("--data", str(parts / "broken.parquet"), *data[2:], "--skip_bad_rows")
    once = ("--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2")
    best = ("--metric_for_best_model", "CIDEr-D")
    printed = run("finetune_captioning.py", tmp_path / "captioner", "--model", str(stage2), *data, *once, *best)
    assert "eval_word_f1" in printed and "eval_CIDEr-D" in printed
    state = json.loads((tmp_path / "captioner" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_metric"] == state["log_history"][-1]["eval_CIDEr-D"]
    printed = run(
        "finetune_vqa.py",
        tmp_path / "vqa",
        *(
            "--model",
            str(stage2),
            "--stage1",
            str(parts / "stage1"),
            *long,
            *once,
            "--language_model_dtype",
            "float32",
        ),
        *("--answer_column", "caption", "--group_by", "kind", "--vision_layer_decay", "0.9"),
    )
    results = json.loads((tmp_path / "vqa" / "results.json").read_text())
    assert len(results["answers"]) == 6 and results["accuracy"].keys() == {"animal", "thing"}
    assert "animal" in printed and "by the protocol 'exact'" in printed
    assert results["metrics"]["test_vqa_accuracy"] == pytest.approx(sum(results["accuracy"].values()) / 2)
    state = json.loads((tmp_path / "vqa" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_metric"] == state["log_history"][-1]["eval_vqa_accuracy"]
    bad = [json.loads(line) for line in (tmp_path / "vqa" / "bad_rows-train.jsonl").read_text().splitlines()]
    assert [(row["row"], row["kind"]) for row in bad] == [(4, "text empty"), (5, "text too long")]
    assert "the Q-Former has" in bad[1]["reason"]
    trained = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "vqa")
    assert trained.config.qformer_config.use_qformer_text_input
    for folder in (stage2, tmp_path / "captioner", tmp_path / "vqa"):
        processor = Blip2Processor.from_pretrained(folder)
        assert_sees_the_whole(processor.image_processor, 28)
    assert evaluated_answers(tmp_path / "vqa", parts / "other.parquet") == results["answers"]
    inputs = processor(images=make_image(), text="Question: what is it? Answer:", return_tensors="pt")
    assert "qformer_input_ids" in inputs and trained.generate(**inputs, max_new_tokens=2).shape[0] == 1


def evaluated_answers(model: Path, data: Path) -> list[str]:
    """What `blip2-hf evaluate vqa` and the pipeline say of the test, which must be what the script said of it."""
    output, prompt = model.parent / "evaluated", "Question: {} Answer:"
    greedy = ("num_beams=1", "length_penalty=1.0", "max_new_tokens=10", "min_new_tokens=0")
    options = ("--answer-column", "caption", "--prompt", prompt, "--generate", *greedy, "--dtype", "float32")
    command = (
        "evaluate",
        "vqa",
        "--model",
        str(model),
        "--data",
        str(data),
        "--output",
        str(output),
        "--device",
        "cpu",
    )
    main([*command, *options])
    answers = [entry["answer"] for entry in json.loads((output / "predictions.json").read_text())]
    pipe = transformers.pipeline("visual-question-answering", model=str(model), device="cpu", dtype="float32")
    for row, answer in zip(
        datasets.load_dataset("parquet", data_files=str(data), split="train"), answers, strict=True
    ):
        asked = {"image": row["image"], "question": clean_question(row["question"])}
        assert pipe(asked, prompt_template=prompt, max_new_tokens=10)[0]["answer"] == answer
    return [answer.partition("\n")[0].strip() for answer in answers]


def stage2_options(parts: Path, *options: str) -> tuple[str, ...]:
    names = ("--stage1", str(parts / "stage1"), "--language_model", str(parts / "llama"))
    return (*names, "--data", str(parts / "rows.parquet"), *options)


def test_stage_2_stops_early_and_keeps_the_best_checkpoint(parts, tmp_path):
    stage2 = tmp_path / "stage2"
    early = ("--early_stopping_patience", "2")
    run("pretrain_stage2.py", stage2, *stage2_options(parts, *early), error="give --load_best_model_at_end")
    steps = ("--max_steps", "8", "--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1")
    # What learns nothing gets no better than it was at first
    still = ("--learning_rate", "0", "--load_best_model_at_end", *early)
    # Half of the rows show one picture, half of them the other
    apart = ("--held_out", "1", "--id_column", "picture", "--skip_bad_rows")
    printed = run("pretrain_stage2.py", stage2, *stage2_options(parts, *steps, *still, *apart))
    assert "eval_word_f1" in printed and printed.count("No bad rows.") == 2
    assert {path.name for path in stage2.glob("checkpoint-*")} == {f"checkpoint-{i}" for i in (1, 2, 3)}
    state = json.loads((stage2 / "checkpoint-3" / "trainer_state.json").read_text())
    # Of equal ones the last is the best
    assert (state["global_step"], state["max_steps"], state["best_global_step"]) == (3, 8, 3)
    # Three rows are left to learn from: two batches an epoch
    assert state["num_train_epochs"] == 4


def test_stage_2_with_nothing_held_out(parts, tmp_path):
    options = stage2_options(parts, "--skip_bad_rows", "--save_strategy", "no")
    for name, held_out in (("none", ("--held_out", "0")), ("few", ())):
        printed = run("pretrain_stage2.py", tmp_path / name, *options, *held_out)
        assert printed.count("No bad rows.") == 1 and "eval_" not in printed
        assert not (tmp_path / name / "bad_rows-held_out.jsonl").exists()


@pytest.mark.parametrize("script", ["finetune_captioning.py", "finetune_vqa.py"])
def test_fine_tuning_is_not_validated_on_what_it_learns(script, parts, tmp_path):
    rows = str(parts / "rows.parquet")
    options = ("--model", str(parts / "none"), "--data", rows, "--validation", rows)
    run(script, tmp_path / "out", *options, error="which is what is learned from")


def test_another_model_is_not_taken_for_the_one_that_was_trained(parts, tmp_path):
    """The same output_dir with another model: an error that names it; with --overwrite that model is trained."""
    model = Blip2ForConditionalGeneration.from_pretrained_parts(parts / "stage1", parts / "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts / "llama")
    processor = Blip2Processor(make_cropping_image_processor(), tokenizer, num_query_tokens=4)
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        torch.nn.init.normal_(model.language_model.get_output_embeddings().weight)
    options = ("--data", str(parts / "rows.parquet"), "--validation", str(parts / "other.parquet"))
    options += ("--language_model_dtype", "float32", "--load_best_model_at_end", "false")
    options += ("--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "no")
    out = tmp_path / "out"
    run("finetune_captioning.py", out, "--model", str(tmp_path / "first"), *options)
    second = ("--model", str(tmp_path / "second"), *options)
    run(
        "finetune_captioning.py",
        out,
        *second,
        error=f"--model: {shorten(f'{tmp_path}/first')} there, {shorten(f'{tmp_path}/second')} now",
    )
    run("finetune_captioning.py", out, *second, "--overwrite")
    trained, given = (Blip2ForConditionalGeneration.from_pretrained(path) for path in (out, tmp_path / "second"))
    head = "language_model.lm_head.weight"
    assert torch.equal(trained.state_dict()[head], given.state_dict()[head])


@pytest.mark.parametrize("script", ["finetune_captioning.py", "finetune_vqa.py"])
def test_fine_tuning_validates_by_loss_without_generation(script, parts, tmp_path):
    model = Blip2ForConditionalGeneration.from_pretrained_parts(parts / "stage1", parts / "llama")
    model.save_pretrained(tmp_path / "stage2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts / "llama")
    Blip2Processor(make_cropping_image_processor(), tokenizer, num_query_tokens=4).save_pretrained(tmp_path / "stage2")
    data = ("--data", str(parts / "rows.parquet"), "--validation", str(parts / "other.parquet"))
    by_loss = ("--predict_with_generate", "false", "--metric_for_best_model", "loss", "--greater_is_better", "false")
    once = ("--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2")
    column = ("--answer_column", "answers", "--group_by", "kind") if script == "finetune_vqa.py" else ()
    printed = run(script, tmp_path / "out", "--model", str(tmp_path / "stage2"), *data, *by_loss, *once, *column)
    assert "eval_loss" in printed and "eval_word_f1" not in printed
    # The model's own processor cuts out the middle: not so what is learned from, nor what comes of it
    assert_sees_the_whole(Blip2Processor.from_pretrained(tmp_path / "out").image_processor, 28)
    # Answers are tested by generation all the same
    assert (tmp_path / "out" / "results.json").exists() == bool(column) == ("test_vqa_accuracy" in printed)
    if column:
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        rows = datasets.Dataset.from_parquet(str(parts / "other.parquet"))
        scores = vqa_accuracy_scores(results["answers"], rows["answers"])
        assert results["protocol"] == "official" and results["metrics"]["test_vqa_accuracy"] == np.mean(scores)
        assert results["accuracy"] == {"animal": np.mean(scores[::2]), "thing": np.mean(scores[1::2])}
