import copy
import json
import time

import pytest
import torch
import transformers
from device_reads import DeviceReads
from processes import run, start
from stage1 import Processor, gradients, make_inputs, make_pairs, make_stage1
from train_stage1 import train_stage1

from blip2_hf.data import ImageTextCollator, ImageTextPairs
from blip2_hf.evaluation import contrastive_retrieval_metrics, retrieval_recall
from blip2_hf.training import (
    Blip2Trainer,
    Stage1Arguments,
    checkpoint_to_resume,
    describe_trained_parts,
    last_complete_checkpoint,
)


def make_arguments(folder, **kwargs) -> Stage1Arguments:
    fields = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return Stage1Arguments(str(folder), **(fields | kwargs))


def make_trainer(folder, trainer_class=Blip2Trainer, model=None, **kwargs):
    rows = make_pairs(12)
    return trainer_class(
        make_stage1() if model is None else model,
        make_arguments(folder, **kwargs),
        train_dataset=ImageTextPairs(rows),
        eval_dataset=ImageTextPairs(rows, train=False),
        data_collator=ImageTextCollator(Processor()),
        compute_metrics=contrastive_retrieval_metrics,
    )


def test_plain_trainer(tmp_path):
    trainer = make_trainer(tmp_path, transformers.Trainer)
    before = trainer.model.query_tokens.weight.clone()
    trainer.train()
    assert not torch.equal(trainer.model.query_tokens.weight, before)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    assert 0 <= metrics["eval_image_to_text_r1"] <= metrics["eval_image_to_text_r10"] <= 1


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_weights_that_are_nan_are_told_by_the_loss(chunk_size, tmp_path):
    """Not by the draw of hard negatives, whose error would be a traceback, and would stop a GPU."""
    trainer = make_trainer(tmp_path, gradient_caching_chunk_size=chunk_size)
    trainer.model.query_tokens.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="The loss of step 1 is nan: the training has diverged"):
        trainer.train()


def test_a_step_waits_for_its_device_at_its_beginning_and_at_its_end(tmp_path, monkeypatch):
    records, training_step = [], Blip2Trainer.training_step

    def recorded(*args, **kwargs) -> torch.Tensor:
        with DeviceReads() as record:
            loss = training_step(*args, **kwargs)
        records.append(record)
        return loss

    monkeypatch.setattr(Blip2Trainer, "training_step", recorded)
    make_trainer(tmp_path).train()
    assert len(records) == 3
    for record in records:
        (read,) = record.late()
        assert "training_step" in read.place
        # After the backward pass
        assert read.products_before == record.products > 100


def test_losses_are_logged_apart(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.evaluate()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 3
    for entry in steps:
        assert entry["loss_itc"] + entry["loss_itm"] + entry["loss_itg"] == pytest.approx(entry["loss"], abs=1e-4)
    (evaluation,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    parts = [evaluation[f"eval_loss_{name}"] for name in ("itc", "itm", "itg")]
    assert sum(parts) == pytest.approx(evaluation["eval_loss"], abs=1e-4)


@pytest.mark.parametrize("batch_size", [4, 5, 11])
def test_every_held_out_row_counts(tmp_path, batch_size):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=batch_size)
    prediction = trainer.predict(trainer.eval_dataset)
    image_features, text_features = prediction.predictions
    assert image_features.shape == (12, 4, 16) and text_features.shape == (12, 16)
    assert sorted(prediction.label_ids.tolist()) == list(range(12))
    assert prediction.metrics["test_loss"] > 0 and trainer.args.dataloader_drop_last


def test_defaults_are_those_of_the_paper(tmp_path):
    arguments = Stage1Arguments(str(tmp_path))
    assert (arguments.learning_rate, arguments.weight_decay, arguments.max_steps) == (1e-4, 0.05, 250_000)
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.get_warmup_steps(250_000)) == (0.9, 0.98, 2000)
    trainer = make_trainer(tmp_path, max_steps=250_000)
    trainer.create_optimizer_and_scheduler(250_000)
    rate = trainer.lr_scheduler.lr_lambdas[0]
    rates = [1e-4 * rate(step) for step in (0, 2000, 126_000, 250_000)]
    assert rates == pytest.approx([1e-6, 1e-4, 5.5e-5, 1e-5], rel=1e-3)
    assert Stage1Arguments(str(tmp_path), num_train_epochs=10).max_steps == -1
    linear = make_trainer(tmp_path, lr_scheduler_type="linear", warmup_steps=0)
    linear.create_optimizer_and_scheduler(100)
    assert linear.lr_scheduler.lr_lambdas[0](50) == pytest.approx(0.5)


