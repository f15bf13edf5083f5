"""FSDP2 and DeepSpeed by Trainer's own options: they learn what DistributedDataParallel learns."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from paths import REPOSITORY
from processes import run
from safetensors.torch import load_file
from saved_models import save_captioner
from sharded_training import run_command, train_sharded
from stage1 import make_stage1
from tiny import make_image, make_model
from torch import nn

from blip2_hf import Blip2ForConditionalGeneration, Blip2ForPreTraining
from blip2_hf.training.sharding import shared_weights_in_one_group


STEPS = 4
MODELS = {
    "stage1": (Blip2ForPreTraining, make_stage1),
    "stage2": (Blip2ForConditionalGeneration, make_model),
    "stage2 t5": (Blip2ForConditionalGeneration, lambda: make_model("t5")),
}


def options(kind: str) -> dict:
    """Those of Trainer for a kind of sharding. DeepSpeed would not divide weights as small as those of the tests."""
    if kind == "fsdp2":
        return {"fsdp": True, "fsdp_config": {"version": 2}}
    if kind == "ddp":
        return {}
    config = json.loads((REPOSITORY / "examples" / "deepspeed" / f"{kind}.json").read_text())
    config["bf16"] = {"enabled": False}
    if kind == "zero3":
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return {"deepspeed": config}


def train(folder: Path, name: str, kind: str, checkpoint: Path | None = None) -> tuple[list[dict], dict]:
    """Return the log of a training in two processes, and the weights that it saves."""
    if not (folder / "model").exists():
        torch.manual_seed(0)
        MODELS[name][1]().save_pretrained(folder / "model")
    output = folder / kind
    # With a small epsilon, Adam makes steps of a full size of gradients that are 0 but for rounding
    arguments = {"output_dir": str(output), "max_steps": STEPS, "adam_epsilon": 0.1, "learning_rate": 0.05}
    arguments |= {"report_to": "none", "logging_steps": 1, "save_steps": 2, "eval_strategy": "no"}
    arguments |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 2, **options(kind)}
    environment = {"DS_ACCELERATOR": "cpu"} if kind.startswith("zero") else {}
    run(train_sharded, folder / "model", arguments, checkpoint, folder=folder, processes=2, **environment)
    return json.loads((output / "log.json").read_text()), load_file(output / "model.safetensors")


def losses(log: list[dict]) -> list[float]:
    return [entry[name] for entry in log for name in ("loss", "eval_loss") if name in entry]


def check_training(folder: Path, name: str, kind: str):
    """Compare losses, scores and the saved weights with those of DistributedDataParallel."""
    expected_log, expected = train(folder, name, "ddp")
    log, weights = train(folder, name, kind)
    assert len(losses(log)) == STEPS + 1 and len(set(losses(log))) == STEPS + 1
    assert losses(log) == pytest.approx(losses(expected_log), rel=1e-4)
    # What is generated, or found, with weights that lie in pieces
    scores = [key for key in log[-1] if key.startswith("eval_") and ("_r1" in key or "word_f1" in key)]
    assert scores and [log[-1][key] for key in scores] == pytest.approx([expected_log[-1][key] for key in scores])
    # Weights that modules share may be in the file for each of them
    assert weights.keys() >= expected.keys()
    start, ddp, model = (MODELS[name][0].from_pretrained(folder / place) for place in ("model", "ddp", kind))
    trained = {key for key, weight in model.named_parameters(remove_duplicate=False) if weight.requires_grad}
    start, ddp, model = (each.state_dict() for each in (start, ddp, model))
    for key, weight in model.items():
        torch.testing.assert_close(weight, ddp[key], rtol=1e-3, atol=1e-4, msg=key)
        assert key in trained or torch.equal(weight, start[key]), key
        assert key not in weights or torch.equal(weight, weights[key]), key
    assert any(not torch.equal(model[key], start[key]) for key in trained)


def check_resuming(folder: Path, name: str, kind: str):
    """Compare the end of a run that went on from its middle with that of the run that did not stop."""
    log, weights = json.loads((folder / kind / "log.json").read_text()), load_file(folder / kind / "model.safetensors")
    shutil.rmtree(folder / kind / f"checkpoint-{STEPS}")
    resumed_log, resumed = train(folder, name, kind, folder / kind / "checkpoint-2")
    assert losses(resumed_log) == pytest.approx(losses(log), rel=1e-5)
    assert resumed.keys() == weights.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(resumed[key], weight, rtol=1e-4, atol=1e-5, msg=key)


def test_stage1_in_fsdp2(tmp_path):
    """The bias of BERT's head is its decoder's, too, and accelerate would put them into two groups."""
    check_training(tmp_path, "stage1", "fsdp2")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_fsdp2(tmp_path, name):
    check_training(tmp_path, name, "fsdp2")
    check_resuming(tmp_path, name, "fsdp2")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_deepspeed(tmp_path, name, kind):
    check_training(tmp_path, name, kind)
    check_resuming(tmp_path, name, kind)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
def test_finetune_with_zero3(tmp_path):
    """The preset runs the tower before DeepSpeed divides it."""
    save_captioner(tmp_path / "captioner")
    (tmp_path / "photos").mkdir()
    for number in range(12):
        make_image(number).save(tmp_path / "photos" / f"{number}.png")
        (tmp_path / "photos" / f"{number}.txt").write_text(f"a dog {number}")
    config = REPOSITORY / "examples" / "deepspeed" / "zero3.json"
    model = ["--model", str(tmp_path / "captioner"), "--preset", "finetune", "--deepspeed", str(config)]
    options = ["--max-steps", "2", "--batch-size", "2", "--held-out", "4", "--output", str(tmp_path / "trained")]
    command = ["finetune", str(tmp_path / "photos"), *model, *options]
    run(run_command, command, folder=tmp_path, processes=2, DS_ACCELERATOR="cpu")
    start, trained = (
        Blip2ForConditionalGeneration.from_pretrained(tmp_path / name).state_dict()
        for name in ("captioner", "trained")
    )
    # The command loads the language model in bfloat16
    start |= {name: w.bfloat16().float() for name, w in start.items() if name.startswith("language_model.")}
    changed = {name.partition(".")[0] for name, weight in trained.items() if not torch.equal(weight, start[name])}
    assert "qformer" in changed and "language_model" not in changed


class _Tied(nn.Module):
    """A model whose embeddings and head share a weight, and its head a bias with another module."""

    def __init__(self, shares_bias: bool):
        super().__init__()
        self.embeddings, self.decoder, self.head = nn.Embedding(5, 3), nn.Linear(3, 5), nn.Module()
        self.decoder.weight = self.embeddings.weight
        if shares_bias:
            self.head.bias = self.decoder.bias

    def get_input_embeddings(self):
        return self.embeddings

    def get_output_embeddings(self):
        return self.decoder


@pytest.mark.parametrize("shares_bias", [False, True])
def test_embeddings_are_hidden_only_if_others_share_their_weights(shares_bias):
    model = _Tied(shares_bias)
    with shared_weights_in_one_group(model):
        assert (model.get_input_embeddings() is None) == (model.get_output_embeddings() is None) == shares_bias
    assert model.get_input_embeddings() is model.embeddings and model.get_output_embeddings() is model.decoder
