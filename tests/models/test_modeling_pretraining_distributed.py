"""Several processes, each with its share of a batch: together they are to be one process with the whole of it."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run
from sharding import sharded_gradients, wrap_in_fsdp, wrap_in_fsdp2
from stage1 import assert_same, gradients, make_inputs, make_stage1
from torch.nn.parallel import DistributedDataParallel

from blip2_hf.models.distributed import GlobalBatch


pytestmark = pytest.mark.usefixtures("likeliest_negatives")
CASES = {
    "plain": {},
    "image_ids": {"image_ids": torch.tensor([4, 7, 4, 1, 0, 4, 9])},
    "gradient caching": {"chunk_size": 2},
    "unfrozen tower": {"pixel_values": torch.randn(7, 3, 28, 28, generator=torch.Generator().manual_seed(1))},
}


def prepare(case: dict):
    """The model, and the whole batch of seven pairs, of very different lengths."""
    torch.manual_seed(0)
    model = make_stage1().train()
    case = dict(case)
    if chunk_size := case.pop("chunk_size", None):
        model.gradient_caching_enable(chunk_size)
    inputs = make_inputs(7, lengths=(4, 5, 12, 3, 9, 6, 7)) | case
    if "pixel_values" in case:
        model.vision_model.requires_grad_(True)
        # Nothing reads the pooled output, and DistributedDataParallel wants a gradient for all that is trained
        inputs.pop("image_embeds")
    return model, inputs


def share(inputs: dict, rows: slice) -> dict:
    """The rows of one process, padded to its own longest text."""
    own = {name: value[rows] for name, value in inputs.items()}
    length = int(own["attention_mask"].sum(1).max())
    return {name: value[:, :length] if value.dim() == 2 else value for name, value in own.items()}


def run_process(folder: Path):
    torch.multinomial = lambda weights, *args, **kwargs: weights.argmax(-1, keepdim=True)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    bounds = {2: [0, 3, 7], 3: [0, 3, 5, 7]}[dist.get_world_size()]
    results = {}
    for name, case in CASES.items():
        model, inputs = prepare(case)
        parallel = DistributedDataParallel(model)
        outputs = parallel(**share(inputs, slice(bounds[rank], bounds[rank + 1])))
        results[name] = {
            "losses": {key: outputs[key].detach() for key in ("loss", "loss_itc", "loss_itm", "loss_itg")},
            "gradients": gradients(model, outputs.loss),
            "rows": {k: outputs[k].detach() for k in ("logits_per_image", "logits_per_text", "negative_image_index")},
        }
    for name, wrap in {"fsdp": wrap_in_fsdp, "fsdp2": wrap_in_fsdp2}.items():
        model, inputs = prepare(CASES["plain"])
        outputs = wrap(model)(**share(inputs, slice(bounds[rank], bounds[rank + 1])))
        outputs.loss.backward()
        results[name] = {"loss": outputs.loss.detach(), "gradients": sharded_gradients(model)}
    results["fetched"] = count_what_travels(rank)
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def count_what_travels(rank: int) -> list[int]:
    """How many rows leave this process when each asks for rows 0 and 4 (of 3 and of 2 rows)."""
    sent, real = [], dist.all_to_all_single
    dist.all_to_all_single = lambda out, tensor, *args: (sent.append(len(tensor)), real(out, tensor, *args))[1]
    rows = torch.full((3 - rank, 2), float(rank)) if rank < 2 else torch.zeros(0, 2)
    batch = GlobalBatch.of(len(rows), 5, rows.device)
    fetched = batch.fetch(rows, torch.tensor([4, 0]))
    dist.all_to_all_single = real
    assert fetched.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    return sent


@pytest.fixture(scope="module", params=[2, 3])
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"processes-{request.param}")
    run(run_process, folder, folder=folder, processes=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("name", CASES)
def test_processes_together_are_one_with_the_whole_batch(results, name):
    model, inputs = prepare(CASES[name])
    expected = model(**inputs)
    for key in results[0][name]["losses"]:
        mean = sum(result[name]["losses"][key] for result in results) / len(results)
        torch.testing.assert_close(mean, expected[key].detach(), rtol=1e-6, atol=1e-6)
    for key in ("logits_per_image", "logits_per_text", "negative_image_index"):
        rows = torch.cat([result[name]["rows"][key] for result in results])
        torch.testing.assert_close(rows, expected[key].detach(), rtol=1e-5, atol=1e-5)
    expected_gradients = gradients(model, expected.loss)
    for result in results:
        assert result[name]["gradients"].keys() == expected_gradients.keys()
        assert_same(result[name]["gradients"], expected_gradients, 1e-6)


@pytest.mark.parametrize("name", ["fsdp", "fsdp2"])
def test_sharded_parameters(results, name):
    model, inputs = prepare(CASES["plain"])
    expected = model(**inputs)
    loss = sum(result[name]["loss"] for result in results) / len(results)
    torch.testing.assert_close(loss, expected.loss.detach(), rtol=1e-6, atol=1e-6)
    wanted = gradients(model, expected.loss)
    if name == "fsdp":
        wanted = {key: gradient.norm() for key, gradient in wanted.items()}
    assert results[0][name]["gradients"].keys() == wanted.keys()
    assert_same(results[0][name]["gradients"], wanted, 1e-6)


def test_only_what_is_asked_for_travels(results):
    world_size = len(results)
    # Process 0 owns row 0, process 1 row 4; each goes once to each process
    assert [result["fetched"] for result in results][:2] == [[world_size], [world_size]]
    assert all(result["fetched"] == [0] for result in results[2:])