def test_a_short_run_is_not_all_warm_up(tmp_path, caplog):
    """The paper's 2,000 steps would leave the rate of 50 steps near a hundredth of its peak."""
    trainer = make_trainer(tmp_path, max_steps=50)
    trainer.create_optimizer_and_scheduler(50)
    rates = [1e-4 * trainer.lr_scheduler.lr_lambdas[0](step) for step in range(51)]
    # From a hundredth to the peak in five steps, and down to a tenth
    assert rates[:6] == pytest.approx([1e-6, 2.575e-5, 5.05e-5, 7.525e-5, 1e-4, 1e-4], rel=0.01)
    assert rates[-1] == pytest.approx(1e-5, rel=0.02) and rates.index(max(rates)) in (4, 5)
    (said,) = [message for message in caplog.messages if "warmup_steps" in message]
    assert "2,000 is more than a tenth of the 50 steps of this run, and is shortened to 5" in said


def test_warm_up_of_a_run_that_is_counted_in_epochs(tmp_path, caplog):
    # Three batches an epoch
    options = {"num_train_epochs": 7, "max_steps": -1, "lr_scheduler_type": "linear", "warmup_steps": 20}
    trainer = make_trainer(tmp_path, **options)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[:4] == pytest.approx([0, 5e-5, 1e-4, 1e-4 * 18 / 19])
    assert "a tenth of the 21 steps" in caplog.text


@pytest.mark.parametrize(
    ("warmup_steps", "num_steps", "expected"),
    [(2000, 20_000, 2000), (2000, 19_999, 1999), (3, 9, 0), (0.3, 50, 15), (0, 50, 0), (1, 10, 1)],
)
def test_warm_up_is_a_tenth_at_most_or_the_share_that_is_given(tmp_path, caplog, warmup_steps, num_steps, expected):
    assert make_arguments(tmp_path, warmup_steps=warmup_steps).get_warmup_steps(num_steps) == expected
    is_shortened = warmup_steps >= 1 and expected < warmup_steps
    assert ("is shortened to" in caplog.text) == is_shortened


def test_warm_up_is_said_by_one_process(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(Stage1Arguments, "process_index", 1)
    assert make_arguments(tmp_path, warmup_steps=2000).get_warmup_steps(50) == 5
    assert not caplog.messages


def test_what_decays(tmp_path):
    trainer = make_trainer(tmp_path)
    decay, no_decay = trainer.create_optimizer().param_groups
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    decayed = {names[id(parameter)] for parameter in decay["params"]}
    others = {names[id(parameter)] for parameter in no_decay["params"]}
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.05, 0.0)
    assert {"query_tokens.weight", "temperature.weight", "itm_head.bias", "qformer.layernorm.weight"} <= others
    assert {"itm_head.weight", "embeddings.word_embeddings.weight"} <= decayed
    assert not any(name.endswith("bias") or "ayer_norm" in name or "LayerNorm" in name for name in decayed)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert decayed | others == trained


