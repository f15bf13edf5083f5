"""Parts of benchmarks/gpu.py that measure speed and memory, as ratios in the same run. Each yields rows."""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import captioning
import datasets
import retrieval
import stage1
import stage2
import torch
import transformers
from gpu_correctness import make_pictures, stage1_arguments, stage2_arguments
from gpu_rows import Row, Setting, attempt, free_memory, needs_gpu
from measure import fits, flops, largest, matmul_peak, peak_memory, seconds, seconds_in_turn
from shapes import LANGUAGE_MODELS

from blip2_hf import Blip2Config, Blip2Model, Blip2QFormerConfig, Blip2VisionConfig
from blip2_hf.captioning import caption_dataset
from blip2_hf.data import cache_features
from blip2_hf.jobs.batch_size import BatchSize


def matmul(setting: Setting) -> Iterator[Row]:
    """Measure the peak of the device in matrix products, of which training steps reach a share."""
    yield Row("matrix products, TFLOP/s", _peak(setting) / 1e12, note=str(_peak_dtype(setting)))


def _peak_dtype(setting: Setting) -> torch.dtype:
    # Many CPUs are very slow in bfloat16
    return torch.bfloat16 if setting.is_cuda else torch.float32


@cache
def _peak(setting: Setting) -> float:
    return matmul_peak(setting.device, _peak_dtype(setting))


def faster(name: str, times: dict[str, float], count: int = 1, note: str = "") -> Row:
    """Compare what is computed a second, or the milliseconds of one step if `count` is not given."""
    here, baseline = times.values()
    if count == 1:
        return Row(f"{name}: milliseconds", 1000 * here, 1000 * baseline, baseline / here, note=note)
    return Row(f"{name} a second", count / here, count / baseline, baseline / here, note=note)


def less_memory(name: str, setting: Setting, steps: dict[str, Callable], memory_of: Callable[[Any], int]) -> Row:
    """Compare what steps need in addition to parameters, gradients and the optimizer's state."""
    if not setting.is_cuda:
        return needs_gpu(f"{name}: MiB")
    here, baseline = (memory_of(step) / 2**20 for step in steps.values())
    return Row(f"{name}: MiB", here, baseline, here / baseline)


def share_of_peak(name: str, setting: Setting, step: Callable, time: float) -> Row:
    return Row(f"{name}: share of the peak", flops(lambda: step.loss().backward()) / time / _peak(setting))


def warm_up(setting: Setting, *runs: Callable):
    for run in runs * setting.size(2, 1):
        run()


def stage1_steps(setting: Setting) -> Iterator[Row]:
    """Measure a step of stage 1 from stored features: two passes, eager and compiled, and the authors' four."""
    batch_size = BatchSize(setting.size(256, 4))
    yield from batch_size.fit(lambda size: list(_eager_stage1(setting, size)))
    yield from attempt("stage 1, compiled", lambda: _compiled_stage1(setting, batch_size.size))


def _make_stage1(setting: Setting, size: int) -> dict[str, stage1.Step]:
    model = stage1.make_model(setting.device, shapes=setting.shapes)
    batch = stage1.make_batch(size, setting.device, torch.bfloat16, setting.shapes)
    arguments = stage1_arguments(setting, "bfloat16")
    return {name: stage1.Step(model, batch, arguments, naive=name == "four") for name in ("two", "four")}


def _eager_stage1(setting: Setting, size: int) -> Iterator[Row]:
    steps, name = _make_stage1(setting, size), f"stage 1, {size} pairs"
    warm_up(setting, *steps.values())
    times = seconds_in_turn(steps, setting.device, setting.size(5, 1))
    yield faster(f"{name}, two passes and four: pairs", times, size)
    for passes, step in steps.items():
        yield share_of_peak(f"{name}, {passes} passes", setting, step, times[passes])
    yield less_memory(f"{name}, two passes and four", setting, steps, stage1.peak_memory_of)


def _compiled_stage1(setting: Setting, size: int) -> Iterator[Row]:
    steps = _make_stage1(setting, size)
    steps["two"].forward = torch.compile(steps["two"].model, dynamic=False, backend=setting.compiler)
    warm_up(setting, *steps.values())
    times = seconds_in_turn(steps, setting.device, setting.size(5, 1))
    yield faster(f"stage 1, {size} pairs, two passes compiled, and four: pairs", times, size, note=setting.compiler)


