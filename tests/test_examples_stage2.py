"""The scripts of stage 2 and fine-tuning, as a user runs them, on tiny parts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import transformers
from stage1 import STAGE1_QFORMER, make_stage1
from tiny import LANGUAGE_MODELS, make_image, make_image_processor, make_tokenizer
from train_stage1 import Processor

from blip2_hf import Blip2ForConditionalGeneration, Blip2Processor


EXAMPLES = Path(__file__).parents[1] / "examples"
FEATURES = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})


def write_rows(path: Path, broken: bool = False):
    captions = ["a dog", "a red bus", "two people", "the sky", "" if broken else "grass", "a woman"]
    rows = {"image": [make_image(i) for i in range(6)], "caption": captions}
    rows |= {"question": [f"what is it {i}?" for i in range(6)], "kind": ["animal", "thing"] * 3}
    features = FEATURES | {"question": datasets.Value("string"), "kind": datasets.Value("string")}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)


def run(script: str, folder: Path, *options: str) -> str:
    common = "--per_device_train_batch_size 2 --max_steps 2 --warmup_steps 1 --logging_steps 1 --report_to none"
    command = [sys.executable, str(EXAMPLES / script), "--output_dir", str(folder), "--use_cpu", "--image_size", "28"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *common.split(), *options], env=environment, capture_output=True, text=True, cwd=folder.parent
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    make_stage1(num_query_tokens=4).save_pretrained(folder / "stage1")
    tokenizer = Processor().tokenizer
    Blip2Processor(make_image_processor(), tokenizer, is_encoder_decoder=False).save_pretrained(folder / "stage1")
    assert len(tokenizer) <= STAGE1_QFORMER["vocab_size"]
    for name, model in {"llama": transformers.LlamaForCausalLM, "t5": transformers.T5ForConditionalGeneration}.items():
        model(LANGUAGE_MODELS[name]()).save_pretrained(folder / name)
        make_tokenizer(bos=name != "t5", eos=name == "t5").save_pretrained(folder / name)
    write_rows(folder / "rows.parquet")
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
    data = ("--data", str(parts / "rows.parquet"), "--validation", str(parts / "rows.parquet"))
    once = ("--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2")
    printed = run("finetune_captioning.py", tmp_path / "captioner", "--model", str(stage2), *data, *once)
    assert "eval_word_f1" in printed
    printed = run(
        "finetune_vqa.py",
        tmp_path / "vqa",
        *("--model", str(stage2), "--stage1", str(parts / "stage1"), *data, *once),
        *("--answer_column", "caption", "--group_by", "kind", "--vision_layer_decay", "0.9"),
    )
    results = json.loads((tmp_path / "vqa" / "results.json").read_text())
    assert len(results["answers"]) == 6 and results["accuracy"].keys() == {"animal", "thing"}
    assert "animal" in printed
    trained = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "vqa")
    assert trained.config.qformer_config.use_qformer_text_input
    processor = Blip2Processor.from_pretrained(tmp_path / "vqa")
    inputs = processor(images=make_image(), text="Question: what is it? Answer:", return_tensors="pt")
    assert "qformer_input_ids" in inputs and trained.generate(**inputs, max_new_tokens=2).shape[0] == 1