@pytest.mark.usefixtures("likeliest_negatives")
def test_accumulation_is_the_mean_of_the_batches(tmp_path):
    model = make_stage1().train()
    batches = [make_inputs(4, seed=seed) for seed in (0, 1)]
    expected = gradients(model, sum(model(**batch).loss for batch in batches) / 2)
    model.zero_grad()
    trainer = make_trainer(tmp_path, model=model, gradient_accumulation_steps=2)
    trainer.current_gradient_accumulation_steps = 2
    for batch in batches:
        trainer.training_step(model, batch)
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("likeliest_negatives")
def test_gradient_caching_is_an_argument(tmp_path):
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    cached = make_trainer(tmp_path, gradient_caching_chunk_size=2, **options)
    # What would be accumulated is contrasted as a whole
    assert (cached.args.per_device_train_batch_size, cached.args.gradient_accumulation_steps) == (6, 1)
    whole = make_trainer(tmp_path, model=copy.deepcopy(cached.model), per_device_train_batch_size=6)
    whole.model.gradient_caching_disable()
    for trainer in (cached, whole):
        trainer.train()
    expected, actual = ([e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, cached))
    assert len(actual) == 3 and actual == pytest.approx(expected, abs=1e-4)


def test_what_is_trained_is_said():
    lines = {line.split()[0]: line for line in describe_trained_parts(make_stage1()).splitlines()[1:]}
    assert lines["qformer"].split()[2:4] == [lines["qformer"].split()[1], "0"]
    assert lines["vision_model"].split()[2] == "64"


def test_recall_by_hand():
    similarity = torch.tensor([[0.9, 0.8, 0.1], [0.5, 0.4, 0.2], [0.1, 0.2, 0.3]])
    recall = retrieval_recall(similarity, torch.eye(3, dtype=torch.bool), k=(1, 2))
    assert recall == {
        "image_to_text_r1": pytest.approx(2 / 3),
        "image_to_text_r2": 1.0,
        "text_to_image_r1": pytest.approx(2 / 3),
        "text_to_image_r2": 1.0,
    }


def test_recall_with_several_texts_of_an_image():
    features = torch.eye(4)[:, None].numpy()
    prediction = transformers.EvalPrediction(
        predictions=(features[[0, 0, 1]], torch.eye(4)[[2, 0, 1]].numpy()), label_ids=torch.tensor([7, 7, 9]).numpy()
    )
    metrics = contrastive_retrieval_metrics(prediction)
    assert metrics["image_to_text_r1"] == 1.0  # one of the two texts is enough
    assert metrics["text_to_image_r1"] == pytest.approx(1.0)


def test_recall_of_a_trainer_is_that_of_all_similarities():
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(60, 4, 16, generator=generator), torch.randn(60, 16, generator=generator)
    ids = torch.randint(40, (60,), generator=generator)
    images = images[[ids.tolist().index(number) for number in ids.tolist()]]  # an image has one set of features
    prediction = transformers.EvalPrediction((images.numpy(), texts.numpy()), ids.numpy())
    metrics = contrastive_retrieval_metrics(prediction)
    own, first = ids.unique(), [ids.tolist().index(number) for number in ids.unique().tolist()]
    expected = retrieval_recall((images[first] @ texts.T).amax(dim=1), own[:, None] == ids)
    assert metrics == pytest.approx(expected | {"mean_recall": sum(expected.values()) / 6})
    assert 0 < metrics["image_to_text_r10"] < 1


