"""`blip2-hf finetune` and `blip2-hf pretrain` with tiny models, and what the other commands make of the results."""

import json
import re
import shutil
from pathlib import Path

import datasets
import peft
import pytest
import torch
import transformers
from saved_models import save_captioner, save_stage1
from tiny import (
    CAPTIONS,
    LANGUAGE_MODELS,
    ROTARY,
    VISION,
    VOCAB_SIZE,
    assert_sees_the_whole,
    make_image,
    make_pixel_values,
    make_processor,
    make_tokenizer,
)

import blip2_hf
from blip2_hf import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2ForPreTraining,
    Blip2Model,
    Blip2Processor,
    training,
)
from blip2_hf.cli import main
from blip2_hf.cli._trainer_options import _METRICS
from blip2_hf.cli.finetune import _TASKS
from blip2_hf.jobs.inference import load_model


ROWS = 24
STEPS = ["--max-steps", "2", "--batch-size", "4", "--device", "cpu"]
FAST = [*STEPS, "--learning-rate", "0.05"]
CAPTION = ["--num-workers", "0", "--device", "cpu", "--max-new-tokens", "4"]


def write_rows(path: Path, captions: list[str | None]):
    rows = {"image": [make_image(i) for i in range(len(captions))], "caption": captions}
    rows |= {"question": ["what is it?"] * len(captions), "answer": [text or "none" for text in captions]}
    features = {"image": datasets.Image()} | {name: datasets.Value("string") for name in [*rows][1:]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """Models, rows, pictures, and adapters that were trained on the rows."""
    folder = tmp_path_factory.mktemp("shared")
    save_captioner(folder / "captioner")
    save_stage1(folder / "stage1")
    write_rows(folder / "rows.parquet", (CAPTIONS * ROWS)[:ROWS])
    write_rows(folder / "gaps.parquet", [*CAPTIONS, "", None, *CAPTIONS])
    (folder / "photos").mkdir()
    for seed in range(3):
        make_image(seed).save(folder / "photos" / f"{seed}.png")
    rows = [{"image": "photos/gone.png" if i == 20 else f"photos/{i % 3}.png", "caption": "a"} for i in range(ROWS)]
    (folder / "gone.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run" / "checkpoint-2").mkdir(parents=True)
    (folder / "run" / "checkpoint-2" / "config.json").write_text("{}")
    finetune(folder, "rows.parquet", "captioner", "adapters", *FAST, "--held-out", "12")
    return folder


@pytest.fixture
def work(shared, tmp_path, monkeypatch) -> Path:
    """The shared folder as the working directory, in which each test writes to a folder of its own."""
    monkeypatch.chdir(shared)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def finetune(folder: Path, data: str, model: str, output: Path | str, *options: str):
    main(["finetune", str(folder / data), "--model", str(folder / model), "--output", str(folder / output), *options])


def refusal(arguments: list[str], capsys) -> str:
    """Return the line with which a command ends."""
    with pytest.raises(SystemExit) as error:
        main(arguments)
    text = error.value.code if isinstance(error.value.code, str) else capsys.readouterr().err
    assert "\n" not in text.strip()
    return text


def test_captions_are_learned_by_adapters(shared, work, capsys):
    output = shared / "adapters"
    names = {path.name for path in output.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "processor_config.json", "samples.md"} <= names
    assert not names & {"config.json", "model.safetensors"}
    config = json.loads((output / "adapter_config.json").read_text())
    # Found from any working directory, and by Auto classes
    assert config["base_model_name_or_path"] == str(shared / "captioner")
    table = (output / "samples.md").read_text()
    assert re.search(r"## Step 2, CIDEr-D \d", table) and table.count("| row ") == 8 and "a dog" in table
    state = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())
    scores = [logs for logs in state["log_history"] if "eval_CIDEr-D" in logs]
    assert [logs["step"] for logs in scores] == [2] and state["best_global_step"] == 2

    # The same command once more finds it finished, and says where the model is and what to do with it
    capsys.readouterr()
    finetune(shared, "rows.parquet", "captioner", "adapters", *FAST, "--held-out", "12")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"The model is in {output} (CIDEr-D 0.") and "blip2-hf caption FOLDER --model" in last


