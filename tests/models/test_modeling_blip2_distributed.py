"""Stage 2 in two processes: together, and over accumulated batches, they are one process with the whole batch."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run
from sharding import sharded_gradients, wrap_in_fsdp, wrap_in_fsdp2
from stage2 import remove_dropout
from tiny import make_model, make_pixel_values
from torch.nn.parallel import DistributedDataParallel
from train_stage2 import train_stage2


def arguments_of_a_run(folder: Path, **arguments) -> dict:
    common = {"max_steps": 4, "warmup_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no"}
    return {"output_dir": str(folder), "use_cpu": True, "report_to": "none", **common, **arguments}


def read_log(folder: Path) -> list[dict]:
    return json.loads((folder / "log.json").read_text())


def test_trainer_weighs_each_label_alike_in_processes_and_accumulated_batches(tmp_path):
    losses = {}
    for name, processes, sizes in (("whole", 1, (8, 1)), ("parts", 2, (2, 2))):
        settings = dict(zip(("per_device_train_batch_size", "gradient_accumulation_steps"), sizes, strict=True))
        arguments = arguments_of_a_run(tmp_path / name, **settings)
        run(train_stage2, arguments, folder=tmp_path, processes=processes)
        losses[name] = [entry["loss"] for entry in read_log(tmp_path / name) if "loss" in entry]
    assert len(losses["whole"]) == 4 and len(set(losses["whole"])) == 4
    assert losses["parts"] == pytest.approx(losses["whole"], abs=2e-4)


def test_references_stand_beside_their_predictions_in_processes(tmp_path):
    """Seven rows do not share out evenly between two processes, nor into batches of two."""
    settings = {"max_steps": 1, "per_device_eval_batch_size": 2, "predict_with_generate": True}
    arguments = arguments_of_a_run(tmp_path / "parts", **settings, generation_max_length=40)
    run(train_stage2, arguments, folder=tmp_path, processes=2)
    scores = next(entry for entry in read_log(tmp_path / "parts") if "eval_loss" in entry)
    assert scores["eval_keeps_the_order"] is True and scores["eval_word_f1"] >= 0


def make_batch(rows: slice) -> dict[str, torch.Tensor]:
    """Five captions of very different lengths."""
    lengths = torch.tensor([3, 9, 4, 1, 6])
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, 300, (5, 9), generator=generator)
    is_text = torch.arange(9) < lengths[:, None]
    torch.manual_seed(0)
    batch = {
        "pixel_values": make_pixel_values(5),
        "input_ids": input_ids.masked_fill(~is_text, 1),
        "attention_mask": is_text.long(),
        "labels": input_ids.masked_fill(~is_text, -100),
    }
    return {name: tensor[rows] for name, tensor in batch.items()}


def prepare():
    torch.manual_seed(0)
    model = make_model().train()
    remove_dropout(model)
    return model


def run_process(folder: Path):
    dist.init_process_group("gloo")
    rank, results = dist.get_rank(), {}
    for name, wrap in {"ddp": DistributedDataParallel, "fsdp": wrap_in_fsdp, "fsdp2": wrap_in_fsdp2}.items():
        model = prepare()
        batch = make_batch([slice(0, 2), slice(2, 5)][rank])
        # As Trainer: labels of all processes, and a loss that their mean undoes
        num_items = make_batch(slice(0, 5))["labels"].ne(-100).sum()
        parallel = wrap(model)
        outputs = parallel(**batch, num_items_in_batch=num_items, skip_logits=True)
        assert outputs.logits is None
        loss = outputs.loss * dist.get_world_size()
        loss.backward()
        gradients = sharded_gradients(model)
        if name == "ddp":
            gradients = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
        results[name] = {"loss": loss.detach(), "gradients": gradients}
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_data_parallel_and_sharded(tmp_path):
    run(run_process, tmp_path, folder=tmp_path, processes=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model = prepare()
    loss = model(**make_batch(slice(0, 5))).loss
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name in results[0]:
        mean = sum(result[name]["loss"] for result in results) / 2
        torch.testing.assert_close(mean, loss.detach(), rtol=1e-5, atol=1e-5)
        assert results[0][name]["gradients"].keys() == expected.keys()
        for key, gradient in expected.items():
            wanted = gradient.norm() if name == "fsdp" else gradient
            torch.testing.assert_close(
                results[0][name]["gradients"][key], wanted, rtol=1e-3, atol=1e-5, msg=f"{name} {key}"
            )