def test_incomplete_checkpoints_are_passed_over(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    for step in (5, 10, 15, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        torch.save({}, folder / "rng_state.pth")
    (tmp_path / "checkpoint-20" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-15" / "trainer_state.json").write_text('{"global_st')
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    # In another number of processes it goes on all the same
    assert last_complete_checkpoint(tmp_path, world_size=2) == str(tmp_path / "checkpoint-10")
    state = (tmp_path / "checkpoint-10" / "rng_state.pth").read_bytes()
    (tmp_path / "checkpoint-10" / "rng_state.pth").write_bytes(state[:-10])
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")


def test_a_checkpoint_of_some_of_the_processes_is_passed_over(tmp_path):
    for step, processes in ((5, 2), (10, 1)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        for rank in range(processes):
            torch.save({}, tmp_path / f"checkpoint-{step}" / f"rng_state_{rank}.pth")
    assert last_complete_checkpoint(tmp_path, world_size=2) == str(tmp_path / "checkpoint-5")


def write_checkpoint(folder, step: int = 5, weights_alone: bool = False):
    (folder / f"checkpoint-{step}").mkdir(parents=True)
    state = {"global_step": step, "epoch": step / 3}
    (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    if not weights_alone:
        torch.save({}, folder / f"checkpoint-{step}" / "rng_state.pth")


@pytest.fixture
def model_folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"first")
    return tmp_path / "model"


def find(folder, model="model", data="rows.parquet", options=None, rows=12, **arguments):
    """What a run of a script would go on from."""
    trainer = make_trainer(folder, **{"max_steps": 9, **arguments})
    trainer.train_dataset = ImageTextPairs(make_pairs(rows))
    options = {"model": str(model), "data": data, "skip_bad_rows": False, "prompt": ""} | (options or {})
    return checkpoint_to_resume(trainer, options, models=["model"])


def test_a_run_goes_on_from_its_own_checkpoint(tmp_path, model_folder):
    run, moved = tmp_path / "run", tmp_path / "moved"
    assert find(run, model_folder) is None
    write_checkpoint(run)
    expected = str(run / "checkpoint-5")
    assert find(run, model_folder) == expected
    # What does not change what is learned, or makes the run longer, may differ
    free = {"logging_steps": 7, "max_steps": 20, "dataloader_num_workers": 2, "save_steps": 3, "bf16": True}
    assert find(run, model_folder, options={"skip_bad_rows": True}, **free) == expected
    # So may the way that a batch of four is made, and the places of model and data
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    model_folder.rename(moved)
    assert find(run, moved, "moved.parquet", **split) == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"options": {"prompt": "a photo of"}}, "--prompt: '' there, 'a photo of' now"),
        ({"options": {"vision_model": "v"}}, "--vision_model: None there, 'v' now"),
        ({"rows": 11, "data": "other.parquet"}, "--data: 'rows.parquet' there, 'other.parquet' now; contents of --da"),
        ({"rows": 11}, "contents of --data: "),
        ({"learning_rate": 1e-3}, "--learning_rate: 0.0001 there, 0.001 now"),
        ({"seed": 1}, "--seed: 42 there, 1 now"),
        ({"preset": "stage1"}, "--preset: None there, 'stage1' now"),
        ({"warmup_steps": 0.5}, "--warmup_steps: 2000.* there, 0.5 now"),
        ({"per_device_train_batch_size": 8}, "batch over all processes: 4 there, 8 now"),
    ],
    ids=str,
)
def test_a_run_does_not_go_on_from_another(change, words, tmp_path, model_folder):
    run = tmp_path / "run"
    find(run, model_folder)
    write_checkpoint(run)
    before = (run / "_settings.json").read_text()
    with pytest.raises(ValueError, match=words) as error:
        find(run, model_folder, **change)
    assert "--overwrite" in str(error.value) and "another output folder" in str(error.value)
    assert (run / "_settings.json").read_text() == before
    assert find(run, model_folder) == str(run / "checkpoint-5")


def test_checkpoints_of_another_run_are_not_left_in_its_folder(tmp_path, model_folder):
    """Going on from elsewhere, the folder would tell of this run, and hold what another one made."""
    run, other = tmp_path / "run", tmp_path / "other"
    find(run, model_folder)
    write_checkpoint(run)
    write_checkpoint(other)
    given = {"resume_from_checkpoint": str(other / "checkpoint-5")}
    before = (run / "_settings.json").read_text()
    with pytest.raises(ValueError, match="checkpoints that other settings made .checkpoint-5."):
        find(run, model_folder, learning_rate=1e-3, **given)
    assert (run / "_settings.json").read_text() == before
    assert find(run, model_folder, **given) == given["resume_from_checkpoint"]
    assert find(tmp_path / "new", model_folder, learning_rate=1e-3, **given) == given["resume_from_checkpoint"]


