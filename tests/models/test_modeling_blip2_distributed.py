"""Stage 2 in two processes: together, and over accumulated batches, they are one process with the whole batch."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from paths import HELPERS
from sharding import sharded_gradients
from stage2 import remove_dropout
from tiny import make_model, make_pixel_values
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from blip2_hf.models.modeling_qformer import Blip2QFormerLayer, FoldedLinear


PROGRAM = HELPERS / "train_stage2.py"
LAYERS = {Blip2QFormerLayer, FoldedLinear, OPTDecoderLayer}


def run(folder, *options: str, processes: int = 1) -> list[float]:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    common = "--max_steps 4 --warmup_steps 2 --learning_rate 1e-2 --logging_steps 1 --save_strategy no --use_cpu"
    command = [*start, str(PROGRAM), "--output_dir", str(folder), *common.split(), "--report_to", "none", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return [entry["loss"] for entry in json.loads((folder / "log.json").read_text()) if "loss" in entry]


def test_trainer_weighs_each_label_alike_in_processes_and_accumulated_batches(tmp_path):
    whole = run(tmp_path / "whole", "--per_device_train_batch_size", "8")
    small = ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2")
    parts = run(tmp_path / "parts", *small, processes=2)
    assert len(whole) == 4 and len(set(whole)) == 4
    assert parts == pytest.approx(whole, abs=2e-4)


def test_references_stand_beside_their_predictions_in_processes(tmp_path):
    """Seven rows do not share out evenly between two processes, nor into batches of two."""
    options = ("--max_steps", "1", "--per_device_eval_batch_size", "2", "--predict_with_generate")
    run(tmp_path / "parts", *options, "--generation_max_length", "40", processes=2)
    log = json.loads((tmp_path / "parts" / "log.json").read_text())
    scores = next(entry for entry in log if "eval_loss" in entry)
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


def wrap_in_fsdp(model):
    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls=LAYERS)
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )


def wrap_in_fsdp2(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in reversed(list(model.modules())):
        if isinstance(module, tuple(LAYERS)):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def run_process(rank: int, world_size: int, folder: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    results = {}
    for name, wrap in {"ddp": DistributedDataParallel, "fsdp": wrap_in_fsdp, "fsdp2": wrap_in_fsdp2}.items():
        model = prepare()
        batch = make_batch([slice(0, 2), slice(2, 5)][rank])
        # As Trainer: labels of all processes, and a loss that their mean undoes
        num_items = make_batch(slice(0, 5))["labels"].ne(-100).sum()
        parallel = wrap(model)
        outputs = parallel(**batch, num_items_in_batch=num_items, skip_logits=True)
        assert outputs.logits is None
        loss = outputs.loss * world_size
        loss.backward()
        gradients = sharded_gradients(model)
        if name == "ddp":
            gradients = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
        results[name] = {"loss": loss.detach(), "gradients": gradients}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_data_parallel_and_sharded(tmp_path):
    mp.spawn(run_process, args=(2, str(tmp_path)), nprocs=2)
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
