"""
Measure a step of stage 2, AdamW included, compared with transformers' own Blip2ForConditionalGeneration.

    python benchmarks/stage2.py                    # OPT-125M's shape, stored features for both, on a CPU thread
    python benchmarks/stage2.py --tower            # transformers runs a tower of ViT-g's shape; ours has its features
    python benchmarks/stage2.py --language-model opt-2.7b --device cuda --dtype bfloat16 --batch-size 64

Both have the same weights and frozen parts, the same batch, padded to its longest text, the same fused AdamW, and the
language model in eval mode. A BERT-base Q-Former with 32 queries and dropout 0.1 reads features [batch, 257, 1408];
captions have about 12 tokens. The output is one line of JSON. A speed_ratio above 1 and a memory_ratio below 1 mean
that this library is better. Memory is counted in addition to the parameters, their gradients and AdamW's state.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import transformers
from measure import flops, matmul_peak, peak_memory, peak_memory_of_fresh_process, seconds_in_turn
from shapes import LANGUAGE_MODELS, PAPER, Shapes
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from blip2_hf import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig


IMAGE_TOKEN, QUERIES = 50265, 32


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--language-model", choices=LANGUAGE_MODELS, default="opt-125m", help="whose shape")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the frozen parts"
    )
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each kind that are timed; the median counts")
    parser.add_argument("--tower", action="store_true", help="transformers runs the tower at each step")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in both")
    parser.add_argument("--memory-of", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    return parser.parse_args()


class StoredTower(nn.Module):
    """Replaces transformers' tower: returns stored features after the trained LayerNorm."""

    def __init__(self, post_layernorm: nn.LayerNorm):
        super().__init__()
        self.post_layernorm = post_layernorm

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        states = self.post_layernorm(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=states[:, 0])


def make_config(arguments: argparse.Namespace, shapes: Shapes = PAPER) -> Blip2Config:
    sizes = LANGUAGE_MODELS[arguments.language_model]
    # Without dropout because it is frozen
    text_config = transformers.OPTConfig(
        **sizes, vocab_size=50272, word_embed_proj_dim=sizes["hidden_size"], dropout=0.0, attention_dropout=0.0
    )
    return Blip2Config(
        vision_config=Blip2VisionConfig(**shapes.vision, post_layernorm_eps=1e-6),
        qformer_config=Blip2QFormerConfig(**shapes.qformer),
        text_config=text_config,
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
        has_vision_tower=False,
    )


def make_ours(config: Blip2Config, dtype: torch.dtype) -> nn.Module:
    """Make this library's model, with the language model in `dtype`: OPT-2.7B takes 11 GB in float32."""
    model = Blip2ForConditionalGeneration._from_config(config, dtype=dtype)
    for name, part in model.named_children():
        if name != "language_model":
            part.float()
    return model


def make_theirs(config: Blip2Config, with_tower: bool, language_model: nn.Module) -> nn.Module:
    """Make transformers' model around the same language model, which neither of the two changes."""
    config = copy.deepcopy(config)
    config.has_vision_tower = True
    config.vision_config.num_hidden_layers = 39 if with_tower else 0
    config.text_config.num_hidden_layers = 0
    model = transformers.Blip2ForConditionalGeneration(config.to_transformers())
    model.language_model = language_model
    return model


def make_models(arguments: argparse.Namespace, shapes: Shapes = PAPER) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    config = make_config(arguments, shapes)
    with torch.device(arguments.device):
        ours = make_ours(config, getattr(torch, arguments.dtype))
        theirs = make_theirs(config, arguments.tower, ours.language_model)
    weights = {name.replace("query_tokens.weight", "query_tokens"): w for name, w in ours.state_dict().items()}
    assert not theirs.load_state_dict(weights, strict=False).unexpected_keys
    theirs.vision_model.requires_grad_(False)
    theirs.vision_model.post_layernorm.requires_grad_(True)
    if not arguments.tower:
        theirs.vision_model = StoredTower(theirs.vision_model.post_layernorm)
    models = {"ours": ours, "theirs": theirs}
    for model in models.values():
        model.to(arguments.device).train()
        model.language_model.eval()
        if arguments.gradient_checkpointing:
            model.gradient_checkpointing_enable()
    return models


def make_batch(arguments: argparse.Namespace, shapes: Shapes = PAPER) -> dict[str, torch.Tensor]:
    """Make captions of 9 to 15 tokens, 12 on average, with start and end token, behind their images."""
    generator = torch.Generator().manual_seed(0)
    size = arguments.batch_size
    lengths = torch.arange(size) * 6 // max(size - 1, 1) + 9
    text = torch.randint(3, 50265, (size, int(lengths.max())), generator=generator)
    is_text = torch.arange(text.shape[1]) < lengths[:, None]
    queries = torch.full((size, QUERIES), IMAGE_TOKEN)
    labels = torch.cat([torch.full_like(queries, -100), text.masked_fill(~is_text, -100)], dim=1)
    labels[:, QUERIES] = -100
    batch = {
        "input_ids": torch.cat([queries, text.masked_fill(~is_text, 1)], dim=1),
        "attention_mask": torch.cat([torch.ones_like(queries), is_text.long()], dim=1),
        "labels": labels,
    }
    generator = torch.Generator(arguments.device).manual_seed(0)
    images = {"image_embeds": shapes.features, "pixel_values": (3, shapes.image_size, shapes.image_size)}
    return {name: tensor.to(arguments.device) for name, tensor in batch.items()} | {
        name: torch.randn(size, *shape, generator=generator, device=arguments.device) for name, shape in images.items()
    }