def test_the_same_folder_with_other_weights_is_another_model(tmp_path, model_folder):
    run = tmp_path / "run"
    find(run, model_folder)
    write_checkpoint(run)
    (model_folder / "training_args.bin").write_bytes(b"no weights")
    assert find(run, model_folder) is not None
    (model_folder / "model.safetensors").write_bytes(b"later")
    with pytest.raises(ValueError, match="contents of --model"):
        find(run, model_folder)


def test_the_same_model_of_the_hub_at_another_revision(tmp_path, monkeypatch):
    def at(commit):
        found = f"{tmp_path}/models--me--blip2/snapshots/{commit}/config.json"
        monkeypatch.setattr("blip2_hf.training.checkpoints.cached_file", lambda name, file: found)
        return find(tmp_path / "run", "me/blip2")

    at("a" * 40)
    write_checkpoint(tmp_path / "run")
    assert at("a" * 40) is not None
    with pytest.raises(ValueError, match="contents of --model: 'aaaa.*' there, 'bbbb.*' now"):
        at("b" * 40)


def test_overwriting_begins_anew(tmp_path):
    write_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="checkpoint-5 is there already, without _settings.json"):
        find(tmp_path)
    # It is taken all the same if it is named
    named = str(tmp_path / "checkpoint-5")
    with pytest.raises(ValueError, match="one of the two"):
        find(tmp_path, resume_from_checkpoint=named, overwrite=True)
    assert find(tmp_path, resume_from_checkpoint=named, seed=3) == named
    (tmp_path / "keep.txt").touch()
    assert find(tmp_path, overwrite=True) is None
    assert {path.name for path in tmp_path.iterdir()} == {"keep.txt", "_settings.json"}
    # Settings without a checkpoint bind no other run
    assert find(tmp_path, seed=4) is None


def test_weights_alone_are_not_gone_on_from(tmp_path, caplog):
    find(tmp_path)
    write_checkpoint(tmp_path, 3, weights_alone=True)
    assert last_complete_checkpoint(tmp_path) is None
    assert "weights alone (save_only_model)" in caplog.text
    for options in ({}, {"resume_from_checkpoint": str(tmp_path / "checkpoint-3")}):
        with pytest.raises(ValueError, match="checkpoint-3 has weights alone.*--overwrite"):
            find(tmp_path, **options)
    for checkpoint in (True, str(tmp_path / "checkpoint-3")):
        with pytest.raises(ValueError, match="checkpoint-3 has weights alone"):
            make_trainer(tmp_path).train(resume_from_checkpoint=checkpoint)
    write_checkpoint(tmp_path, 2)
    assert find(tmp_path) == str(tmp_path / "checkpoint-2")


def test_a_run_is_not_made_shorter_than_it_is(tmp_path):
    find(tmp_path)
    write_checkpoint(tmp_path, 6)
    assert find(tmp_path, max_steps=6) is not None
    with pytest.raises(ValueError, match="learned for 6 steps, and the run is to have 4"):
        find(tmp_path, max_steps=4)
    assert find(tmp_path, max_steps=-1, num_train_epochs=2) is not None
    with pytest.raises(ValueError, match="learned for 2 epochs, and the run is to have 1"):
        find(tmp_path, max_steps=-1, num_train_epochs=1)
    with pytest.raises(ValueError, match="no trainer_state.json"):
        find(tmp_path, resume_from_checkpoint=str(tmp_path / "nothing"))


