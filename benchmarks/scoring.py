"""
Measure how long the scores of candidates after an image and a prompt take, compared with separate forwards.

The baselines are transformers' own Blip2ForConditionalGeneration: one forward for each candidate, and one for all of
them, in which image and prompt stand as often as there are candidates.

    python benchmarks/scoring.py                      # a model of medium size, random weights, on a CPU thread
    python benchmarks/scoring.py --candidates 128 --images 8
    python benchmarks/scoring.py --device cuda --dtype bfloat16 --images 32 --candidates 64

All start from pixels. The output is one line of JSON. A ratio above 1 means that this library is faster. If scores
differ in float32, the benchmark ends with an error.
"""

import argparse
import json

import torch
import transformers
from captioning import IMAGE_TOKEN, QUERIES, make_models
from measure import seconds_in_turn


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--images", type=int, default=1, help="images, each with a prompt, at a time")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=12)
    parser.add_argument("--most-tokens", type=int, default=6, help="of a candidate; they have 2 or more")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each that are timed; the median counts")
    return parser.parse_args()


def make_inputs(arguments: argparse.Namespace, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    images, length = arguments.images, arguments.most_tokens
    text = torch.randint(5, 8000, (images, arguments.prompt_tokens))
    labels = torch.randint(5, 8000, (arguments.candidates, length))
    lengths = torch.randint(2, length + 1, (arguments.candidates, 1))
    inputs = {
        "pixel_values": torch.randn(images, 3, 224, 224).to(dtype),
        "input_ids": torch.cat([torch.full((images, QUERIES), IMAGE_TOKEN), text], dim=1),
        "candidate_labels": labels.masked_fill(torch.arange(length) >= lengths, -100),
    }
    return {name: value.to(arguments.device) for name, value in inputs.items()}


@torch.no_grad()
def score_by_forward(model, pixel_values, input_ids, candidate_labels) -> torch.Tensor:
    """Return log-probabilities from one forward, in which each candidate follows its image and its prompt."""
    count = len(candidate_labels)
    ids = candidate_labels.clamp(min=0).repeat(len(input_ids), 1)
    labels = candidate_labels.repeat(len(input_ids), 1)
    text = torch.cat([input_ids.repeat_interleave(count, dim=0), ids], dim=1)
    mask = torch.ones_like(text)
    mask[:, input_ids.shape[1] :] = labels.ne(-100)
    images = pixel_values.repeat_interleave(count, dim=0)
    logits = model(pixel_values=images, input_ids=text, attention_mask=mask).logits[:, -ids.shape[1] - 1 : -1]
    log_probs = logits.float().log_softmax(-1).gather(2, ids[..., None]).squeeze(2)
    return log_probs.masked_fill(labels.eq(-100), 0).sum(dim=1).view(-1, count)


def main():
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    models = make_models(arguments)
    inputs = make_inputs(arguments, getattr(torch, arguments.dtype))
    scores = {}

    def ours():
        scores["ours"] = models["ours"].score_texts(**inputs)

    def one_forward_each():
        rows = [
            score_by_forward(models["theirs"], *pair, own)
            for pair in zip(inputs["pixel_values"].split(1), inputs["input_ids"].split(1), strict=True)
            for own in inputs["candidate_labels"].split(1)
        ]
        scores["one_forward_each"] = torch.cat(rows).view(arguments.images, -1)

    def one_forward_for_all():
        scores["one_forward_for_all"] = score_by_forward(models["theirs"], **inputs)

    runs = {run.__name__: run for run in (ours, one_forward_each, one_forward_for_all)}
    for run in runs.values():
        run()  # to warm up
    times = seconds_in_turn(runs, arguments.device, arguments.repeats)
    difference = max((scores[name] - scores["ours"]).abs().max().item() for name in runs)
    report = {
        "device": f"{arguments.threads} CPU threads" if arguments.device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": arguments.dtype,
        "images": arguments.images,
        "candidates": arguments.candidates,
        "seconds": {name: round(value, 4) for name, value in times.items()},
        "ratio": {name: round(times[name] / times["ours"], 2) for name in runs if name != "ours"},
        "largest_difference": difference,
    }
    print(json.dumps(report))
    if arguments.dtype == "float32" and difference > 1e-3:
        raise SystemExit("The scores differ.")


if __name__ == "__main__":
    main()
