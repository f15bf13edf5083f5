"""
Every job, killed at each of its steps, on a disk that fills up at each of them, and beside another run: the next run
gives what an undisturbed run gives.
"""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from faults import WRITE, Steps, run_apart
from stage1 import make_stage1
from tiny import make_image, make_image_processor, make_model, make_processor
from train_stage1 import Processor

from blip2_hf import Blip2Processor
from blip2_hf.capfilt import ModelCaptioner, RetrievalFilter, capfilt_dataset
from blip2_hf.captioning import FolderPictures, caption_dataset
from blip2_hf.data import cache_features
from blip2_hf.evaluation import CaptionSample, evaluate_captioning, evaluate_retrieval
from blip2_hf.jobs.errors import StateFileError
from blip2_hf.models.generation_presets import generation_preset
from blip2_hf.search import SearchIndex
from blip2_hf.search.store import Store


@dataclass
class Job:
    r"""
    Args:
        run (`Callable`):
            `run(folder)` writes to a folder.
        result (`Callable`):
            `result(folder)` returns what is compared.
        may_lose (`int`):
            How many pictures are computed again at most.
        before (`Callable`, *optional*):
            `before(folder)` makes what an earlier run has left there.
        again (`Callable`, *optional*):
            `again(folder)` goes on after an interruption; without it, `run`.
        check_partial (`Callable`, *optional*):
            `check_partial(folder, undisturbed)` looks at what an interrupted run has left.
        output (`str`, *optional*):
            The folder inside `folder` that is the output.
    """

    run: Callable[[Path], Any]
    result: Callable[[Path], Any]
    may_lose: int
    before: Callable[[Path], Any] = lambda folder: None
    again: Callable[[Path], Any] | None = None
    check_partial: Callable[[Path, Any], Any] = lambda folder, undisturbed: None
    output: str = "out"

    def go_on(self, folder: Path):
        (self.again or self.run)(folder)


def files(folder: Path) -> dict[str, bytes]:
    """All files but locks."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def captions(world, name: str, num_before: int = 0) -> Job:
    def run(folder: Path, num_pictures: int | None = None):
        pictures = FolderPictures(world.pictures)
        pictures.names = pictures.names[:num_pictures]
        caption_dataset(*world.captioner, pictures, folder / "out" / name, max_new_tokens=3, batch_size=1)

    # A batch is prepared and one is computed
    return Job(run, files, 1, before=lambda folder: run(folder, num_before) if num_before else None)


def index(world, **options) -> Job:
    """Of a folder in which a picture is new, one has changed, one is gone, and one can't be read any more."""
    fixed = {"batch_size": 1, "rows_per_shard": 2, "show_progress": False}

    def run(folder: Path, **options):
        SearchIndex.build(folder / "pictures", *world.retriever, **fixed, **options)

    def before(folder: Path):
        shutil.copytree(world.pictures, folder / "pictures")
        run(folder, **{**options, "rebuild": False})
        make_image(20).save(folder / "pictures" / "20.png")
        make_image(21).save(folder / "pictures" / "1.png")
        (folder / "pictures" / "2.png").unlink()
        (folder / "pictures" / "0.png").write_bytes(b"no picture any more")

    def features(store: Store) -> dict[str, bytes]:
        rows = store.rows.tolist()
        found = {store.name(shard, row): store.read("features", shard, [row]).tobytes() for _, shard, row in rows}
        assert len(found) == len(rows)
        return found

    def result(folder: Path):
        store = Store(folder / "pictures" / ".blip2-index")
        kinds = [path.name.partition("-")[0] for path in store.directory.iterdir()]
        found = SearchIndex.open(folder / "pictures", *world.retriever, show_progress=False).search("a red bus")
        scores = {result.path.name: result.score for result in found}
        return features(store), store.read_broken().keys(), set(kinds), kinds.count("approximate"), scores

    def check_partial(folder: Path, undisturbed: Any):
        found = SearchIndex.open(folder / "pictures", *world.retriever, show_progress=False)
        there, expected = features(found._store), undisturbed[0]
        assert there.keys() <= {"0.png", "2.png", *expected}
        assert there.get("3.png", expected["3.png"]) == expected["3.png"]
        assert "3.png" in there or "rebuild" in options
        assert len(found.search("a red bus")) == len(there)

    return Job(
        partial(run, **options),
        result,
        may_lose=2,
        before=before,
        again=partial(run, **{**options, "rebuild": False}),
        check_partial=check_partial,
        output="pictures/.blip2-index",
    )


def samples(world) -> list[CaptionSample]:
    """The pictures that can be read, each with a caption."""
    paths = sorted(world.pictures.glob("[0-9].png"))
    return [CaptionSample(str(path), path.name, [f"picture {path.stem}", "a bus"]) for path in paths]


def rows(world) -> datasets.Dataset:
    """All pictures, the broken one too, as rows with a caption."""
    paths = sorted(map(str, world.pictures.glob("*.png")))
    return datasets.Dataset.from_dict({"image": paths, "caption": [f"picture {i}" for i in range(len(paths))]})


