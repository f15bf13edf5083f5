"""
Measure how time, memory and disk space grow with the size of a collection: search, `caption` and `evaluate`.

    python benchmarks/growth.py                                       # 10 and 100 thousand pictures and rows
    python benchmarks/growth.py --parts search --pictures 1000000 --query-tokens 4
    python benchmarks/growth.py --parts caption evaluate --rows 1000000

Search: features are drawn, and added to an index by the library's own store. A picture is one of 1,000 topics and
noise, and each of its queries is the picture and noise. A text is such a picture, noise, and an offset that all texts
share, as in models. Texts are not encoded. Then 1,000 picture files are added by a tiny model.

Rows: a stub writes the same caption of every picture at once. Pictures are JPEG files of 64 x 48 pixels, in a folder
(`caption`), or in rows with five references of ten words (`evaluate`). The run is stopped after 90% of the rows, and
goes on.

Times are seconds of CPU of this process, on one thread, which other jobs disturb less. Memory is that of this process,
without mapped files. The output is a table in Markdown for each part.
"""

import argparse
import contextlib
import io
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from captioning import make_tokenizer, write_pictures
from measure import PeakOfOwnMemory, own_memory

from blip2_hf import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, Blip2Processor
from blip2_hf.captioning import caption_dataset
from blip2_hf.evaluation import evaluate_captioning, read_caption_rows
from blip2_hf.jobs.batch_size import BatchSize
from blip2_hf.search import SearchIndex, find_pictures
from blip2_hf.search.update import Updater


DIM, TOPICS = 256, 1000
ROWS_PER_SHARD = 500  # as in `blip2-hf index`
MARKS = (0.1, 0.5, 0.9)  # shares of the rows after which memory is read; after the last, the run is stopped
LINKS = 50_000  # names of one file; file systems allow 65,000
TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 1}


def make_model(model_class: type, query_tokens: int) -> Any:
    torch.manual_seed(0)
    writes = model_class is Blip2ForConditionalGeneration
    width = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 1}
    return model_class(
        Blip2Config(
            vision_config={**TINY, "image_size": 28, "patch_size": 14},
            qformer_config={**TINY, "use_qformer_text_input": not writes},
            text_config=transformers.OPTConfig(**width, num_attention_heads=4) if writes else None,
            num_query_tokens=query_tokens,
            image_text_hidden_size=DIM,
        )
    ).eval()


def make_processor() -> Blip2Processor:
    image_processor = transformers.models.blip.image_processing_pil_blip.BlipImageProcessorPil(
        size={"height": 28, "width": 28}
    )
    return Blip2Processor(image_processor, make_tokenizer(), num_query_tokens=1, is_encoder_decoder=False)


def link_pictures(folder: Path, count: int):
    """Make a folder of small pictures, which are names of a few files."""
    for start in range(0, count, LINKS):
        inner = folder / f"{start // LINKS:04d}"
        inner.mkdir(parents=True)
        (first,) = write_pictures(inner, 1, (64, 48))
        for number in range(1, min(LINKS, count - start)):
            os.link(first, inner / f"{number:06d}.jpg")


def cpu_seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


class Features:
    """Draws features of pictures and of texts."""

    def __init__(self, query_tokens: int):
        self.query_tokens = query_tokens
        self.generator = torch.Generator().manual_seed(0)
        self.topics, self.offset = self._noise(TOPICS, DIM), 2 * self._noise(DIM)

    def _noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _means(self, count: int) -> torch.Tensor:
        topics = torch.randint(TOPICS, (count,), generator=self.generator)
        return self.topics[topics] + 0.7 * self._noise(count, DIM)

    def pictures(self, count: int) -> np.ndarray:
        queries = self._means(count)[:, None] + 0.5 * self._noise(count, self.query_tokens, DIM)
        return torch.nn.functional.normalize(queries, dim=-1).half().numpy()

    def texts(self, count: int) -> torch.Tensor:
        texts = self._means(count) + self.offset + self._noise(count, DIM)
        return torch.nn.functional.normalize(texts, dim=-1)


def fill(index: SearchIndex, features: Features, count: int) -> float:
    """Add pictures that are drawn, and return the seconds that the store takes."""
    total = 0.0
    for start in range(0, count, ROWS_PER_SHARD):
        names = [f"drawn/{number:08d}.jpg" for number in range(start, min(start + ROWS_PER_SHARD, count))]
        arrays = {"features": features.pictures(len(names))}
        total += cpu_seconds(partial(index._store.add, names, [[50_000, 0]] * len(names), [arrays]))
    return total