def test_other_commands_take_adapters(shared, work, capsys):
    adapters = str(shared / "adapters")
    texts = {}
    for model in ("captioner", adapters):
        output = work / f"{Path(model).name}.jsonl"
        main(["caption", "rows.parquet", "--model", model, "--output", str(output), *CAPTION])
        texts[model] = [json.loads(line)["caption"] for line in output.read_text().splitlines()]
    assert len(texts[adapters]) == ROWS and texts[adapters] != texts["captioner"]
    # Captions of the base model are not those of the adapters
    with pytest.raises(SystemExit, match=r"weights.*--overwrite"):
        main(["caption", "rows.parquet", "--model", "captioner", "--output", str(output), *CAPTION])
    scores = ["evaluate", "caption", "--data", "rows.parquet", "--output", str(work / "scores"), "--device", "cpu"]
    main([*scores, "--model", adapters, "--generate", "max_new_tokens=4", "min_new_tokens=0"])
    assert json.loads((work / "scores" / "results.json").read_text())["num_scored"] == {"overall": ROWS}
    main(["look", "photos/0.png", "--model", adapters, "--output", str(work / "look.png"), "--device", "cpu"])
    capfilt = ["capfilt", "rows.parquet", "--captioner", adapters, "--filter", "stage1", "--device", "cpu"]
    main([*capfilt, "--output", str(work / "capfilt"), "--num-captions", "2", "--num-workers", "0"])
    main(["export", adapters, "--output", str(work / "encoder.pt2")])
    assert (work / "look.png").exists() and (work / "encoder.pt2").exists()


def test_adapters_are_merged_by_convert_and_by_finetune(shared, work):
    main(["convert", str(shared / "adapters"), "--output", str(work / "converted")])
    merge = ["--dtype", "float32", "--held-out", "12"]
    finetune(shared, "rows.parquet", "captioner", work / "apart", *FAST, *merge)
    finetune(shared, "rows.parquet", "captioner", work / "merged", *FAST, *merge, "--merge")
    main(["convert", str(work / "apart"), "--output", str(work / "apart-converted")])
    merged, apart = (
        Blip2ForConditionalGeneration.from_pretrained(work / name) for name in ("merged", "apart-converted")
    )
    inputs = {"pixel_values": make_pixel_values(2), "input_ids": torch.tensor([[5, 6, 7]] * 2)}
    expected = load_model(Blip2ForConditionalGeneration, work / "apart", "")(**inputs).logits
    base = Blip2ForConditionalGeneration.from_pretrained("captioner")(**inputs).logits
    assert (expected - base).abs().max() > 1e-2
    for model in (merged, apart):
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert not (work / "merged" / "adapter_config.json").exists()
    # One limit of length, of which no batch is warned
    settings = json.loads((work / "merged" / "generation_config.json").read_text())
    assert settings["max_new_tokens"] == 30 and "max_length" not in settings
    # Without --merge the whole model gives way to the adapters
    finetune(shared, "rows.parquet", "captioner", work / "merged", *FAST, *merge)
    names = {path.name for path in (work / "merged").iterdir()}
    assert "adapter_config.json" in names and not names & {"config.json", "model.safetensors"}


def test_python_takes_adapters(shared, work):
    inputs = {"pixel_values": make_pixel_values(2), "input_ids": torch.tensor([[5, 6, 7]] * 2)}
    expected = load_model(Blip2ForConditionalGeneration, shared / "adapters", "").eval()(**inputs).logits
    assert blip2_hf.__version__
    models = [
        peft.AutoPeftModel.from_pretrained(shared / "adapters"),
        Blip2ForConditionalGeneration.from_pretrained(shared / "adapters"),
        transformers.AutoModelForImageTextToText.from_pretrained(shared / "adapters"),
    ]
    for model in models:
        torch.testing.assert_close(model.eval()(**inputs).logits, expected)
    assert isinstance(models[0].get_base_model(), Blip2ForConditionalGeneration)
    pipe = transformers.pipeline("image-to-text", model=str(shared / "adapters"), device="cpu", dtype="float32")
    torch.testing.assert_close(pipe.model(**inputs).logits, expected)


