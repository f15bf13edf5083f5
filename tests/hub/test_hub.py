"""Pushed to a Hub on loopback by one process, read from it by others; and the model cards that say what is known."""

import copy
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import HubServer
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import LocalEntryNotFoundError
from paths import HELPERS
from push_to_hub import RESULTS
from stage1 import make_stage1
from tiny import make_image, make_model, make_processor, make_tokenizer

from blip2_hf.hub import fetch_card, push
from blip2_hf.hub.model_card import write_model_card
from blip2_hf.training import Blip2Trainer, Stage2Arguments


READ = """
    import json, re, sys
    from pathlib import Path

    folder, is_installed = Path(sys.argv[1]), sys.argv[2] == "installed"
    if is_installed:
        import blip2_hf
    else:
        sys.modules["blip2_hf"] = None  # cannot be imported
    trust = {} if is_installed else {"trust_remote_code": True}
    import torch
    import transformers
    from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    report, image = {}, str(folder / "picture.png")
    model = AutoModelForImageTextToText.from_pretrained("me/captioner", **trust)
    processor = AutoProcessor.from_pretrained("me/captioner", **trust)
    report["class"] = f"{type(model).__module__.partition('.')[0]} {type(model).__name__}"
    inputs = processor(images=image, text="a photo of", return_tensors="pt")
    report["tokens"] = model.generate(**inputs, max_new_tokens=5, do_sample=False).tolist()
    for repo_id in ("me/pipeline", "me/every-save", "me/at-end"):
        pipe = pipeline("image-to-text", model=repo_id, **trust)
        report[repo_id] = pipe(image, max_new_tokens=5, do_sample=False)
    if is_installed:
        # Without a task, the Hub says which
        report["untold"] = type(pipeline(model="me/captioner")).__name__
        report["reads"] = len(AutoProcessor.from_pretrained("me/saved").qformer_tokenizer)
        import datasets
        from blip2_hf.data import ImageTextStream

        rows = datasets.load_dataset("me/features", split="train", streaming=True)
        report["features"] = [
            [item["text"], item["image_embeds"].float().tolist()] for item in ImageTextStream(rows, train=False)
        ]
    else:
        from huggingface_hub import hf_hub_download

        card = Path(hf_hub_download("me/pipeline", "README.md")).read_text()
        code = re.search(r"```python\\n(.*?)```", card, flags=re.DOTALL)[1]
        printed = []
        exec(code, {"print": printed.append})
        report["card"] = printed
    print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    make_image().save(folder / "picture.png")
    return folder


@pytest.fixture(scope="module")
def environment(folder):
    return {
        **os.environ,
        "HF_TOKEN": "fake",
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # a protocol of the Hub's own, in place of git's for large files
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture(scope="module")
def hub(folder, environment):
    with HubServer() as hub:
        environment["HF_ENDPOINT"] = hub.url
        run([str(HELPERS / "push_to_hub.py"), str(folder)], folder, environment)
        yield hub


def run(arguments, folder, environment):
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=folder, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def report(hub, folder):
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def read(hub, folder, environment):
    """What processes with and without the package make of what was pushed, both at once."""
    names, code = ("installed", "not installed"), textwrap.dedent(READ)
    with ThreadPoolExecutor() as pool:
        printed = pool.map(lambda name: run(["-c", code, str(folder), name], folder, environment), names)
    return {name: json.loads(output.splitlines()[-1]) for name, output in zip(names, printed, strict=True)}


def card_of(hub, repo_id, branch="main"):
    return ModelCard(hub.files(repo_id, branch)["README.md"].decode())


# --- pushing ---


def test_a_model_is_pushed_in_one_commit_and_its_processor_in_another(hub, report):
    first, second = hub.commits("me/captioner")[:2]
    assert first["id"] == report["first"] or second["id"] == report["first"]
    assert first["message"] == "First" and {"config.json", "model.safetensors", "README.md"} <= set(first["files"])
    new = set(second["files"]) - set(first["files"])
    assert new == set(second["changed"]) >= {"processor_config.json", "tokenizer.json"}
    config = json.loads(second["files"]["config.json"])
    assert config["auto_map"]["AutoModelForImageTextToText"] == "modeling_blip2.Blip2HfForConditionalGeneration"
    assert set(config["custom_pipelines"]) == {"image-to-text", "visual-question-answering"}


def test_a_second_push_commits_what_has_changed_and_nothing_otherwise(hub, report):
    commits = hub.commits("me/captioner")
    assert report["unchanged"] == [report["first"]] * 2
    assert [commit["message"] for commit in commits[2:]] == ["Other weights"]
    assert commits[2]["changed"] == ["README.md", "model.safetensors"]
    # The results were those of the first weights
    before, after = (ModelCard(commit["files"]["README.md"].decode()) for commit in commits[1:3])
    assert "cider_d" in before.text and before.data.eval_results
    assert "cider_d" not in after.text and after.data.eval_results is None
    assert (after.data.license, after.data.datasets) == ("mit", ["me/pictures"])


def test_an_upload_that_breaks_off_leaves_the_repository_as_it_was(hub, report):
    commits = [commit["id"] for commit in hub.commits("me/captioner")]
    assert "model.safetensors" in report["error"]
    assert report["interrupted"] == commits[1]
    assert report["resumed"] == commits[2]
    # The connection was cut, tried again, and refused
    assert len([line for line in hub.log if line.startswith("PUT /upload/") and hub.log.count(line) == 3]) == 3


def test_private_repositories_branches_and_cards_of_the_users(hub):
    assert hub.repositories["me/pipeline"].private and not hub.repositories["me/captioner"].private
    assert hub.commits("me/stage1") == []
    assert "modeling_pretraining.py" in hub.files("me/stage1", "next")
    assert hub.files("me/carded")["README.md"] == b"---\nlicense: apache-2.0\n---\n# My own words\n"
    assert "model.safetensors" in hub.files("me/carded")


def test_what_a_push_replaces_is_deleted(report, hub):
    for name, value in (("whole", 1), ("sharded", 2), ("whole again", 3)):
        loaded, files = report["over"][name]
        assert loaded == [value], name
        assert ("model.safetensors" in files) == (name != "sharded")
        assert ("model.safetensors.index.json" in files) == (name == "sharded")
        assert {"mine.py", "model_notes.txt", "processing_blip2.py", "modeling_blip2.py"} <= set(files)
        assert "modeling_pretraining.py" not in files
    assert "modeling_pretraining.py" in hub.commits("me/over")[2]["files"]
    # Each of the pushes is one commit
    assert len(hub.commits("me/over")) == 2 + 1 + 1 + 3


def test_a_model_of_another_class_has_a_card_of_its_own(hub):
    stage1 = ModelCard(hub.commits("me/over")[2]["files"]["README.md"].decode()).data
    assert (stage1.pipeline_tag, stage1.base_model) == ("zero-shot-image-classification", ["me/tower"])
    assert stage1.eval_results
    data = card_of(hub, "me/over").data
    assert (data.pipeline_tag, data.license) == ("image-text-to-text", "mit")
    assert data.base_model is None and data.eval_results is None


def test_saving_pushes_what_was_saved(report, hub):
    loaded, files = report["over"]["given"]
    assert loaded == [4]
    assert "model.safetensors.index.json" in files and "model.safetensors" not in files
    assert "notes.txt" not in files
    data = card_of(hub, "me/given").data
    assert data.license == "mit" and data.base_model is None


def test_wrong_facts_are_refused_before_anything_is_made(report, hub):
    unknown, results = report["over"]["refused"]
    assert "no place for licence" in unknown and "license" in unknown
    assert "`task` and `scores`" in results
    assert "me/refused" not in hub.repositories


def test_what_plain_transformers_loads_is_not_pushed_half_done(tmp_path):
    for shared in (make_model(), make_processor()):
        with pytest.raises(ValueError, match="push_to_hub does not go with transformers_compatible"):
            shared.save_pretrained(tmp_path, transformers_compatible=True, push_to_hub=True)
    assert not list(tmp_path.iterdir())


def test_a_hub_that_does_not_answer_is_no_hub_without_a_card(tmp_path, monkeypatch):
    def no_answer(*args, **kwargs):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(HfApi, "hf_hub_download", no_answer)
    with pytest.raises(OSError, match="no connection"):
        fetch_card(tmp_path, "me/captioner")


def test_saving_pushes_too_with_the_code(hub):
    assert hub.repositories["me/saved"].private
    files = set(hub.files("me/saved"))
    assert {"modeling_blip2.py", "README.md", "model.safetensors"} <= files
    assert {"processing_blip2.py", "qformer_tokenizer/tokenizer.json"} <= files


def test_trainer_pushes_code_and_card_with_every_strategy(hub, folder):
    for repo_id in ("me/every-save", "me/checkpoint", "me/at-end"):
        files = hub.files(repo_id)
        for name in ("modeling_blip2.py", "pipeline_blip2.py", "processing_blip2.py", "training_args.bin"):
            assert name in files, (repo_id, name)
        assert "auto_map" in json.loads(files["config.json"])
        assert "auto_map" in json.loads(files["processor_config.json"])
        last = folder / repo_id / "checkpoint-2" / "model.safetensors"
        assert files["model.safetensors"] == last.read_bytes()
        card = card_of(hub, repo_id)
        assert card.data.pipeline_tag == "image-text-to-text" and card.data.library_name == "transformers"
        assert "| learning_rate | 0.0001 |" in card.text and "| weight_decay | 0.05 |" in card.text
        assert re.search(r"\| loss \| \d\.\d{4} \| step: [12], epoch:", card.text)
    checkpoint = {path for path in hub.files("me/checkpoint") if path.startswith("last-checkpoint/")}
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/model.safetensors"} <= checkpoint
    assert not any(path.startswith("last-checkpoint/") for path in hub.files("me/every-save"))


def test_what_trainer_was_told_stays_in_the_card_when_it_pushes_again(hub):
    data = card_of(hub, "me/at-end").data
    assert data.license == "mit" and data.datasets == ["me/pictures"]
    # Nobody said what the data of the evaluation are called
    assert data.eval_results is None


def test_trainer_leaves_a_card_of_the_users_alone_and_pushes_no_secret(hub):
    assert hub.files("me/trained")["README.md"] == b"---\nlicense: apache-2.0\n---\n# My own words\n"
    assert "training_args.bin" in hub.files("me/trained")
    for name, content in hub.files("me/trained").items():
        assert b"hf_secret" not in content, name


def test_copies_of_the_arguments_keep_the_token(tmp_path):
    arguments = Stage2Arguments(str(tmp_path), hub_token="hf_secret", report_to=[])
    for copied in (copy.copy(arguments), copy.deepcopy(arguments)):
        assert type(copied) is Stage2Arguments and copied.hub_token == "hf_secret"
        assert copied.max_steps == arguments.max_steps
    assert copied.lr_scheduler_kwargs is not arguments.lr_scheduler_kwargs
    assert pickle.loads(pickle.dumps(arguments)).hub_token is None


def test_trainer_reports_all_sets_and_the_weights_that_are_there(tmp_path):
    trainer = Blip2Trainer(make_model(), Stage2Arguments(str(tmp_path), report_to=[]))
    assert trainer._last_evaluation() is None
    for step, value in ((1, 1.0), (2, 2.0)):
        for name in ("coco", "nocaps"):
            logs = {f"eval_{name}_loss": value, f"eval_{name}_runtime": 9.0, f"eval_{name}_samples_per_second": 9.0}
            trainer.state.log_history.append({**logs, "epoch": float(step), "step": step})
    trainer.state.log_history.append({"train_runtime": 9.0, "step": 2})
    last = trainer._last_evaluation()
    assert last["scores"] == {"coco_loss": 2.0, "nocaps_loss": 2.0}
    assert last["settings"] == {"step": 2, "epoch": 2.0}
    trainer.state.best_global_step = 1
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    trainer.save_model(tmp_path / "checkpoint-1")
    assert trainer._last_evaluation() == last
    trainer._load_best_model()
    assert trainer._last_evaluation()["scores"] == {"coco_loss": 1.0, "nocaps_loss": 1.0}


def test_an_adapter_is_pushed_with_the_same_card(hub):
    files, card = hub.files("me/adapter"), card_of(hub, "me/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
    # It came from a folder, of which the others need not know
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    assert card.data.library_name == "peft" and "PeftModel.from_pretrained" in card.text
    assert "| learning_rate | 0.0001 |" in card.text


# --- reading ---


def test_what_was_pushed_loads_with_and_without_the_package(read, report, hub):
    installed, other = read["installed"], read["not installed"]
    assert installed["class"] == "blip2_hf Blip2HfForConditionalGeneration"
    assert other["class"] == "transformers_modules Blip2HfForConditionalGeneration"
    assert installed["tokens"] == other["tokens"] == report["tokens"]
    for repo_id in ("me/pipeline", "me/every-save", "me/at-end"):
        assert installed[repo_id] == other[repo_id]
        assert isinstance(installed[repo_id][0]["generated_text"], str)


def test_what_only_a_hub_can_tell(read):
    assert read["installed"]["untold"] == "ImageTextToTextPipeline"
    assert read["installed"]["reads"] == len(make_tokenizer())


def test_the_snippet_of_the_card_runs_without_the_package(read):
    captions, answers, replies = read["not installed"]["card"]
    assert set(captions[0]) == {"generated_text"} and set(answers[0]) == {"answer"}
    assert isinstance(replies[0]["generated_text"], str)


def test_features_are_streamed_back(read, folder):
    from blip2_hf.data import ImageTextPairs, load_cached_features

    pairs = ImageTextPairs(load_cached_features(folder / "features"), train=False)
    expected = [[item["text"], item["image_embeds"].float().tolist()] for item in map(pairs.__getitem__, range(5))]
    assert read["installed"]["features"] == expected


# --- cards ---


def with_names(model):
    model.config.vision_config.name_or_path = "facebook/dinov2-small"
    model.config.text_config.name_or_path = "facebook/opt-125m"
    return model


def read_card(folder):
    return ModelCard.load(Path(folder) / "README.md")


def test_metadata_are_what_is_known(tmp_path):
    path = write_model_card(
        tmp_path,
        with_names(make_model()),
        repo_id="me/captioner",
        license="mit",
        language="en",
        datasets=["me/pictures", "coco"],
        results=RESULTS,
        tags=["captions"],
    )
    block = re.match(r"---\n(.*?)\n---\n", path.read_text(), flags=re.DOTALL)[1]
    data = yaml.safe_load(block)
    results = data.pop("model-index")
    assert data == {
        "base_model": ["facebook/dinov2-small", "facebook/opt-125m"],
        "base_model_relation": "finetune",
        "datasets": ["me/pictures", "coco"],
        "language": "en",
        "library_name": "transformers",
        "license": "mit",
        "metrics": ["bleu_4", "cider_d"],
        "pipeline_tag": "image-text-to-text",
        "tags": ["blip-2", "blip2-hf", "image-to-text", "captions"],
    }
    settings = {"prompt": "a photo of", "generate_kwargs": {"num_beams": 5}}
    (entry,) = results
    (result,) = entry["results"]
    assert entry["name"] == "captioner"
    assert result["task"] == {"type": "image-to-text"}
    assert result["dataset"] == {"type": "coco", "name": "COCO captions"}
    assert result["metrics"] == [
        {"type": metric, "value": value, "args": settings} for metric, value in RESULTS["scores"].items()
    ]
    assert ModelCardData(**yaml.safe_load(block)).to_yaml() == block


def test_what_is_not_known_is_left_out(tmp_path, monkeypatch):
    model = make_model()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "tower").mkdir(parents=True)
    model.config.vision_config.name_or_path = "outputs/tower"
    model.config.text_config.name_or_path = str(tmp_path)
    write_model_card(
        tmp_path, model, results={"task": "caption", "scores": {"cider_d": 0.5}, "settings": {"beams": 5}}
    )
    card = read_card(tmp_path)
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    assert "| caption |  | cider_d | 0.5000 | beams: 5 |" in card.text
    assert "named none" in card.text and str(tmp_path) not in card.content


def test_a_fine_tuned_model_names_the_model_that_it_came_from(tmp_path):
    model = with_names(make_model())
    model.config.name_or_path = "Salesforce/blip2-opt-2.7b"
    write_model_card(tmp_path, model)
    assert read_card(tmp_path).data.base_model == ["Salesforce/blip2-opt-2.7b"]
    write_model_card(tmp_path, model, base_model="me/other")
    assert read_card(tmp_path).data.base_model == ["me/other"]


def test_results_json_gives_a_result_for_each_score(tmp_path):
    report = {"task": "vqa", "scores": {"vqa_accuracy": 0.5, "loss": float("nan")}, "settings": {}, "split": "test"}
    # The data of the training are not those of the evaluation
    write_model_card(tmp_path, make_model(), datasets="me/questions", results=report)
    assert read_card(tmp_path).data.eval_results is None
    report["dataset"] = "me/questions"
    (tmp_path / "results.json").write_text(json.dumps(report))
    write_model_card(tmp_path, make_model(), datasets="me/questions", results=[tmp_path / "results.json", RESULTS])
    results = read_card(tmp_path).data.eval_results
    keys = [(r.task_type, r.dataset_type, r.dataset_split, r.metric_type, r.metric_value) for r in results]
    assert keys == [
        ("visual-question-answering", "me/questions", "test", "vqa_accuracy", 0.5),
        ("image-to-text", "coco", None, "cider_d", 1.25),
        ("image-to-text", "coco", None, "bleu_4", 0.5),
    ]
    assert all(isinstance(result, EvalResult) for result in results)
    with pytest.raises(ValueError, match=r"`task` and `scores`, but got \['accuracy'\]"):
        write_model_card(tmp_path, make_model(), results={"accuracy": 0.5})


def test_a_card_of_the_users_is_left_alone(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    path = tmp_path / "README.md"
    path.write_text("# My model\n")
    with caplog.at_level(logging.WARNING):
        write_model_card(tmp_path, make_model(), license="mit")
    assert path.read_text() == "# My model\n" and "license" in caplog.text
    path.unlink()
    write_model_card(tmp_path, make_model(), license="mit")
    changed = path.read_text().replace("## Limits", "## What I found out")
    path.write_text(changed)
    write_model_card(tmp_path, make_model(), license="apache-2.0")
    assert path.read_text() == changed


def test_our_own_card_is_written_anew_and_keeps_what_it_was_told(tmp_path):
    model = make_model()
    path = write_model_card(tmp_path, model, license="mit", datasets="me/pictures", results=RESULTS)
    first = path.read_text()
    write_model_card(tmp_path, model)
    assert path.read_text() == first
    write_model_card(tmp_path, model, language="en")
    data = read_card(tmp_path).data
    assert (data.license, data.datasets, data.language) == ("mit", ["me/pictures"], "en")
    assert [result.metric_value for result in data.eval_results] == [1.25, 0.5]
    assert "| cider_d | 1.2500 |" in path.read_text()


def test_results_stay_with_the_weights_that_they_are_of(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = make_model()
    model.save_pretrained(tmp_path)
    path = write_model_card(tmp_path, model, license="mit", results=RESULTS)
    first = path.read_text()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    write_model_card(tmp_path, model)
    assert path.read_text() == first
    torch.nn.init.constant_(model.query_tokens.weight, 7.0)
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        write_model_card(tmp_path, model, language="en")
    assert "results of the previous ones" in caplog.text
    data = read_card(tmp_path).data
    assert (data.license, data.language, data.eval_results) == ("mit", "en", None)
    assert "cider_d" not in path.read_text()


def test_each_class_has_the_task_that_pipelines_know(tmp_path):
    make_stage1().save_pretrained(tmp_path, with_code=True)
    assert read_card(tmp_path).data.pipeline_tag == "zero-shot-image-classification"
    make_processor().save_pretrained(tmp_path / "processor", with_code=True)
    assert not (tmp_path / "processor" / "README.md").exists()


def test_a_processor_has_no_card_to_write_into():
    with pytest.raises(TypeError, match="license"):
        push(make_processor(), "me/processor", license="mit")


def test_saving_with_code_writes_what_was_saved_without(tmp_path):
    torch.manual_seed(0)
    model = make_model()
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "with", with_code=True)
    plain = json.loads((tmp_path / "plain" / "config.json").read_text())
    content = json.loads((tmp_path / "with" / "config.json").read_text())
    assert {name: content[name] for name in plain} == plain
    assert set(content) - set(plain) == {"auto_map", "custom_pipelines"}
    assert not list((tmp_path / "with").glob("*.tmp"))