def ask(index: SearchIndex, texts: torch.Tensor, exact: bool) -> tuple[list[set[tuple]], float, float]:
    """Return the ten best pictures of each text, the median of the seconds, and the memory."""
    found: list[set[tuple]] = []

    def compare(text: torch.Tensor):
        found.append(set(map(tuple, index._compare(text, 10, exact)[0].tolist())))

    compare(texts[:1])  # to warm up
    with PeakOfOwnMemory() as memory:
        times = [cpu_seconds(partial(compare, text)) for text in texts.split(1)]
    return found[1:], float(np.median(times)), memory.mebibytes


def measure_search(count: int, folder: Path, arguments: argparse.Namespace) -> dict[str, str]:
    model, processor = make_model(Blip2ForImageTextRetrieval, arguments.query_tokens), make_processor()
    features = Features(arguments.query_tokens)
    pictures, place = folder / "pictures", folder / "index"
    link_pictures(pictures, arguments.new)
    index = SearchIndex.build(pictures, model, processor, place, show_progress=False)
    index._store.drop(set(index._store.stats()))
    filled = fill(index, features, count)
    with PeakOfOwnMemory() as making:
        made = cpu_seconds(lambda: index._approximate.update(True, False))
    del index
    with PeakOfOwnMemory() as opening:
        opened = cpu_seconds(lambda: SearchIndex(place, model, processor, False)._store.rows)
    index = SearchIndex(place, model, processor, False)
    texts = features.texts(arguments.queries)
    exactly, slow, slow_memory = ask(index, texts, exact=True)
    found, fast, fast_memory = ask(index, texts, exact=False)
    recall = np.mean([len(some & best) / len(best) for some, best in zip(found, exactly, strict=True)])
    disk = [sum(path.stat().st_size for path in place.glob(name)) for name in ("features-*", "approximate-*")]
    known = index._store.stats()
    parts = index._store, pictures, model, processor.image_processor
    updater = Updater(*parts, BatchSize(32), ROWS_PER_SHARD, 0, False)
    with PeakOfOwnMemory() as updating:
        updated = cpu_seconds(lambda: updater.update({**known, **find_pictures(pictures)}))
        updated_approximate = cpu_seconds(lambda: index._approximate.update(None, False))
    return {
        "disk: features, approximate index, GB": " and ".join(f"{size / 1e9:.3f}" for size in disk),
        "store 1,000 pictures, seconds": f"{1000 * filled / count:.2f}",
        "make the approximate index, seconds": f"{made:.1f}",
        "memory for that, MiB": f"{making.mebibytes:.0f}",
        "open the index, seconds": f"{opened:.2f}",
        "memory of the open index, MiB": f"{opening.mebibytes:.0f}",
        "exact query, seconds": f"{slow:.3f}",
        "memory for it, MiB": f"{slow_memory:.0f}",
        "approximate query, seconds": f"{fast:.3f}",
        "memory for an approximate one, MiB": f"{fast_memory:.0f}",
        "recall@10 of approximate search": f"{recall:.3f}",
        f"add {arguments.new:,} pictures, seconds": f"{updated:.1f}",
        "bring the approximate index up to date, seconds": f"{updated_approximate:.1f}",
        "memory for both, MiB": f"{updating.mebibytes:.0f}",
    }