@pytest.mark.parametrize("of_transformers", [False, True], ids=["ours", "published"])
def test_a_pipeline_of_adapters_has_their_prompt_and_their_size_of_pictures(of_transformers, work, capsys):
    """transformers' `pipeline` takes the processor of the base model, and for a published one its own class."""
    base, tuned, sized = work / "base", work / "tuned", ["--prompt", "the", "--image-size", "42"]
    save_captioner(base, transformers_compatible=of_transformers)
    finetune(Path(), "rows.parquet", base, tuned, *FAST, *sized, "--held-out", "4")
    capsys.readouterr()
    main(["caption", "photos/0.png", "--model", str(tuned), *CAPTION])
    printed = capsys.readouterr().out.split()

    captioner = transformers.pipeline("image-to-text", model=str(tuned), device="cpu")
    assert isinstance(captioner.model, Blip2ForConditionalGeneration)
    assert captioner.processor.prompt == "the"
    assert_sees_the_whole(captioner.image_processor, 42)
    (caption,) = captioner("photos/0.png", max_new_tokens=4)
    assert caption["generated_text"].split() == printed
    # A processor that is given is kept, and other models are loaded as before
    given = transformers.pipeline("image-to-text", model=str(tuned), processor=str(base), device="cpu")
    alone = transformers.pipeline("image-to-text", model=str(base), device="cpu")
    assert [getattr(pipe.processor, "prompt", None) for pipe in (given, alone)] == [None, None]
    assert isinstance(alone.model, Blip2ForConditionalGeneration) is not of_transformers
    chat = transformers.pipeline("image-text-to-text", model=str(tuned), device="cpu")
    assert chat.processor.prompt == "the"


def test_a_pipeline_that_compares_has_the_size_of_pictures_of_its_adapters(work):
    options = ["--task", "retrieval", "--preset", "lora_qformer", "--image-size", "42", "--held-out", "4"]
    finetune(Path(), "rows.parquet", "stage1", work / "tuned", *FAST, *options)
    classifier = transformers.pipeline("zero-shot-image-classification", model=str(work / "tuned"), device="cpu")
    assert_sees_the_whole(classifier.image_processor, 42)
    labels = classifier("photos/0.png", candidate_labels=["a dog", "a bus"])
    assert {row["label"] for row in labels} == {"a dog", "a bus"}
    features = transformers.pipeline("image-feature-extraction", model=str(work / "tuned"), device="cpu")
    assert isinstance(features.model, Blip2Model)


def test_answers(work):
    output = work / "vqa"
    finetune(
        Path(), "rows.parquet", "captioner", output, *FAST, "--task", "vqa", "--held-out", "12", "--eval-steps", "1"
    )
    state = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())
    scores = {logs["step"]: logs["eval_vqa_accuracy"] for logs in state["log_history"] if "eval_loss" in logs}
    assert scores.keys() == {1, 2} and state["best_metric"] == max(scores.values())
    assert (output / "samples.md").read_text().count("## Step") == 2


def test_retrieval_starts_from_stage_1_and_trains_the_tower(work):
    output = work / "retrieval"
    options = ["--task", "retrieval", "--held-out", "12", "--image-size", "42"]
    finetune(Path(), "rows.parquet", "stage1", output, *FAST, *options)
    before, after = (Blip2ForPreTraining.from_pretrained(path) for path in ("stage1", output))
    changed = {n for n, p in before.named_parameters() if not torch.equal(p, after.get_parameter(n))}
    for part in ("vision_model.encoder", "qformer", "query_tokens", "itm_head", "lm_head", "temperature"):
        assert any(name.startswith(part) for name in changed), part
    settings = json.loads((output / "_settings.json").read_text())
    expected = {"vision_layer_decay": 0.95, "adam_beta1": 0.9, "adam_beta2": 0.999, "weight_decay": 0.05}
    assert {name: settings[f"--{name}"] for name in expected} == expected
    state = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())
    (scores,) = [logs for logs in state["log_history"] if "eval_mean_recall" in logs]
    assert state["best_metric"] == scores["eval_mean_recall"] and {"eval_loss_itc", "eval_loss_itg"} <= scores.keys()
    assert_sees_the_whole(Blip2Processor.from_pretrained(output).image_processor, 42)
    Blip2ForImageTextRetrieval.from_pretrained(output)
    index = ["--index", str(work / "index"), "--num-workers", "0", "--device", "cpu"]
    main(["index", "photos", "--model", str(output), *index])
    main(["evaluate", "retrieval", "--data", "rows.parquet", "--model", str(output), "--output", str(work / "scores")])