def evaluated_captions(world) -> Job:
    model, processor = world.captioner
    preset = replace(generation_preset("caption", model.config), generate_kwargs={"max_new_tokens": 3})
    options = {"preset": preset, "batch_size": 1, "show_progress": False}
    return Job(
        lambda folder: evaluate_captioning(model, processor, samples(world), folder / "out", **options), files, 1
    )


def evaluated_retrieval(world) -> Job:
    def run(folder: Path):
        evaluate_retrieval(*world.retriever, samples(world), folder / "out", k=2, batch_size=2, show_progress=False)

    # The tower's output of all pictures is one file, and of one its size is asked first
    return Job(run, files, len(samples(world)) + 1)


def features(world) -> Job:
    def run(folder: Path):
        options = {"rows_per_shard": 2, "batch_size": 1, "skip_broken": True}
        cache_features(rows(world), *world.retriever, folder / "out", **options)

    return Job(run, files, 2 + 1)


def capfilt(world) -> Job:
    def run(folder: Path):
        captioner = ModelCaptioner(*world.captioner, num_captions=2, max_new_tokens=3)
        options = {"rows_per_shard": 2, "batch_size": 1}
        capfilt_dataset(rows(world), captioner, RetrievalFilter(*world.retriever), folder / "out", **options)

    # The captioner and the filter look at each picture
    return Job(run, files, 2 * 2)


def captions_again(world, name: str, existing: str) -> Job:
    """Where there are captions, those of the user or of another prompt."""
    is_inside = name in ("texts", "metadata.jsonl")  # the folder of the pictures

    def run(folder: Path, existing: str = existing, **options):
        pictures = folder / "out" if is_inside else world.pictures
        output = None if name == "texts" else folder / "out" / name
        fixed = {"max_new_tokens": 3, "batch_size": 1}
        caption_dataset(*world.captioner, pictures, output, existing=existing, **fixed, **options)

    def before(folder: Path):
        if not is_inside:
            run(folder, "skip", prompt="a photo of")
            return
        shutil.copytree(world.pictures, folder / "out")
        if name == "texts":
            (folder / "out" / "1.txt").write_text("my own text.")
        else:
            own = [{"file_name": "2.png", "caption": "mine", "stars": 5}, {"file_name": "0.png", "stars": 3}]
            (folder / "out" / name).write_text("\n".join(map(json.dumps, own)))

    def result(folder: Path) -> dict[str, bytes]:
        return {name: data.replace(str(folder).encode(), b"") for name, data in files(folder).items()}

    def check_partial(folder: Path, undisturbed: Any):
        """Each text is what it was, or what it is to be."""
        old, found = files(folder.parent / "before"), files(folder)
        texts = [f"out/{number}.txt" for number in range(4)] if name == "texts" else [f"out/{name}"]
        assert all(found.get(text) in (old.get(text), undisturbed[text]) for text in texts)
        assert [text for text in texts if text in old and text not in found] == []

    def again(folder: Path):
        """A run that has overwritten all would begin anew."""
        found = [json.loads(path.read_text()) for path in (folder / "out").glob("*settings.json")]
        is_finished = any(settings["prompt"] is None and "existing" not in settings for settings in found)
        run(folder, "skip" if is_finished and existing == "overwrite" else existing)

    return Job(run, result, 1, before=before, again=again, check_partial=check_partial)