def stage2_steps(setting: Setting) -> Iterator[Row]:
    """Measure a step of stage 2 with OPT-2.7B's shape, from stored features, against transformers' class."""
    arguments = stage2_arguments(setting, "bfloat16", setting.size(64, 4), "opt-2.7b")
    models, batch = stage2.make_models(arguments, setting.shapes), stage2.make_batch(arguments, setting.shapes)
    steps = {name: stage2.Step(name, model, batch, arguments) for name, model in models.items()}
    warm_up(setting, *steps.values())
    name = f"stage 2, {arguments.language_model}, {arguments.batch_size} texts"
    times = seconds_in_turn(steps, setting.device, setting.size(7, 1))
    yield faster(name, times)
    yield share_of_peak(name, setting, steps["ours"], times["ours"])
    yield less_memory(name, setting, steps, stage2.memory_of)
    label = f"stage 2, {arguments.language_model}: largest batch"
    if not setting.is_cuda:
        yield needs_gpu(label)
        return
    here, baseline = (_largest_batch(setting, step, arguments) for step in steps.values())
    yield Row(label, here, baseline, here / max(baseline, 1), note="above 1 if larger here; both models are in memory")


def _largest_batch(setting: Setting, step: stage2.Step, arguments: argparse.Namespace) -> int:
    def run(size: int):
        own = argparse.Namespace(**vars(arguments) | {"batch_size": size})
        step.take(stage2.make_batch(own, setting.shapes))
        step()

    found = largest(lambda size: fits(lambda: run(size)), arguments.batch_size)
    # The other model needs the memory
    run(arguments.batch_size)
    free_memory()
    return found


def caption_sizes(setting: Setting) -> tuple[Blip2Config, int]:
    """Return a configuration with ViT-g and OPT-2.7B's shape, and the number of words."""
    words = setting.size(50271, captioning.WORDS)
    sizes = LANGUAGE_MODELS["tiny" if setting.is_small else "opt-2.7b"]
    text = {"word_embed_proj_dim": sizes["hidden_size"], "vocab_size": words + 1}
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**setting.shapes.vision),
        qformer_config=Blip2QFormerConfig(**setting.shapes.qformer),
        text_config=transformers.OPTConfig(**sizes, **text, **special),
        num_query_tokens=captioning.QUERIES,
        image_token_index=words,
    )
    return config, words


def captions(setting: Setting) -> Iterator[Row]:
    """Measure captioning of JPEG files, against transformers' pipeline for images and text."""
    config, words = caption_sizes(setting)
    arguments = argparse.Namespace(device=setting.device, dtype="bfloat16")
    models = captioning.make_models(arguments, config)
    tools = captioning.make_processors(words, setting.shapes.image_size)
    count, batch_size = setting.size(512, 4), setting.size(64, 2)
    with tempfile.TemporaryDirectory() as folder:
        folders = {number: Path(folder, str(number)) for number in (batch_size, count)}
        for number, each in folders.items():
            each.mkdir()
            captioning.write_pictures(each, number, (640, 480))
        runs = _Captioning(models, tools, setting, batch_size, Path(folder, "captions.jsonl"))
        few, all_files = folders[batch_size], folders[count]
        for way, options in {"greedy": {}, "beam 5": {"num_beams": 5}}.items():
            runs.ours(few, **options)
            runs.theirs(few, **options)
            both = {
                "ours": partial(runs.ours, all_files, **options),
                "theirs": partial(runs.theirs, all_files, **options),
            }
            times = seconds_in_turn(both, setting.device, 1)
            yield faster(f"captions, {way}: pictures", times, count, note=runs.compare())
        # On a GPU, generate compiles by itself what reads a static cache
        static = {"cache_implementation": "static"}

        def compare() -> Iterator[Row]:
            for _ in range(2):
                runs.ours(few, **static)
            both = {"static": partial(runs.ours, all_files, **static), "dynamic": partial(runs.ours, all_files)}
            name = "captions, greedy, static cache and dynamic: pictures"
            yield faster(name, seconds_in_turn(both, setting.device, 1), count, note="compiled on a GPU")

        yield from attempt("captions, greedy, static cache", compare)


class _Captioning:
    """Captions the files of a folder in both ways, with the same number of new tokens."""

    def __init__(self, models: dict, tools: dict, setting: Setting, batch_size: int, output: Path):
        self.models, self.tools, self.output = models, tools, output
        self.length = {"min_new_tokens": 12, "max_new_tokens": 12, "do_sample": False}
        self.common = {"batch_size": batch_size, "num_workers": setting.size(8, 0)}
        self.pipe = transformers.pipeline(
            "image-text-to-text", model=models["theirs"], processor=tools["theirs"], device=setting.device
        )
        self.captions: dict[str, list[str]] = {}

    def ours(self, folder: Path, **options):
        options = self.length | self.common | options
        caption_dataset(
            self.models["ours"],
            self.tools["ours"],
            folder,
            self.output,
            prompt=captioning.PROMPT,
            overwrite=True,
            **options,
        )
        self.captions["ours"] = [json.loads(line)["caption"] for line in self.output.read_text().splitlines()]

    def theirs(self, folder: Path, **options):
        rows = captioning.Rows(sorted(folder.iterdir()))
        options = self.length | options
        found = self.pipe(rows, return_full_text=False, generate_kwargs=options, **self.common)
        self.captions["theirs"] = [each[0]["generated_text"].strip() for each in found]

    def compare(self) -> str:
        pairs = list(zip(self.captions["ours"], self.captions["theirs"], strict=True))
        distinct = len(set(self.captions["ours"]))
        return f"{sum(a == b for a, b in pairs)} of {len(pairs)} captions equal, {distinct} distinct"