def test_retrieval_by_adapters(work):
    output = work / "retrieval"
    options = ["--task", "retrieval", "--held-out", "12", "--image-size", "28", "--preset", "lora_qformer"]
    finetune(Path(), "rows.parquet", "stage1", output, *FAST, *options)
    main(["index", "photos", "--model", str(output), "--index", str(work / "index"), "--num-workers", "0"])
    main(["index", "photos", "--model", "stage1", "--index", str(work / "other"), "--num-workers", "0"])
    with pytest.raises(SystemExit, match="weights"):
        main(["index", "photos", "--model", "stage1", "--index", str(work / "index"), "--num-workers", "0"])
    model = peft.AutoPeftModel.from_pretrained(output)
    assert isinstance(model.get_base_model(), Blip2ForPreTraining)


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_learn_on_a_language_model_in_few_bits(bits, work, monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    # A CPU that multiplies in bfloat16 packs weights, which fails for narrow ones
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    sizes = {**ROTARY, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    language_model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    base = Blip2ForConditionalGeneration.from_pretrained("captioner")
    joined = Blip2ForConditionalGeneration.from_pretrained_parts(
        base, language_model, image_token_index=VOCAB_SIZE - 1
    )
    joined.save_pretrained(work / "wide")
    make_processor().save_pretrained(work / "wide")
    load, kinds = training.load_writer, set()

    def note_kinds(*args, **kwargs):
        model, processor = load(*args, **kwargs)
        kinds.update(
            n.partition(".")[0] for n, m in model.named_modules() if type(m).__module__.startswith("bitsandb")
        )
        return model, processor

    monkeypatch.setattr(training, "load_writer", note_kinds)
    finetune(Path(), "rows.parquet", work / "wide", work / "out", *FAST, f"--load-in-{bits}bit", "--held-out", "4")
    assert kinds == {"language_model"}
    main(["caption", "photos", "--model", str(work / "out"), "--output", str(work / "c.jsonl"), *CAPTION])
    assert len((work / "c.jsonl").read_text().splitlines()) == 3
    four_bits = transformers.BitsAndBytesConfig(load_in_4bit=True)
    model = peft.AutoPeftModel.from_pretrained(work / "out", quantization_config=four_bits)
    layer = model.get_base_model().language_model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, bitsandbytes.nn.Linear4bit | peft.tuners.lora.bnb.Linear4bit)
    with torch.no_grad():
        assert (
            model.eval()(pixel_values=make_pixel_values(1), input_ids=torch.tensor([[5, 6]])).logits.isfinite().all()
        )


def test_the_same_command_goes_on_and_another_is_refused(work, capsys):
    command = ["finetune", "rows.parquet", "--model", "captioner", "--output", str(work / "out")]
    command += ["--batch-size", "4", "--held-out", "12", "--logging_steps=1"]
    main([*command, "--max-steps", "1"])
    main([*command, "--max-steps", "3"])
    state = json.loads((work / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert [logs["step"] for logs in state["log_history"] if "loss" in logs] == [1, 2, 3]
    text = refusal([*command, "--max-steps", "3", "--prompt", "a drawing of"], capsys)
    assert "--prompt: 'a photo of' there, 'a drawing of' now" in text and "--overwrite" in text
    main([*command, "--max-steps", "1", "--prompt", "a drawing of", "--overwrite"])
    assert [path.name for path in (work / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    assert (work / "out" / "samples.md").read_text().count("## Step") == 1


def test_stored_features_need_a_frozen_tower(work, capsys):
    for model in ("captioner", "stage1"):
        cache = ["cache-features", "rows.parquet", "--model", model, "--size", "28", "--dtype", "float32"]
        main([*cache, "--output", str(work / f"features-{model}")])
    command = ["finetune", str(work / "features-captioner"), "--model", "captioner", *STEPS, "--held-out", "4"]
    text = refusal([*command, "--preset", "finetune", "--output", str(work / "refused")], capsys)
    assert "--preset finetune trains it. Give --preset lora_language_model" in text
    main([*command, "--output", str(work / "captions")])
    assert (work / "captions" / "samples.md").read_text().count("| row ") == 4
    command = ["finetune", str(work / "features-stage1"), "--model", "stage1", "--task", "retrieval", *STEPS]
    command += ["--image-size", "28", "--output", str(work / "retrieval")]
    assert "Give --preset stage1" in refusal(command, capsys)
    main([*command, "--preset", "stage1"])
    Blip2ForImageTextRetrieval.from_pretrained(work / "retrieval")


def test_a_fine_tuned_model_goes_on_with_its_prompt(work):
    once, twice = work / "once", work / "twice"
    finetune(Path(), "rows.parquet", "captioner", once, *STEPS, "--merge", "--prompt", "a dog on")
    finetune(Path(), "rows.parquet", once, twice, *STEPS)
    assert [Blip2Processor.from_pretrained(place).prompt for place in (once, twice)] == ["a dog on"] * 2
    finetune(Path(), "rows.parquet", once, work / "answers", *STEPS, "--task", "vqa")
    assert Blip2Processor.from_pretrained(work / "answers").prompt == "Question: {} Answer:"


def test_a_fine_tuned_model_chats_with_its_prompt(work):
    shutil.copytree("captioner", work / "chatty")
    processor = Blip2Processor.from_pretrained("captioner")
    processor.chat_template = processor.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    )
    processor.save_pretrained(work / "chatty")
    chat = [{"role": "user", "content": "why?"}]
    assert Blip2Processor.from_pretrained(work / "chatty").apply_chat_template(chat) == "[why?]"
    finetune(Path(), "rows.parquet", work / "chatty", work / "asked", *STEPS, "--merge", "--task", "vqa")
    assert Blip2Processor.from_pretrained(work / "asked").apply_chat_template(chat) == "Question: why? Answer:"


def test_rows_without_text(work, capsys):
    command = ["finetune", "gaps.parquet", "--model", "captioner", "--output", str(work / "out"), *STEPS]
    text = refusal(command, capsys)
    assert (
        "2 of 14 rows of gaps.parquet, row 6 for one, have no text in the column 'caption'" in text
        and "--skip-bad-rows" in text
    )
    main([*command, "--skip-bad-rows"])
    printed = capsys.readouterr().out
    assert "2 of 14 rows of gaps.parquet have no text, and are left out." in printed
    # One picture tells too little for CIDEr-D
    assert "Held-out pictures: 1, too few for CIDEr-D" in printed and "(loss" in printed.splitlines()[-1]
    bad = [json.loads(line) for line in (work / "out" / "bad_rows-train.jsonl").read_text().splitlines()]
    assert [(row["row"], row["kind"]) for row in bad] == [(6, "text missing"), (7, "text missing")]


def test_a_picture_that_is_not_there_is_left_out(work):
    finetune(Path(), "gone.jsonl", "captioner", work / "out", *STEPS, "--skip-bad-rows", "--held-out", "0")
    lists = [path.read_text().splitlines() for path in (work / "out").glob("bad_rows-*.jsonl")]
    (row,) = [json.loads(line) for lines in lists for line in lines]
    assert row["row"] == 20 and "gone.png" in row["reason"]


def test_validation_without_generation(work, capsys):
    options = ["--predict-with-generate", "false", "--held-out", "12"]
    finetune(Path(), "rows.parquet", "captioner", work / "out", *STEPS, *options)
    assert "(loss" in capsys.readouterr().out.splitlines()[-1]


def test_options_of_trainer_and_what_is_not_validated(work, capsys):
    output = work / "out"
    options = ["--held-out", "0", "--save_strategy", "no", "--weight-decay", "0.25", "--adam_beta2=0.5"]
    finetune(Path(), "rows.parquet", "captioner", output, *STEPS, *options, "--preset", "projection")
    settings = json.loads((output / "_settings.json").read_text())
    assert (settings["--weight_decay"], settings["--adam_beta2"]) == (0.25, 0.5)
    # The paper's rate, because there are no adapters
    assert settings["--learning_rate"] == 1e-5 and settings["--preset"] == "projection"
    assert "eval_" not in capsys.readouterr().out and not (output / "samples.md").exists()
    assert Blip2ForConditionalGeneration.from_pretrained(output).generation_config.max_new_tokens == 30


@pytest.mark.parametrize(
    ("saved", "told"),
    [(True, "goes on from the last checkpoint"), (False, "begins again: no checkpoint was saved yet")],
)
def test_ctrl_c_says_what_the_same_command_does(saved, told, work, capsys, monkeypatch):
    def interrupt(trainer, *args, **kwargs):
        if saved:
            Path(trainer.args.output_dir, "checkpoint-1").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train_from_last_checkpoint", interrupt)
    with pytest.raises(SystemExit) as stopped:
        finetune(Path(), "rows.parquet", "captioner", work / "out", *STEPS)
    message = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 130 and message == f"blip2-hf: stopped. The same command {told}."


@pytest.mark.parametrize("task", _TASKS)
def test_the_metrics_of_checkpoints_are_those_of_the_validation(task, work):
    model = "stage1" if task == "retrieval" else "captioner"
    options = ["--task", task, "--held-out", "12", "--image-size", "28"]
    finetune(Path(), "rows.parquet", model, work / "out", *STEPS, *options)
    state = json.loads((work / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    logged = {name.removeprefix("eval_") for logs in state["log_history"] for name in logs if name.startswith("eval_")}
    known = {name for name in logged if not re.search("loss|runtime|per_second", name)}
    assert known == {*_METRICS[_TASKS[task].metric]}


MISTAKES = {
    "stage 1 for captions": (
        ["--model", "stage1"],
        "stage1 is a model of stage 1 .*has no language model.*pretrain DATA --stage 2",
    ),
    "a captioner for retrieval": (["--task", "retrieval"], "captioner is a model of stage 2 .*lacks weights for"),
    "adapters": (["--model", "adapters"], "adapters holds adapters.*blip2-hf convert adapters"),
    "no BLIP-2": (["--model", "vit"], "a model of type 'vit': a BLIP-2 was expected"),
    "no column": (
        ["--text-column", "words"],
        "no column 'words'; its columns are answer, caption, image, question.*--text-column",
    ),
    "an option": (["--eval-stepz", "2"], "no option --eval-stepz. Did you mean --eval-steps"),
    "a value": (["--adam_beta1", "x"], "--adam_beta1.*invalid float value: 'x'"),
    "4 bits without adapters": (
        ["--load-in-4bit", "--preset", "stage2"],
        "--load-in-4bit.*adapters.*lora_language_model",
    ),
    "merging into 4 bits": (["--load-in-4bit", "--merge"], "--merge: adapters are not merged into 4 or 8 bits"),
    "4 bits of a narrow model": (["--load-in-4bit"], "--load-in-4bit: the language model is 32 wide, and 64"),
    "4 bits without bitsandbytes": (["--load-in-4bit"], r"blip2-hf\[quantization\]"),
    "merging nothing": (["--preset", "stage2", "--merge"], "--merge: adapters are not trained"),
    "the model as the output": (["--output", "captioner"], "--output captioner is what is read, too"),
    "another model as the output": (["--output", "stage1"], "stage1 holds a model that this command has not made"),
    "a file as the output": (["--output", "rows.parquet"], "rows.parquet is a file"),
    "no package": (["--report-to", "wandb"], "--report-to wandb needs the package wandb: pip install wandb"),
    "early stopping": (["--early-stopping", "2", "--held-out", "0"], "--early-stopping needs validations"),
    "nothing to validate on": (["--eval-steps", "2", "--held-out", "0"], "--eval-steps: nothing is held out"),
    "an output twice": (["--output_dir", "elsewhere"], "--output_dir is called --output in this command"),
    "transformers' name": (
        ["--gradient-accumulation-steps=0"],
        "--gradient_accumulation_steps is called --accumulate",
    ),
    "a word too many": (["--bf16", "true", "other"], "'other' was given, and nothing like it is expected"),
    "an optimizer": (["--optim", "adamw_torsh"], "--optim: 'adamw_torsh' was given.* Did you mean adamw_torch"),
    "a schedule": (["--lr_scheduler_type", "cosin"], "--lr-scheduler-type cosin: one of linear, cosine,"),
    "no validation, no --held-out 0": (["--eval_strategy", "no"], "the best checkpoint is kept.*--eval-steps"),
    "no checkpoints": (["--save-strategy", "no"], "the best checkpoint is kept.*--eval-steps"),
    "steps of 0": (["--save-steps", "0"], "--save-steps 0: a number above 0"),
    "a metric": (["--metric_for_best_model", "CIDEr"], "--metric-for-best-model CIDEr: one of.*Did you mean CIDEr-D"),
    "a metric without texts": (
        ["--predict-with-generate", "false", "--metric_for_best_model", "word_f1"],
        "--metric-for-best-model word_f1: one of loss was expected",
    ),
    "generation for retrieval": (
        ["--task", "retrieval", "--model", "stage1", "--predict_with_generate", "true"],
        "--predict-with-generate: nothing is generated",
    ),
    "a checkpoint that is not there": (
        ["--resume_from_checkpoint", "nowhere"],
        "--resume-from-checkpoint nowhere: there is no such folder",
    ),
    "too many tokens": (["--max-new-tokens", "5000"], "--max-new-tokens 5000: the language model has 128 positions"),
    "a question without a question": (["--prompt", "Question: {}"], "--prompt: {} stands for the question"),
    "no place for the question": (["--task", "vqa", "--prompt", "Question:"], "--prompt: {} stands for the question"),
    "an option of another task": (["--question-column", "q"], "--question-column goes with --task vqa, not with"),
    "a prompt for retrieval": (["--task", "retrieval", "--prompt", "a"], "--prompt goes with --task caption and vqa"),
    "ids": (["--id-column", "ids"], "rows.parquet has no column 'ids'.*--id-column"),
    "a share": (["--held-out", "-1"], "--held-out: '-1' was given, a number of at least 0"),
    "no number": (["--held-out", "nan"], "--held-out: 'nan' was given"),
    "a share of two and a half": (["--held-out", "2.5"], "--held-out: '2.5' was given, a share below 1 or a whole"),
    "a seed": (["--seed", "-4"], "--seed: '-4' was given, a whole number of at least 0"),
    "a repository": (["--push-to-hub", "bad name!"], "--push-to-hub: 'bad name!' was given, a repository"),
    "a device": (["--device", "cuda"], "--device: 'cuda' was given, and only cpu can be.*CUDA_VISIBLE_DEVICES"),
    "a picture that is not there": (
        ["--data", "gone.jsonl"],
        r"pictures of 1 of 24 rows of gone.jsonl are not there, that of row 20 \(.*gone.png\).*--skip-bad-rows",
    ),
    "an output in the model": (["--output", "captioner/sub"], "captioner/sub is inside of captioner, which is read"),
    "an output that the model is in": (
        ["--model", "run/checkpoint-2", "--output", "run", "--overwrite"],
        "--overwrite deletes the checkpoints in run, and the model",
    ),
    "a preset of the other stage": (["--preset", "stage1"], "--preset stage1 is not for the task caption"),
    "too few rows": (
        ["--model", "stage1", "--task", "retrieval", "--batch-size", "30", "--image-size", "28"],
        "22 rows to learn from, which make no batch of 30",
    ),
    "validated on what is learned": (["--validation", "rows.parquet"], "which is what is learned from"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_a_line(mistake, work, capsys, monkeypatch):
    options, expected = MISTAKES[mistake]
    if not Path("vit").exists():
        transformers.ViTModel(transformers.ViTConfig(**VISION, patch_size=14)).save_pretrained("vit")
    for module in ("_trainer_options", "_quantization"):
        monkeypatch.setattr(
            f"blip2_hf.cli.{module}.find_spec", lambda name: mistake == "4 bits of a narrow model" or None
        )
    data, options = (options[1], options[2:]) if options[0] == "--data" else ("rows.parquet", options)
    command = ["finetune", data, "--model", "captioner", "--output", str(work / "out"), *options]
    text = refusal(command, capsys)
    assert re.search(expected, text) and len(text) < 420
    assert not (work / "out").exists()


def test_both_stages_of_pretraining(work, capsys):
    vit = transformers.ViTConfig(**VISION, patch_size=14)
    transformers.ViTModel(vit, add_pooling_layer=False).save_pretrained(work / "tower")
    transformers.ViTImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(work / "tower")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=VOCAB_SIZE, **sizes)).save_pretrained(
        work / "bert"
    )
    make_tokenizer(eos=True).save_pretrained(work / "bert")
    transformers.LlamaForCausalLM(LANGUAGE_MODELS["llama"]()).save_pretrained(work / "llama")
    make_tokenizer().save_pretrained(work / "llama")

    def pretrain(stage: str, output: str, *options: str):
        command = ["pretrain", "rows.parquet", "--stage", stage, "--output", str(work / output), *STEPS]
        main([*command, "--held-out", "12", *options])

    parts = ["--vision-model", str(work / "tower"), "--text-encoder", str(work / "bert"), "--num-query-tokens", "4"]
    pretrain("1", "stage1", *parts, "--image-size", "28")
    printed = capsys.readouterr()
    assert "--stage 2 --stage1" in printed.out.splitlines()[-1] and "PAD/BOS/EOS" not in printed.err
    pretrain("1", "further", "--model", str(work / "stage1"), "--eval-steps", "1", "--learning-rate", "0.01")
    first, second = (Blip2ForPreTraining.from_pretrained(work / name) for name in ("stage1", "further"))
    assert first.config.num_query_tokens == second.config.num_query_tokens == 4
    assert not torch.equal(first.query_tokens.weight, second.query_tokens.weight)
    pretrain("1", "normal", *parts, "--image-size", "28", "--query-initialization", "normal")
    normal = Blip2ForPreTraining.from_pretrained(work / "normal").query_tokens.weight
    # BERT's words and positions are two such vectors, and little is learned in two steps
    assert normal.std() < 0.024 < first.query_tokens.weight.std()
    # Stored features need no tower, but what comes next has pictures
    cache = ["cache-features", "rows.parquet", "--vision-model", str(work / "tower"), "--size", "28"]
    main([*cache, "--output", str(work / "features"), "--dtype", "float32", "--num-workers", "0"])
    main(
        [
            "pretrain",
            str(work / "features"),
            "--stage",
            "1",
            "--output",
            str(work / "cached"),
            *STEPS,
            *parts,
            "--image-size",
            "28",
        ]
    )
    main(["index", "photos", "--model", str(work / "cached"), "--index", str(work / "index"), "--num-workers", "0"])
    capsys.readouterr()
    main(["search", "a dog", "--index", str(work / "index"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 3
    joined = ["--stage1", str(work / "further"), "--language-model", str(work / "llama"), "--image-size", "28"]
    pretrain("2", "stage2", *joined)
    assert "blip2-hf finetune DATA --model" in capsys.readouterr().out.splitlines()[-1]
    assert (work / "stage2" / "samples.md").read_text().count("## Step 2, CIDEr-D") == 1
    pretrain("2", "streamed", *joined, "--streaming")
    assert "eval_" not in capsys.readouterr().out
    finetune(Path(), "rows.parquet", work / "stage2", work / "captioner", *STEPS)
    main(["caption", "photos", "--model", str(work / "captioner"), "--output", str(work / "c.jsonl"), *CAPTION])
    assert len((work / "c.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--stage", "1"], "--stage 1 needs --vision-model, to begin, or --model"),
        (["--stage", "2", "--stage1", "stage1"], "--stage 2 needs --stage1.*--language-model"),
        (["--stage", "1", "--vision-model", "captioner", "--prefix-lm"], "--prefix-lm goes with --stage 2"),
        (["--stage", "1", "--model", "stage1", "--num-query-tokens", "3"], "--num-query-tokens: --model has its own"),
        (
            ["--stage", "1", "--model", "stage1", "--query-initialization", "words"],
            "--query-initialization: --model has its own",
        ),
        (
            ["--stage", "2", "--stage1", "stage1", "--language-model", "x", "--query-initialization", "words"],
            "--query-initialization goes with --stage 1, not with --stage 2",
        ),
        (
            ["--stage", "1", "--vision-model", "captioner", "--query-initialization", "word"],
            "--query-initialization: 'word' was given, one of words, normal was expected. Did you mean words",
        ),
        (["--stage", "1", "--model", "stage1", "--streaming", "--epochs", "2"], "--epochs: the length of a stream"),
        (["--stage", "1", "--model", "stage1", "--preset", "lora"], "--preset: 'lora' was given, one of stage1,"),
        (
            ["--stage", "1", "--model", "stage1", "--preset", "stage2"],
            "--preset stage2: with --stage 1, one of stage1",
        ),
        (
            ["--stage", "2", "--stage1", "stage1", "--language-model", "captioner", "--prompt", "Question: {}"],
            "--prompt: {} stands for a question, and captions have none",
        ),
        (["--stage", "1", "--model", "stage1", "--merge"], r"no option --merge\. See"),
        (["--stage", "1", "--model", "stage1", "--lr", "1"], r"no option --lr\. See"),
        (["--stage", "1", "--model", "captioner"], "captioner is a model of stage 2 .*lacks weights for"),
    ],
)
def test_mistakes_of_pretraining(options, expected, work, capsys):
    assert re.search(expected, refusal(["pretrain", "rows.parquet", "--output", str(work / "out"), *options], capsys))