# Name, and what makes the job of the models and pictures of `world`
JOBS: dict[str, Callable[[Any], Job]] = {
    "captions.jsonl": partial(captions, name="captions.jsonl"),
    "captions.parquet, more": partial(captions, name="captions.parquet", num_before=3),
    "captions as .txt": partial(captions, name="texts"),
    "captions as .csv": partial(captions, name="captions.csv"),
    "captions as .txt, added": partial(captions_again, name="texts", existing="append"),
    "captions as .txt, anew": partial(captions_again, name="texts", existing="overwrite"),
    "captions.jsonl, added": partial(captions_again, name="captions.jsonl", existing="prepend"),
    "captions.parquet, anew": partial(captions_again, name="captions.parquet", existing="overwrite"),
    "metadata.jsonl": partial(captions_again, name="metadata.jsonl", existing="skip"),
    "metadata.jsonl, added": partial(captions_again, name="metadata.jsonl", existing="append"),
    "index, updated": partial(index, store_embeds=True),
    "index, anew": partial(index, rebuild=True, approximate=True),
    "evaluate captions": evaluated_captions,
    "evaluate retrieval": evaluated_retrieval,
    "cache features": features,
    "capfilt": capfilt,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """Models, and a folder of pictures of which one is broken."""
    torch.manual_seed(0)
    pictures = tmp_path_factory.mktemp("pictures")
    for number in range(4):
        make_image(number).save(pictures / f"{number}.png")
    (pictures / "broken.png").write_bytes(b"no picture")
    retriever = make_stage1().eval(), Blip2Processor(make_image_processor(), Processor().tokenizer)
    captioner = make_model().eval(), make_processor()
    computed = multiprocessing.Value("q", lock=False)  # pictures, in this process and those that it forks

    def count(module: torch.nn.Module, arguments: tuple, output: Any):
        computed.value += len(output.last_hidden_state)

    for model, _ in (captioner, retriever):
        model.vision_model.register_forward_hook(count)
    return SimpleNamespace(pictures=pictures, captioner=captioner, retriever=retriever, computed=computed)


@pytest.fixture(params=JOBS)
def job(request, world, tmp_path) -> Job:
    """A job, and what an earlier run has left for it in `tmp_path / "before"`."""
    job = JOBS[request.param](world)
    (tmp_path / "before").mkdir()
    job.before(tmp_path / "before")
    return job


def start(tmp_path: Path, name: str) -> Path:
    return shutil.copytree(tmp_path / "before", tmp_path / name)


@pytest.fixture
def undisturbed(job, world, tmp_path) -> Any:
    folder = start(tmp_path, "undisturbed")
    world.computed.value = 0
    job.run(folder)
    world.to_compute = world.computed.value
    return job.result(folder)


def run_with(job: Job, folder: Path, strike: Callable[[str, int], Any]) -> tuple[int, str]:
    def run():
        Steps(folder, strike)
        job.run(folder)

    return run_apart(run, folder.with_suffix(".error"))


def kill_at(step: int, kind: str, number: int):
    if number == step:
        os.kill(os.getpid(), signal.SIGKILL)


def fill_disk_at(step: int, kind: str, number: int):
    if number >= step and kind == WRITE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def delete_at(step: int, output: Path, kind: str, number: int):
    if number == step:
        shutil.rmtree(output)


def test_killed_at_each_step(job, undisturbed, world, tmp_path):
    for step in range(1, 1000):
        folder = start(tmp_path, f"killed at {step}")
        world.computed.value = 0
        status, error = run_with(job, folder, partial(kill_at, step))
        assert error == ""
        job.check_partial(folder, undisturbed)
        job.go_on(folder)
        assert job.result(folder) == undisturbed
        assert world.computed.value <= world.to_compute + job.may_lose
        assert not list(folder.rglob("*.tmp"))
        if status == 0:
            break
        assert status == -9
    assert step > 5


def test_a_disk_that_is_full_from_each_write_on(job, undisturbed, tmp_path):
    for step in range(1, 1000):
        folder = start(tmp_path, f"full at {step}")
        status, error = run_with(job, folder, partial(fill_disk_at, step))
        assert not list(folder.rglob("*.tmp"))
        if status == 0:
            break
        assert "No space left on device" in error and str(folder) in error, (status, step, error)
        job.check_partial(folder, undisturbed)
        job.go_on(folder)
        assert job.result(folder) == undisturbed
    assert step > 5
    assert job.result(folder) == undisturbed


def test_an_output_that_is_deleted_at_each_step(job, undisturbed, tmp_path):
    for step in range(1, 1000):
        folder = start(tmp_path, f"deleted at {step}")
        status, error = run_with(job, folder, partial(delete_at, step, folder / job.output))
        # What is deleted early is made again; a run that lacks something at its end is no success
        assert (status == 1 and error) or job.result(folder) == undisturbed
        if step > 5 and status == 0:
            break
    assert step > 8


def test_two_runs_at_once(job, undisturbed, tmp_path):
    """The second is told that the first is writing, and harms nothing."""
    folder = start(tmp_path, "shared")

    def start_second(kind: str, number: int):
        if number == 3:
            status, error = run_apart(lambda: job.run(folder), tmp_path / "second.error")
            assert status == 1 and error.startswith("OutputInUseError: Another run is writing to"), (status, error)

    assert run_with(job, folder, start_second) == (0, "")
    assert job.result(folder) == undisturbed


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("evaluate captions", "parts/settings.json"),
        ("evaluate captions", "parts/part-00000.jsonl"),
        ("evaluate retrieval", "parts/contrast.pt"),
        ("evaluate retrieval", "parts/pairs-*.npy"),
        ("evaluate retrieval", "parts/features/cache.json"),
        ("evaluate retrieval", "parts/features/shard-*.arrow"),
        ("cache features", "cache.json"),
        ("capfilt", "capfilt.json"),
        ("capfilt", "data/train-00000-*.parquet"),
        ("captions.jsonl", "captions.jsonl"),
        ("captions.parquet, more", "captions.parquet"),
        ("index, updated", "features-000001.npy"),
        ("index, updated", "embeds-000001.npy"),
        ("index, anew", "approximate-*.faiss"),
    ],
)
def test_a_file_that_was_changed_is_named(name, pattern, world, tmp_path):
    job = JOBS[name](world)
    job.before(tmp_path)
    job.run(tmp_path)
    (path,) = (tmp_path / job.output).glob(pattern)
    before = path.read_bytes()
    path.write_bytes(b"half\n")
    with pytest.raises(StateFileError, match=f"^{re.escape(str(path))}.* can't be read") as error:
        job.go_on(tmp_path)
    assert "elete" in str(error.value)  # what to do
    path.write_bytes(before)
    job.go_on(tmp_path)
