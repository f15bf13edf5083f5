"""
Measure a step of stage 1, AdamW included: two passes of the Q-Former against the four of the authors' code.

    python benchmarks/stage1.py                                     # on a CPU thread
    python benchmarks/stage1.py --device cuda --batch-size 256 --dtype bfloat16 [--compile]

The two are timed in turn, on the same model and data: stored tower features [batch, 257, 1408], a Q-Former of
BERT-base's size with 32 queries, captions of about 12 tokens, dropout 0.1. The four passes are those of
tests/helpers/naive_stage1.py. They pad texts to 32 tokens, project the image again in each pass that reads it, and use
torch's default AdamW. The output is one line of JSON. A speed_ratio above 1 and a memory_ratio below 1 mean that two
passes are better.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from measure import flops, matmul_peak, peak_memory, peak_memory_of_fresh_process, seconds_in_turn
from shapes import PAPER, Shapes

from blip2_hf import Blip2Config, Blip2ForPreTraining, Blip2QFormerConfig, Blip2VisionConfig


# Behind this folder, because files there have the same names
sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
from naive_stage1 import naive_stage1  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of autocast")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each kind that are timed; the median counts")
    parser.add_argument("--compile", action="store_true", help="compile both")
    parser.add_argument("--chunk-size", type=int, help="of gradient caching, in the two passes")
    parser.add_argument("--memory-of", choices=["two_pass", "four_pass"], help=argparse.SUPPRESS)
    return parser.parse_args()


def make_model(
    device: str, chunk_size: int | None = None, shapes: Shapes = PAPER, with_tower: bool = False
) -> Blip2ForPreTraining:
    """Make a BERT-base Q-Former that reads EVA-CLIP ViT-g, or the stored features of one."""
    torch.manual_seed(0)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**shapes.vision),
        qformer_config=Blip2QFormerConfig(**shapes.qformer, use_qformer_text_input=True),
        has_vision_tower=with_tower,
    )
    with torch.device(device):
        model = Blip2ForPreTraining(config)
    if chunk_size is not None:
        model.gradient_caching_enable(chunk_size)
    return model.to(device).train()


def make_batch(batch_size: int, device: str, dtype: torch.dtype, shapes: Shapes = PAPER) -> dict[str, torch.Tensor]:
    """Make captions of 9 to 15 tokens, 12 on average, [CLS] and [SEP] included, and features."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.arange(batch_size) * 6 // max(batch_size - 1, 1) + 9
    length = int(lengths.max())
    input_ids = torch.randint(1000, 30000, (batch_size, length), generator=generator)
    attention_mask = (torch.arange(length) < lengths[:, None]).long()
    input_ids[:, 0] = 101
    input_ids[torch.arange(batch_size), lengths - 1] = 102
    image_embeds = torch.empty(batch_size, *shapes.features, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    for rows in image_embeds.split(1024):
        rows.normal_(generator=generator)
    texts = {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}
    return {"image_embeds": image_embeds} | {name: tensor.to(device) for name, tensor in texts.items()}


class Step:
    """Forward, backward and AdamW of one of the two."""

    def __init__(self, model, batch, arguments, naive: bool):
        self.model, self.batch, self.device = model, batch, arguments.device
        self.dtype = getattr(torch, arguments.dtype)
        self.forward = (lambda **inputs: naive_stage1(model, pad_to=32, **inputs)) if naive else model
        if arguments.compile:
            self.forward = torch.compile(self.forward, dynamic=False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        options = {} if naive else {"fused": True}
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, betas=(0.9, 0.98), weight_decay=0.05, **options)

    def loss(self) -> torch.Tensor:
        low = self.dtype != torch.float32
        with torch.autocast(self.device.split(":")[0], self.dtype) if low else nullcontext():
            return self.forward(**self.batch)["loss"]

    def __call__(self, set_to_none: bool = True):
        self.optimizer.zero_grad(set_to_none)
        self.loss().backward()
        self.optimizer.step()


def peak_memory_of(step: Step) -> int:
    """Measure the bytes in addition to parameters, gradients and the optimizer's state."""
    step(set_to_none=False)
    return peak_memory(lambda: step(set_to_none=False), step.device)


def _take_first(weights: torch.Tensor, *args) -> torch.Tensor:
    return weights.ne(0).int().argmax(-1, keepdim=True)


@contextmanager
def first_negatives() -> Iterator[None]:
    """Draw hard negatives without chance: the first is taken. Rounding changes which is the likeliest."""
    draw, torch.multinomial = torch.multinomial, _take_first
    try:
        yield
    finally:
        torch.multinomial = draw


def largest_difference(two: Step, four: Step) -> dict[str, float]:
    """
    Compute the largest relative difference of losses, and of gradients by their norms.

    Without dropout, and with the first negatives. The gradient of a key's bias is left out because it is zero
    but for rounding.
    """
    model = two.model.eval()
    losses, gradients = [], []
    with first_negatives():
        for step in (two, four):
            step.optimizer.zero_grad()
            losses.append(step.loss())
            losses[-1].backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.train()
    names = [name for name in gradients[1] if not name.endswith("key.bias")]
    worst = max((gradients[0][name] - gradients[1][name]).norm() / gradients[1][name].norm() for name in names)
    loss = (losses[0] - losses[1]).detach().abs() / losses[1].detach()
    return {"loss": float(loss), "gradient": float(worst)}


def main():
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    model = make_model(arguments.device, arguments.chunk_size)
    batch = make_batch(arguments.batch_size, arguments.device, dtype)
    if arguments.memory_of:
        print(peak_memory_of(Step(model, batch, arguments, naive=arguments.memory_of == "four_pass")))
        return
    steps = {"two_pass": Step(model, batch, arguments, naive=False), "four_pass": Step(model, batch, arguments, True)}
    difference = largest_difference(*steps.values())
    results: dict[str, dict] = {name: {} for name in steps}
    for name, step in steps.items():
        step()
        peak = peak_memory_of_fresh_process(name) if arguments.device == "cpu" else peak_memory_of(step)
        results[name]["peak_memory_mib"] = round(peak / 2**20, 1)
        if not arguments.compile:
            results[name]["gflop"] = round(flops(lambda step=step: step.loss().backward()) / 1e9, 1)
    peak = matmul_peak(arguments.device, dtype)
    times = seconds_in_turn(steps, arguments.device, arguments.repeats)
    peak = max(peak, matmul_peak(arguments.device, dtype))
    for name, result in results.items():
        median = times[name]
        result |= {"seconds": round(median, 4), "pairs_per_second": round(arguments.batch_size / median, 2)}
        if "gflop" in result:
            result["share_of_matmul_peak"] = round(result["gflop"] * 1e9 / median / peak, 3)
    two, four = results["two_pass"], results["four_pass"]
    is_cpu = arguments.device == "cpu"
    print(
        json.dumps(
            {
                "device": f"{arguments.threads} CPU threads" if is_cpu else torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "batch_size": arguments.batch_size,
                "dtype": arguments.dtype,
                "compiled": arguments.compile,
                "chunk_size": arguments.chunk_size,
                "matmul_peak_gflops": round(peak / 1e9, 1),
                **results,
                "speed_ratio": round(four["seconds"] / two["seconds"], 3),
                "memory_ratio": round(two["peak_memory_mib"] / four["peak_memory_mib"], 3),
                "largest_relative_difference": difference,
            }
        )
    )


if __name__ == "__main__":
    main()
