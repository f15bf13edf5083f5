"""Parts of benchmarks/gpu.py that check what this library computes on a device. Each yields rows."""

import argparse
import logging
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import captioning
import stage1
import stage2
import torch
import transformers
from gpu_rows import Row, Setting, attempt, check, needs_gpu
from shapes import LANGUAGE_MODELS
from torch import nn
from torch.utils.data import DataLoader

from blip2_hf import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig
from blip2_hf.data import ImageTextCollator
from blip2_hf.models._compat import CACHE_NAME


ROOT = Path(__file__).parents[1]


def stage1_arguments(setting: Setting, dtype: str = "float32", compiled: bool = False) -> argparse.Namespace:
    return argparse.Namespace(device=setting.device, dtype=dtype, compile=compiled)


def stage2_arguments(setting: Setting, dtype: str, batch_size: int, language_model: str) -> argparse.Namespace:
    return argparse.Namespace(
        device=setting.device,
        dtype=dtype,
        batch_size=batch_size,
        language_model="tiny" if setting.is_small else language_model,
        tower=False,
        gradient_checkpointing=False,
    )


def make_captioner(setting: Setting, layers: int = 2, **kwargs) -> Blip2ForConditionalGeneration:
    """Make a model whose parts have the width of ViT-g, BERT-base and OPT-125M, and few layers."""
    torch.manual_seed(0)
    sizes = LANGUAGE_MODELS["tiny" if setting.is_small else "opt-125m"] | {"num_hidden_layers": layers}
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**setting.shapes.vision | {"num_hidden_layers": layers}),
        qformer_config=Blip2QFormerConfig(**setting.shapes.qformer | {"num_hidden_layers": layers}),
        text_config=transformers.OPTConfig(
            **sizes, word_embed_proj_dim=sizes["hidden_size"], dropout=0.0, attention_dropout=0.0
        ),
        num_query_tokens=stage2.QUERIES,
        image_token_index=stage2.IMAGE_TOKEN,
    )
    with torch.device(setting.device):
        return Blip2ForConditionalGeneration._from_config(config, **kwargs).eval()


def make_pictures(setting: Setting, count: int) -> torch.Tensor:
    size = setting.shapes.image_size
    generator = torch.Generator(setting.device).manual_seed(0)
    return torch.randn(count, 3, size, size, generator=generator, device=setting.device)