class Step:
    """Forward, backward and AdamW of one of the two."""

    def __init__(self, name: str, model: nn.Module, batch: dict[str, torch.Tensor], arguments: argparse.Namespace):
        self.model, self.device, self.dtype = model, arguments.device, getattr(torch, arguments.dtype)
        self.name, self.tower = name, arguments.tower
        self.take(batch)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, betas=(0.9, 0.98), weight_decay=0.05, fused=True)

    def take(self, batch: dict[str, torch.Tensor]):
        """Set what the model reads of a batch."""
        image, other = ("image_embeds", "pixel_values") if self.name == "ours" else ("pixel_values", "image_embeds")
        self.batch = {key: value for key, value in batch.items() if key != other}
        if self.name == "ours":
            self.batch["skip_logits"] = True
        elif not self.tower:
            self.batch[image] = batch["image_embeds"]

    def loss(self) -> torch.Tensor:
        low = self.dtype != torch.float32
        with torch.autocast(self.device.split(":")[0], self.dtype) if low else nullcontext():
            return self.model(**self.batch).loss

    def __call__(self):
        self.optimizer.zero_grad(set_to_none=False)
        self.loss().backward()
        self.optimizer.step()


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Turn dropout off, but stay in training mode because that is what is timed."""
    places = [
        (module, name)
        for module in model.modules()
        for name in ("p" if isinstance(module, nn.Dropout) else "attention_dropout",)
        if isinstance(getattr(module, name, None), float)
    ]
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, 0.0)
    yield
    for (module, name), value in zip(places, before, strict=True):
        setattr(module, name, value)


def gradients(step: Step) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute the loss without dropout, and the gradients by the names that both models have."""
    step.optimizer.zero_grad()
    with without_dropout(step.model):
        loss = step.loss()
        loss.backward()
    named = step.model.named_parameters()
    return loss.detach(), {name.removesuffix(".weight"): p.grad.clone() for name, p in named if p.grad is not None}


def largest_difference(ours: Step, theirs: Step) -> dict[str, float]:
    """Compute the largest relative difference of losses and gradients, and that of theirs if features are rounded."""
    (our_loss, actual), (loss, expected) = gradients(ours), gradients(theirs)
    features = theirs.batch["pixel_values"]
    theirs.batch["pixel_values"] = features * (1 + 2e-7 * torch.randn_like(features))
    _, rounded = gradients(theirs)
    theirs.batch["pixel_values"] = features
    # Without the gradient of a key's bias, which is zero but for rounding
    names = [name for name in expected if not name.endswith("key.bias")]

    def largest(other: dict[str, torch.Tensor]) -> float:
        return float(max((other[name] - expected[name]).norm() / expected[name].norm() for name in names))

    difference = {"loss": float((our_loss - loss).abs() / loss), "gradient": largest(actual)}
    return difference | {"gradient_of_theirs_if_features_are_rounded": largest(rounded)}


def memory_of(step: Step) -> int:
    step()
    return peak_memory(step, step.device)


def main():
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    models, batch = make_models(arguments), make_batch(arguments)
    if arguments.memory_of:
        name = arguments.memory_of
        print(memory_of(Step(name, models.pop(name), batch, arguments)))
        return
    steps = {name: Step(name, model, batch, arguments) for name, model in models.items()}
    # With --tower there is nothing to compare: a random tower's features are not the stored ones
    difference = None if arguments.tower else largest_difference(*steps.values())
    results: dict[str, dict] = {}
    for name, step in steps.items():
        step()
        peak = peak_memory_of_fresh_process(name) if arguments.device == "cpu" else memory_of(step)
        gflop = flops(lambda step=step: step.loss().backward()) / 1e9
        results[name] = {"peak_memory_mib": round(peak / 2**20, 1), "gflop": round(gflop, 1)}
    times = seconds_in_turn(steps, arguments.device, arguments.repeats)
    peak = matmul_peak(arguments.device, getattr(torch, arguments.dtype))
    for name, result in results.items():
        result |= {
            "seconds": round(times[name], 4),
            "share_of_matmul_peak": round(result["gflop"] * 1e9 / times[name] / peak, 3),
        }
    ours, theirs = results["ours"], results["theirs"]
    is_cpu = arguments.device == "cpu"
    report = {
        "device": f"{arguments.threads} CPU threads" if is_cpu else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "language_model": arguments.language_model,
        "tower_runs_in_theirs": arguments.tower,
        "batch_size": arguments.batch_size,
        "dtype": arguments.dtype,
        "gradient_checkpointing": arguments.gradient_checkpointing,
        **results,
        "speed_ratio": round(theirs["seconds"] / ours["seconds"], 3),
        "memory_ratio": round(ours["peak_memory_mib"] / theirs["peak_memory_mib"], 3),
        "largest_relative_difference": difference,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