def test_a_finished_run_stays_as_it_is(tmp_path):
    """In the middle of an epoch Trainer makes one step more than there are to be, each time that it goes on."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    first = make_trainer(tmp_path, **settings)
    first.train()
    expected = {name: weight.clone() for name, weight in first.model.state_dict().items()}
    again = make_trainer(tmp_path, **settings)
    checkpoint = last_complete_checkpoint(tmp_path)
    assert again.train(resume_from_checkpoint=checkpoint).global_step == 4
    assert all(torch.equal(weight, expected[name]) for name, weight in again.model.state_dict().items())
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert again.state.global_step == 4 and again.evaluate()["eval_loss"] > 0


def test_weights_alone_are_told_by_what_trainer_saves(tmp_path):
    for name, alone in (("all", False), ("alone", True)):
        options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_only_model": alone}
        trainer = make_trainer(tmp_path / name, **options)
        checkpoint_to_resume(trainer, {})
        trainer.train()
        assert (last_complete_checkpoint(tmp_path / name) is None) == alone


def arguments_of_a_run(folder, **arguments) -> dict:
    common = {"warmup_steps": 2, "learning_rate": 1e-3, "logging_steps": 1, "report_to": "none", "use_cpu": True}
    return {"output_dir": str(folder), "disable_tqdm": True, **common, **arguments}


def losses(folder) -> dict[int, list[float]]:
    log = json.loads((folder / "log.json").read_text())
    names = ("loss", "loss_itc", "loss_itm", "loss_itg", "eval_loss")
    return {
        (entry["step"], "eval_loss" in entry): [entry[name] for name in names if name in entry]
        for entry in log
        if "loss" in entry or "eval_loss" in entry
    }


@pytest.mark.parametrize("stream", [False, True], ids=["rows", "stream"])
def test_killed_and_resumed(tmp_path, stream):
    settings = {"max_steps": 16, "save_steps": 3, "save_total_limit": 2, "per_device_train_batch_size": 4}
    settings |= {"eval_strategy": "steps", "eval_steps": 5}
    run(train_stage1, arguments_of_a_run(tmp_path / "whole", **settings), stream, folder=tmp_path)
    folder = tmp_path / "killed"
    arguments = arguments_of_a_run(folder, **settings)
    # Once as soon as a second checkpoint has begun to be written, and once some time after the next
    for checkpoint, delay in (("checkpoint-6", 0.0), ("checkpoint-12", 0.05)):
        process = start(train_stage1, arguments, stream, folder=tmp_path)
        while not (folder / checkpoint).exists():
            assert process.is_alive(), "ended before it was killed"
            time.sleep(0.0005)
        time.sleep(delay)
        process.kill()
        process.join()
        assert not (folder / "log.json").exists()
    run(train_stage1, arguments, stream, folder=tmp_path)
    assert losses(folder) == losses(tmp_path / "whole")


def test_joined_data_sets_want_names(tmp_path):
    rows = make_pairs(6)
    named = [ImageTextPairs(rows, source=name) for name in ("first", "second")]
    assert named[0][3]["image_id"] != named[1][3]["image_id"]
    trainer = make_trainer(tmp_path)
    trainer.train_dataset = torch.utils.data.ConcatDataset(named)
    trainer.train()
    trainer.train_dataset = torch.utils.data.ConcatDataset([ImageTextPairs(rows), ImageTextPairs(rows)])
    with pytest.raises(ValueError, match="source="):
        trainer.train()


def test_held_out_texts_of_one_image(tmp_path):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=2)
    rows = make_pairs(5).add_column("id", [0, 0, 1, 1, 1])
    metrics = trainer.evaluate(ImageTextPairs(rows, id_column="id", train=False))
    assert metrics["eval_loss"] > 0


def test_a_stream_in_two_processes(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "no", "per_device_train_batch_size": 4}
    run(train_stage1, arguments_of_a_run(tmp_path / "two", **settings), True, folder=tmp_path, processes=2)
    assert len(losses(tmp_path / "two")) == 4


def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    for name, processes, batch_size in (("one", 1, 8), ("two", 2, 4)):
        settings = {"max_steps": 5, "save_strategy": "no", "per_device_train_batch_size": batch_size}
        arguments = arguments_of_a_run(tmp_path / name, **settings)
        # Without a stream, and without chance
        run(train_stage1, arguments, False, True, folder=tmp_path, processes=processes)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 5
    for step in one:
        assert two[step] == pytest.approx(one[step], abs=2e-4)