def make_prompts(setting: Setting, count: int) -> dict[str, torch.Tensor]:
    """Make pictures with prompts of four tokens, all of one length."""
    placeholders = torch.full((count, stage2.QUERIES), stage2.IMAGE_TOKEN)
    text = torch.arange(count * 4).view(count, 4) % 1000 + 5
    ids = torch.cat([placeholders, text], dim=1).to(setting.device)
    return {"pixel_values": make_pictures(setting, count), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def make_training_inputs(setting: Setting, count: int, pixels: bool) -> dict[str, torch.Tensor]:
    """Make texts behind their pictures, or behind stored features."""
    batch = stage2.make_batch(stage2_arguments(setting, "float32", count, "opt-125m"), setting.shapes)
    del batch["image_embeds" if pixels else "pixel_values"]
    return batch


def learn(model: nn.Module, inputs: dict, forward: Callable | None = None) -> dict[str, torch.Tensor]:
    """Return the loss and the gradients, with the first negatives; dropout is off in eval mode."""
    model.zero_grad()
    with stage1.first_negatives():
        loss = (model if forward is None else forward)(**inputs).loss
        loss.backward()
    # Without the gradient of a key's bias, which is zero but for rounding
    return {"loss": loss.detach()} | {
        name: parameter.grad.float().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not name.endswith("key.bias")
    }


def largest_difference(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Compute the largest relative difference, by norm, of the loss and of all gradients as one vector."""
    assert actual.keys() == expected.keys()

    def flat(found: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([tensor.flatten() for name, tensor in found.items() if name != "loss"])

    pairs = [(actual["loss"], expected["loss"]), (flat(actual), flat(expected))]
    return max(float((found - wanted).norm() / wanted.norm()) for found, wanted in pairs)


def tests(setting: Setting) -> Iterator[Row]:
    """Run the tests that are marked `gpu`; without one, some of the same tests on a pretended device."""
    chosen = ["-m", "gpu"] if setting.is_cuda else ["-k", "pretend and retrieval"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, "tests/models/test_devices.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    printed = run.stdout.strip() or run.stderr.strip()
    summary = printed.splitlines()[-1] if printed else ""
    passed = run.returncode == 0 and bool(re.search(r"\d+ passed", summary))
    where = "a GPU" if setting.is_cuda else "a pretended device"
    yield Row(f"tests on {where}", summary, passed=passed, traceback=None if passed else printed)


def attention(setting: Setting) -> Iterator[Row]:
    """Compare a training step of stage 1 from pixels, in bfloat16, with an eager one in float32."""
    model = stage1.make_model(setting.device, shapes=setting.shapes, with_tower=True).eval()
    inputs = stage1.make_batch(setting.size(16, 4), setting.device, torch.float32, setting.shapes)
    inputs["pixel_values"] = make_pictures(setting, len(inputs.pop("image_embeds")))
    model.set_attn_implementation("eager")
    expected = learn(model, inputs)

    def difference(name: str, low: bool = True) -> float:
        model.set_attn_implementation(name)
        with torch.autocast(setting.device.split(":")[0], torch.bfloat16, enabled=low):
            return largest_difference(learn(model, inputs), expected)

    rounding = difference("eager")
    yield Row("attention: eager in bfloat16", rounding, note="the difference from eager in float32")

    def compare(name: str, label: str, at_most: float, low: bool = True) -> Iterator[Row]:
        yield check(label, difference(name, low), at_most)

    label = "attention: sdpa in float32"
    yield from attempt(label, partial(compare, "sdpa", label, 1e-3, low=False))
    # Flex attention last, because it is compiled
    for name in ("sdpa", "flash_attention_2", "flex_attention"):
        label = f"attention: {name} in bfloat16"
        if name != "sdpa" and not setting.is_cuda:
            yield needs_gpu(label)
        elif name == "flash_attention_2" and find_spec("flash_attn") is None:
            yield Row(label, note="flash_attn is not installed")
        else:
            yield from attempt(label, partial(compare, name, label, 2 * rounding))


def precision(setting: Setting) -> Iterator[Row]:
    """Train both stages for some steps, and write, in half precision."""
    for dtype in ("bfloat16", "float16"):
        for stage in (1, 2):
            name = f"{dtype}: stage {stage}, five steps with AdamW"
            yield from attempt(name, partial(_train_in_half, setting, name, stage, dtype))
        name = f"{dtype}: writing"
        yield from attempt(name, partial(_write_in_half, setting, name, dtype))


def _train_in_half(setting: Setting, name: str, stage: int, dtype: str) -> Iterator[Row]:
    if stage == 1:
        model = stage1.make_model(setting.device, shapes=setting.shapes)
        batch = stage1.make_batch(setting.size(64, 4), setting.device, getattr(torch, dtype), setting.shapes)
        step = stage1.Step(model, batch, stage1_arguments(setting, dtype), naive=False)
    else:
        arguments = stage2_arguments(setting, dtype, setting.size(16, 4), "opt-125m")
        model = stage2.make_models(arguments, setting.shapes)["ours"]
        step = stage2.Step("ours", model, stage2.make_batch(arguments, setting.shapes), arguments)
    scaler = torch.amp.GradScaler(setting.device.split(":")[0], enabled=dtype == "float16")
    before = model.query_tokens.weight.detach().clone()
    losses = []
    for _ in range(5):
        step.optimizer.zero_grad()
        loss = step.loss()
        scaler.scale(loss).backward()
        scaler.step(step.optimizer)
        scaler.update()
        losses.append(loss.detach())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    is_finite = all(bool(tensor.isfinite().all()) for tensor in losses + trained)
    has_moved = not torch.equal(model.query_tokens.weight, before)
    note = "loss and weights finite, weights changed"
    yield Row(name, float(losses[-1]), passed=is_finite and has_moved, note=note)


@torch.no_grad()
def _write_in_half(setting: Setting, name: str, dtype: str) -> Iterator[Row]:
    model = make_captioner(setting).to(getattr(torch, dtype))
    inputs = make_prompts(setting, 4)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    is_finite = bool(model(**inputs).logits.isfinite().all())
    new = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4).shape[1] - inputs["input_ids"].shape[1]
    yield Row(name, f"{new} tokens", passed=is_finite and new == 4, note="scores finite")


def waiting(setting: Setting) -> Iterator[Row]:
    """Tell whether a training step or a step of writing waits for the device while that has work."""
    # Of tests/helpers, which stage1.py has put behind this folder
    from device_reads import DeviceReads
    from pretend_device import NAME, pretend_device

    def count(label: str, make: Callable) -> Iterator[Row]:
        model, step, inputs = make()
        with nullcontext() if setting.is_cuda else pretend_device():
            if not setting.is_cuda:
                model, inputs = model.to(NAME), {name: _move(value, NAME) for name, value in inputs.items()}
            # The first step allocates memory
            step(model, inputs)
            with DeviceReads() as record:
                step(model, inputs)
        places = [f"{read.operation} in {read.place}" for read in record.late()]
        note = ", ".join(f"{places.count(place)} x {place}" for place in dict.fromkeys(places))
        early = len(record.reads) - len(places)
        yield Row(
            label, len(places), passed=not places, note=note or f"{early} reads at the beginning or by transformers"
        )

    for name, make in _steps(setting).items():
        label = f"does not wait for {'the' if setting.is_cuda else 'a pretended'} device: {name}"
        yield from attempt(label, partial(count, label, make))


def _move(value: Any, device: str) -> Any:
    """Move a tensor, or what a cache holds of a prompt."""
    if isinstance(value, transformers.Cache):
        for layer in value.layers:
            layer.keys, layer.values, layer.device = layer.keys.to(device), layer.values.to(device), device
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _steps(setting: Setting) -> dict[str, Callable[[], tuple[nn.Module, Callable, dict]]]:
    """Return functions that make a model, a step of it, and the step's inputs."""

    def train(model, inputs):
        model(**inputs).loss.backward()

    @torch.no_grad()
    def write(model, inputs):
        """Compute one token more, after a prompt that is in the cache."""
        model(**inputs)

    def pairs(pixels: bool):
        model = stage1.make_model(setting.device, shapes=setting.shapes, with_tower=pixels)
        inputs = stage1.make_batch(4, setting.device, torch.float32, setting.shapes)
        if pixels:
            inputs["pixel_values"] = make_pictures(setting, len(inputs.pop("image_embeds")))
        return model, train, inputs

    def texts(pixels: bool):
        inputs = make_training_inputs(setting, 4, pixels) | {"skip_logits": True}
        return make_captioner(setting).train(), train, inputs

    def prompts():
        model, inputs = make_captioner(setting), make_prompts(setting, 4)
        with torch.no_grad():
            outputs = model(**inputs, use_cache=True)
        return model, write, {"input_ids": inputs["input_ids"][:, -1:], CACHE_NAME: outputs[CACHE_NAME]}

    return {
        "stage 1, stored features": lambda: pairs(False),
        "stage 1, pixels": lambda: pairs(True),
        "stage 2, stored features": lambda: texts(False),
        "stage 2, pixels": lambda: texts(True),
        "a token after a prompt": prompts,
    }


def compiling(setting: Setting) -> Iterator[Row]:
    """Compare compiled steps with eager ones, and tell whether more batches of equal shapes are compiled again."""
    yield from attempt("compiled forward", partial(_compile_forward, setting))
    for stage in (1, 2):
        name = f"compiled training step, stage {stage}"
        yield from attempt(name, partial(_compile_training, setting, name, stage))
    yield from attempt("compiled writing, static cache", partial(_compile_writing, setting))


def _without_recompiling(name: str, call: Callable, batches: list[dict]) -> Iterator[Row]:
    """Yield whether more batches of the same shapes are computed with what has been compiled."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in batches:
            call(**batch)
    yield Row(f"{name}: nothing is compiled again", len(batches), passed=True, note="batches of equal shapes")


@torch.no_grad()
def _compile_forward(setting: Setting) -> Iterator[Row]:
    name, model, inputs = "compiled forward", make_captioner(setting), make_prompts(setting, 4)
    expected = model(**inputs).logits
    compiled = torch.compile(model, backend=setting.compiler)
    actual = compiled(**inputs).logits
    yield check(name, float((actual - expected).norm() / expected.norm()), 1e-3, setting.compiler)
    others = [inputs | {"pixel_values": torch.randn_like(inputs["pixel_values"])} for _ in range(2)]
    again = f"{name}: nothing is compiled again"
    yield from attempt(again, partial(_without_recompiling, name, compiled, others))


def _compile_training(setting: Setting, name: str, stage: int) -> Iterator[Row]:
    if stage == 1:
        model = stage1.make_model(setting.device, shapes=setting.shapes).eval()
        del model.qformer.encoder.layer[2:]
        inputs = stage1.make_batch(8, setting.device, torch.float32, setting.shapes)
    else:
        model, inputs = make_captioner(setting), make_training_inputs(setting, 8, pixels=True)
    expected = learn(model, inputs)
    compiled = torch.compile(model, backend=setting.compiler)
    yield check(name, largest_difference(learn(model, inputs, compiled), expected), 1e-3, setting.compiler)
    # Texts of other lengths, in batches of the same shape
    masks = [inputs["attention_mask"].clone() for _ in range(3)]
    for row, mask in enumerate(masks):
        mask[row, -2:] = 0
        mask[-1] = 1
    batches = [inputs | {"attention_mask": mask} for mask in masks]

    def train(**batch):
        learn(model, batch, compiled)

    again = f"{name}: nothing is compiled again"
    # The first batch with another number of labels is compiled for all numbers
    train(**inputs | {"attention_mask": torch.ones_like(masks[0])})
    yield from attempt(again, partial(_without_recompiling, name, train, batches))


@torch.no_grad()
def _compile_writing(setting: Setting) -> Iterator[Row]:
    model, inputs = make_captioner(setting), make_prompts(setting, 4)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(**inputs, **options)
    compiled = transformers.CompileConfig(backend=setting.compiler, fullgraph=True)
    if not setting.is_cuda:
        compiled.mode = None
        compiled._compile_all_devices = True
    options |= {"cache_implementation": "static", "compile_config": compiled}
    actual = model.generate(**inputs, **options)
    equal = int((actual == expected).all(dim=1).sum())
    name = "compiled writing, static cache"
    yield Row(name, f"{equal} of {len(actual)} equal", passed=equal == len(actual), note=setting.compiler)


def quantized(setting: Setting) -> Iterator[Row]:
    """Compare scores and a gradient of a language model in 8 and in 4 bits with those of the model itself."""
    if find_spec("bitsandbytes") is None:
        yield Row("8 and 4 bits", note="bitsandbytes is not installed")
        return
    # It tells of each product that it rounds to float16
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        make_captioner(setting).save_pretrained(folder)
        for bits, least in ((8, 0.99), (4, 0.9)):
            name = f"language model in {bits} bits: cosine of the scores"
            if bits == 4 and not setting.is_cuda:
                yield needs_gpu(name)
            else:
                yield from attempt(name, partial(_quantize, setting, name, folder, bits, least))


def _quantize(setting: Setting, name: str, folder: str, bits: int, least: float) -> Iterator[Row]:
    config = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_compute_dtype=torch.bfloat16)
    options = {"dtype": torch.bfloat16, "device_map": {"": setting.number if setting.is_cuda else "cpu"}}
    plain = Blip2ForConditionalGeneration.from_pretrained(folder, **options).eval()
    model = Blip2ForConditionalGeneration.from_pretrained(folder, **options, quantization_config=config).eval()
    kinds = {type(module).__name__ for module in model.language_model.modules()}
    assert kinds & {"Linear8bitLt", "Linear4bit"}, kinds
    inputs = make_training_inputs(setting, 4, pixels=True)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    outputs = model(**inputs)
    outputs.loss.backward()
    gradient = model.query_tokens.weight.grad
    is_finite = bool(gradient.isfinite().all()) and bool(gradient.any())
    with torch.no_grad():
        expected = plain(**inputs).logits
        model.generate(**{key: value for key, value in inputs.items() if key != "labels"}, max_new_tokens=2)
    cosine = torch.cosine_similarity(outputs.logits.float().flatten(), expected.float().flatten(), dim=0).item()
    note = f"at least {least}; the gradient of the queries is finite"
    yield Row(name, cosine, passed=cosine >= least and is_finite, note=note)


@torch.no_grad()
def offloading(setting: Setting) -> Iterator[Row]:
    """Compare tokens with those of a model whose language model, and whose tower, is kept elsewhere."""
    device, elsewhere = (setting.number, "cpu") if setting.is_cuda else ("cpu", "disk")
    inputs = make_prompts(setting, 4)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with tempfile.TemporaryDirectory() as folder:
        model = make_captioner(setting)
        expected = model.generate(**inputs, **options)
        model.save_pretrained(folder)
        parts = [name for name, _ in model.named_children()]
        del model

        def compare(name: str, device_map: str | dict[str, str | int]) -> Iterator[Row]:
            offload = Path(folder, "offload")
            loaded = Blip2ForConditionalGeneration.from_pretrained(
                folder, device_map=device_map, dtype=torch.float32, offload_folder=offload
            ).eval()
            actual = loaded.generate(**inputs, **options)
            equal = int((actual == expected).all(dim=1).sum())
            note = f"computes on {loaded.device}; {_count_offloaded(loaded)} weights elsewhere"
            yield Row(name, f"{equal} of {len(actual)} equal", passed=equal == len(actual), note=note)

        maps: dict[str, str | dict[str, str | int]] = {
            f"offloading: {part} on the {elsewhere}": {name: elsewhere if name == part else device for name in parts}
            for part in ("language_model", "vision_model")
        }
        for name, device_map in (maps | {'device_map="auto"': "auto"}).items():
            yield from attempt(name, partial(compare, name, device_map))


def _count_offloaded(model: nn.Module) -> int:
    return sum(parameter.is_meta for parameter in model.parameters())


def pinned(setting: Setting) -> Iterator[Row]:
    """Compare the loss of batches in pinned memory, which are copied without waiting, with that of other batches."""
    model = stage1.make_model(setting.device, shapes=setting.shapes).eval()
    features = torch.randn(16, *setting.shapes.features)
    texts = [" ".join(f"word{20 * i + k}" for k in range(5 + i % 4)) for i in range(len(features))]
    rows = [
        {"image_embeds": x, "text": text, "image_id": i}
        for i, (x, text) in enumerate(zip(features, texts, strict=True))
    ]
    collate = ImageTextCollator(captioning.make_processors()["ours"])
    name = "batches in pinned memory"
    losses = []
    for pin in (False, True):
        if pin and not setting.is_cuda:
            yield needs_gpu(name)
            return
        for batch in DataLoader(rows, batch_size=8, collate_fn=collate, num_workers=2, pin_memory=pin):
            assert all(tensor.is_pinned() == pin for tensor in batch.values())
            batch = {key: tensor.to(setting.device, non_blocking=True) for key, tensor in batch.items()}
            with torch.no_grad(), stage1.first_negatives():
                losses.append(float(model(**batch).loss))
    yield check(name, max(abs(a - b) for a, b in zip(losses[:2], losses[2:], strict=True)), 1e-5)
