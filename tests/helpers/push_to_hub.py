"""
What test_hub.py has pushed, as a program: to the Hub of HF_ENDPOINT, from a folder for what it writes.

    python tests/helpers/push_to_hub.py FOLDER
"""

import json
import sys
import urllib.request
from pathlib import Path

import datasets
import torch
import transformers
from huggingface_hub import HfApi
from stage1 import make_stage1
from tiny import CAPTIONS, make_image, make_image_processor, make_model, make_processor, make_tokenizer

from blip2_hf import Blip2ForConditionalGeneration, ImageToTextPipeline
from blip2_hf.data import ImageTextPairs, LanguageModelCollator, cache_features, load_cached_features
from blip2_hf.training import Blip2Trainer, Stage2Arguments


RESULTS = {
    "task": "coco-caption",
    "scores": {"cider_d": 1.25, "bleu_4": 0.5},
    "settings": {"prompt": "a photo of", "generate_kwargs": {"num_beams": 5}, "samples": "0123"},
}


def push_model(folder: Path) -> dict:
    """The model and its processor; then the same again; then with other weights, of which the uploads break off."""
    api, report = HfApi(), {}
    model, processor = make_model(), make_processor()
    model.config.vision_config.name_or_path, model.config.text_config.name_or_path = "me/tower", "facebook/opt-125m"
    inputs = processor(images=make_image(), text="a photo of", return_tensors="pt")
    (folder / "results.json").write_text(json.dumps(RESULTS))
    facts = {"license": "mit", "datasets": "me/pictures", "results": folder / "results.json", "tags": "captions"}
    model.push_to_hub("me/captioner", language="en", commit_message="First", **facts)
    processor.push_to_hub("me/captioner")
    report["first"] = api.model_info("me/captioner").sha
    report["unchanged"] = [shared.push_to_hub("me/captioner").oid for shared in (model, processor)]

    with torch.no_grad():
        model.query_tokens.weight.mul_(-1)
    report["tokens"] = model.generate(**inputs, max_new_tokens=5, do_sample=False).tolist()
    set_faults(["cut", "refuse"])
    try:
        model.push_to_hub("me/captioner")
    except RuntimeError as error:
        report["error"] = str(error)
    report["interrupted"] = api.model_info("me/captioner").sha
    report["resumed"] = model.push_to_hub("me/captioner", commit_message="Other weights").oid
    return report


def set_faults(faults: list[str]):
    request = urllib.request.Request(f"{HfApi().endpoint}/faults", json.dumps(faults).encode(), method="PUT")
    urllib.request.urlopen(request).close()


def push_others(folder: Path):
    """A pipeline, to a private repository; stage 1, to a branch; models to one that has a card, and while saving."""
    model = make_model()
    model.generation_config.max_new_tokens = 5
    ImageToTextPipeline(model, processor=make_processor()).push_to_hub("me/pipeline", private=True, license="mit")
    make_stage1().push_to_hub("me/stage1", revision="next")
    api = HfApi()
    api.create_repo("me/carded")
    card = b"---\nlicense: apache-2.0\n---\n# My own words\n"
    api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="me/carded")
    model.push_to_hub("me/carded", license="mit")
    model.save_pretrained(folder / "saved", push_to_hub=True, repo_id="me/saved", private=True)
    make_processor(qformer_tokenizer=make_tokenizer()).save_pretrained(folder / "saved", push_to_hub=True)


def push_over(folder: Path) -> dict:
    """Over what is there: weights in other files, a model of another class, another card; and what is refused."""
    api, report = HfApi(), {}
    api.create_repo("me/over")
    for name in ("mine.py", "model_notes.txt"):
        api.upload_file(path_or_fileobj=b"# mine\n", path_in_repo=name, repo_id="me/over")
    stage1 = make_stage1()
    stage1.push_to_hub("me/over", license="mit", base_model="me/tower", results=RESULTS)
    model = make_model()
    make_processor().push_to_hub("me/over")
    for name, value, size in (("whole", 1.0, None), ("sharded", 2.0, "100KB"), ("whole again", 3.0, None)):
        torch.nn.init.constant_(model.query_tokens.weight, value)
        model.push_to_hub("me/over", max_shard_size=size)
        loaded = Blip2ForConditionalGeneration.from_pretrained("me/over")
        report[name] = [loaded.query_tokens.weight.unique().tolist(), api.list_repo_files("me/over")]

    state_dict = {name: value.clone() for name, value in model.state_dict().items()}
    state_dict["query_tokens.weight"].fill_(4.0)
    (folder / "given").mkdir()
    (folder / "given" / "notes.txt").write_text("not for the Hub")
    model.save_pretrained(
        folder / "given", state_dict=state_dict, max_shard_size="100KB", push_to_hub=True, repo_id="me/given"
    )
    loaded = Blip2ForConditionalGeneration.from_pretrained("me/given")
    report["given"] = [loaded.query_tokens.weight.unique().tolist(), api.list_repo_files("me/given")]
    loaded.push_to_hub("me/given", license="mit")  # which is not made of itself

    for facts in ({"licence": "mit"}, {"results": {"accuracy": 0.5}}):
        try:
            model.push_to_hub("me/refused", **facts)
        except (TypeError, ValueError) as error:
            report.setdefault("refused", []).append(f"{type(error).__name__}: {error}")
    return report


def train(folder: Path, repo_id: str, model=None, **options) -> Blip2Trainer:
    rows = [{"image": make_image(i), "caption": CAPTIONS[i % 6]} for i in range(4)]
    processor = make_processor()
    arguments = Stage2Arguments(
        str(folder / repo_id),
        max_steps=2,
        warmup_steps=0,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        per_device_train_batch_size=2,
        push_to_hub=True,
        hub_model_id=repo_id,
        hub_always_push=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    trainer = Blip2Trainer(
        make_model() if model is None else model,
        arguments,
        train_dataset=ImageTextPairs(rows, prompt="a photo of"),
        eval_dataset=ImageTextPairs(rows, prompt="a photo of"),
        data_collator=LanguageModelCollator(processor),
        processing_class=processor,
    )
    trainer.train()
    return trainer


def push_while_training(folder: Path):
    train(folder, "me/every-save", hub_strategy="every_save")._finish_current_push()
    train(folder, "me/checkpoint", hub_strategy="checkpoint")._finish_current_push()
    trainer = train(folder, "me/at-end", hub_strategy="end")
    trainer.push_to_hub(license="mit", dataset="me/pictures")
    trainer.save_model()  # which pushes too, and knows less

    card = b"---\nlicense: apache-2.0\n---\n# My own words\n"
    api = HfApi()
    api.create_repo("me/trained")
    api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="me/trained")
    train(folder, "me/trained", hub_strategy="every_save", hub_token="hf_secret")._finish_current_push()

    from peft import LoraConfig, get_peft_model

    base = make_model()
    base.name_or_path = str(folder / "base")
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"]))
    train(folder, "me/adapter", model=adapted, hub_strategy="end").push_to_hub()


def push_features(folder: Path):
    rows = [{"image": make_image(i), "caption": CAPTIONS[i % 6]} for i in range(5)]
    tower = make_model()
    tower.save_pretrained(folder / "tower")
    cache_features(
        datasets.Dataset.from_list(rows), tower, make_image_processor(), folder / "features", rows_per_shard=3
    )
    load_cached_features(folder / "features").push_to_hub("me/features")


def main():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.manual_seed(0)
    folder = Path(sys.argv[1])
    report = push_model(folder)
    push_others(folder)
    report["over"] = push_over(folder)
    push_while_training(folder)
    push_features(folder)
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