def reranking(setting: Setting) -> Iterator[Row]:
    """Measure matching of images with texts, from stored features, against transformers' class."""
    k = setting.size(128, 4)
    arguments = argparse.Namespace(
        device=setting.device, dtype="bfloat16", k=k, images=setting.size(8, 2), tower=False, baseline_batch_size=k
    )
    ours, theirs = retrieval.make_models(arguments, setting.shapes)
    generator = torch.Generator(setting.device).manual_seed(1)
    pictures = torch.randn(
        arguments.images, *setting.shapes.features, generator=generator, device=setting.device, dtype=torch.bfloat16
    )
    texts = retrieval.make_texts(k)
    runs = {
        "ours": retrieval.Ours(ours, pictures, texts, arguments),
        "theirs": retrieval.Theirs(theirs, pictures, texts, arguments),
    }
    difference = (runs["ours"]() - runs["theirs"]()).abs().max()
    warm_up(setting, *runs.values())
    times = seconds_in_turn(runs, setting.device, setting.size(7, 1))
    note = f"scores differ by {float(difference):.1e} at most"
    yield faster(f"re-ranking, {k} texts for an image: pairs", times, arguments.images * k, note=note)


@torch.inference_mode()
def feature_cache(setting: Setting) -> Iterator[Row]:
    """Measure how fast features of JPEG files are stored, compared with the tower alone on ready tensors."""
    count, batch_size = setting.size(1024, 4), setting.size(128, 2)
    torch.manual_seed(0)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**setting.shapes.vision),
        qformer_config=Blip2QFormerConfig(**setting.shapes.qformer),
    )
    with torch.device(setting.device):
        model = Blip2Model._from_config(config, dtype=torch.bfloat16).eval()
    pixel_values = make_pictures(setting, batch_size).to(torch.bfloat16)
    processor = captioning.make_processors(image_size=setting.shapes.image_size)["ours"]
    with tempfile.TemporaryDirectory() as folder:
        paths = captioning.write_pictures(Path(folder), count, (640, 480))
        rows = datasets.Dataset.from_dict({"image": [str(path) for path in paths]})

        def store(number: int):
            cache_features(
                rows.select(range(number)),
                model,
                processor,
                Path(folder, f"features-{number}"),
                batch_size=batch_size,
                num_workers=setting.size(12, 0),
            )

        def tower():
            for _ in range(count // batch_size):
                model.get_image_embeds(pixel_values)

        store(batch_size)
        tower()
        times = {"store": seconds(lambda: store(count), setting.device), "tower": seconds(tower, setting.device)}
    yield faster("stored features of files, and the tower alone: pictures", times, count)


def large_batch(setting: Setting) -> Iterator[Row]:
    """Measure stage 1 on a large contrastive batch by gradient caching, compared with a batch that fits in memory."""
    size, chunk = setting.size(16384, 8), setting.size(256, 4)
    times, memory = {}, {}
    for name, pairs, chunk_size in (("cached", size, chunk), ("plain", chunk, None)):
        model = stage1.make_model(setting.device, chunk_size, setting.shapes)
        batch = stage1.make_batch(pairs, setting.device, torch.bfloat16, setting.shapes)
        step = stage1.Step(model, batch, stage1_arguments(setting, "bfloat16"), naive=False)
        step.batch = {key: value[:chunk] for key, value in batch.items()}
        warm_up(setting, step)
        step.batch = batch

        def run(name=name, step=step):
            times[name] = seconds(lambda: step(set_to_none=False), setting.device)

        # One step for both, because a large one takes long
        memory[name] = peak_memory(run, setting.device)
        del model, batch, step, run
        free_memory()
    name = f"stage 1, {size:,} pairs in chunks of {chunk}, and {chunk} alone"
    rates = [size / times["cached"], chunk / times["plain"]]
    yield Row(f"{name}: pairs a second", *rates, rates[0] / rates[1])
    if not setting.is_cuda:
        yield needs_gpu(f"{name}: MiB")
        return
    here, baseline = memory["cached"] / 2**20, memory["plain"] / 2**20
    yield Row(f"{name}: MiB", here, baseline, here / baseline)