class Stub:
    """Makes a captioner write the same caption at once, and notes time and memory. It may stop the run."""

    def __init__(self, model: Any, marks: list[float], stop_after: float = float("inf")):
        self.marks, self.stop_after = marks, stop_after
        self.rows, self.first, self.last = 0, 0.0, 0.0
        self.memory: list[float] = []
        model.get_image_features, model.generate = self.get_image_features, self.generate

    def get_image_features(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(pooler_output=torch.zeros(len(pixel_values), 1, 32))

    def generate(self, image_features: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.last = time.process_time()
        self.first = self.first or self.last
        if len(self.memory) < len(self.marks) and self.rows >= self.marks[len(self.memory)]:
            self.memory.append(own_memory() / 2**20)
        if self.rows >= self.stop_after:
            raise KeyboardInterrupt
        self.rows += len(image_features)
        return torch.arange(10, 20).expand(len(image_features), -1)


def measure_run(run: Callable[[Any], Any], count: int) -> dict[str, str]:
    """Run a job, stop it, and let it go on to its end."""
    model = make_model(Blip2ForConditionalGeneration, 1)
    stub = Stub(model, [mark * count for mark in MARKS], MARKS[-1] * count)
    with PeakOfOwnMemory() as memory, contextlib.suppress(KeyboardInterrupt):
        start = time.process_time()
        run(model)
    rest = Stub(model, [])
    with PeakOfOwnMemory() as memory_of_rest:
        again = time.process_time()
        run(model)
        end = time.process_time()
    if not rest.rows or stub.rows + rest.rows != count:
        raise SystemExit(f"{stub.rows} and then {rest.rows} rows were written, of {count}.")
    marks = ", ".join(f"{mark:.0%}" for mark in MARKS)
    return {
        "seconds until the first row": f"{stub.first - start:.2f}",
        "milliseconds a row": f"{1000 * (stub.last - stub.first) / stub.rows:.2f}",
        f"memory after {marks}, MiB": ", ".join(f"{found - memory.before / 2**20:.0f}" for found in stub.memory),
        f"after a stop at {MARKS[-1]:.0%}: seconds until the first new row": f"{rest.first - again:.2f}",
        "after the last row: milliseconds for each row": f"{1000 * (end - rest.last) / count:.2f}",
        "largest memory from the stop to the end, MiB": f"{memory_of_rest.mebibytes:.0f}",
    }


def measure_caption(count: int, folder: Path, arguments: argparse.Namespace) -> dict[str, str]:
    link_pictures(folder / "pictures", count)

    output = folder / ("captions.jsonl" if arguments.output == "jsonl" else "captions")

    def run(model: Any):
        caption_dataset(model, make_processor(), folder / "pictures", output, max_new_tokens=10)

    return measure_run(run, count)


def measure_evaluate(count: int, folder: Path, arguments: argparse.Namespace) -> dict[str, str]:
    (path,) = write_pictures(folder, 1, (64, 48))
    picture, generator = path.read_bytes(), np.random.default_rng(0)

    def rows():
        for _ in range(count):
            # Few words are frequent, and many are rare
            words = np.minimum(generator.zipf(1.5, (5, 10)), 5000)
            texts = [" ".join("".join(chr(97 + int(digit)) for digit in str(word)) for word in own) for own in words]
            yield {"image": {"bytes": picture, "path": None}, "caption": texts}

    columns = {"image": datasets.Image(decode=False), "caption": datasets.List(datasets.Value("string"))}
    data = datasets.Dataset.from_generator(
        rows, features=datasets.Features(columns), cache_dir=str(folder / "cache"), fingerprint=f"growth{count}"
    )

    def run(model: Any):
        evaluate_captioning(model, make_processor(), read_caption_rows(data), folder / "scores", show_progress=False)

    return measure_run(run, count)


PARTS = {"search": measure_search, "caption": measure_caption, "evaluate": measure_evaluate}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--pictures", type=int, nargs="+", default=[10_000, 100_000], help="of the index")
    parser.add_argument("--query-tokens", type=int, default=32, help="of a picture")
    parser.add_argument("--queries", type=int, default=20, help="texts that are searched for; the median counts")
    parser.add_argument("--new", type=int, default=1000, help="picture files that are added to the index")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000], help="captioned, or evaluated")
    parser.add_argument("--output", choices=["jsonl", "txt"], default="jsonl", help="a file of captions, or many")
    parser.add_argument("--folder", help="where the files lie while they are needed (default: that of the system)")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for part in arguments.parts:
        sizes, columns = (arguments.pictures if part == "search" else arguments.rows), []
        for size in sizes:
            with (
                tempfile.TemporaryDirectory(dir=arguments.folder) as folder,
                contextlib.redirect_stderr(io.StringIO()),
            ):
                columns.append(PARTS[part](size, Path(folder), arguments))
        unit = f"pictures of {arguments.query_tokens} × {DIM} values" if part == "search" else "rows"
        print(f"| {part}, {unit} | {' | '.join(f'{size:,}' for size in sizes)} |\n|{' --- |' * (1 + len(sizes))}")
        for name in columns[0]:
            print(f"| {name} | {' | '.join(column[name] for column in columns)} |")
        print(flush=True)


if __name__ == "__main__":
    main()
