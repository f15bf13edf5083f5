"""
Every job, killed at each of its steps, on a disk that fills up at each of them, and beside another run: the next run
gives what an undisturbed run gives.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faults import WRITE, Steps, kill, raise_disk_full, run_apart
from stage1 import make_stage1
from tiny import make_image, make_image_processor, make_model, make_processor
from train_stage1 import Processor

from blip2_hf import Blip2Processor
from blip2_hf.captioning import FolderPictures, caption_dataset
from blip2_hf.jobs.errors import OutputInUseError
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
        before (`Callable`, *optional*):
            `before(folder)` is what an earlier run has left there.
        output (`str`, *optional*):
            The folder inside `folder` that is the output.
    """

    run: Callable[[Path], Any]
    result: Callable[[Path], Any]
    before: Callable[[Path], Any] = lambda folder: None
    output: str = "."


def files(folder: Path) -> dict[str, bytes]:
    """All files but locks."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def captions(world, name: str, num_before: int = 0) -> Job:
    def run(folder: Path, num_pictures: int | None = None):
        pictures = FolderPictures(world.pictures)
        pictures.names = pictures.names[:num_pictures]
        caption_dataset(*world.captioner, pictures, folder / "out" / name, max_new_tokens=3, batch_size=1)

    return Job(run, files, lambda folder: run(folder, num_before) if num_before else None, output="out")


def index(world, is_update: bool, **options) -> Job:
    def run(folder: Path):
        fixed = {"batch_size": 1, "rows_per_shard": 2, "show_progress": False}
        SearchIndex.build(folder / "pictures", *world.retriever, **fixed, **options)

    def before(folder: Path):
        shutil.copytree(world.pictures, folder / "pictures")
        if is_update:
            run(folder)
            make_image(20).save(folder / "pictures" / "20.png")
            make_image(21).save(folder / "pictures" / "1.png")
            (folder / "pictures" / "2.png").unlink()
            (folder / "pictures" / "0.png").write_bytes(b"no picture any more")

    def result(folder: Path):
        store = Store(folder / "pictures" / ".blip2-index")
        features = {
            store.name(shard, row): store.read("features", shard, [row]).tobytes()
            for _, shard, row in store.rows.tolist()
        }
        assert len(features) == len(store.rows)
        kinds = [path.name.partition("-")[0] for path in store.directory.iterdir()]
        return features, store.read_broken().keys(), set(kinds), kinds.count("approximate")

    return Job(run, result, before, output="pictures/.blip2-index")


JOBS: dict[str, Callable[[Any], Job]] = {
    "captions.jsonl": lambda world: captions(world, "captions.jsonl"),
    "captions.parquet, more": lambda world: captions(world, "captions.parquet", num_before=3),
    "captions as .txt": lambda world: captions(world, "texts"),
    "index": lambda world: index(world, is_update=False),
    "index, updated": lambda world: index(world, is_update=True, store_embeds=True),
    "index, anew": lambda world: index(world, is_update=True, rebuild=True),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a process that is forked has no other
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """Models, and a folder of pictures of which one is broken."""
    torch.manual_seed(0)
    pictures = tmp_path_factory.mktemp("pictures")
    for number in range(4):
        make_image(number).save(pictures / f"{number}.png")
    (pictures / "broken.png").write_bytes(b"no picture")
    retriever = make_stage1().eval(), Blip2Processor(make_image_processor(), Processor().tokenizer)
    return SimpleNamespace(pictures=pictures, captioner=(make_model(), make_processor()), retriever=retriever)


@pytest.fixture(params=JOBS)
def job(request, world, tmp_path) -> Job:
    """A job, and what an earlier run has left for it in `tmp_path / "before"`."""
    job = JOBS[request.param](world)
    (tmp_path / "before").mkdir()
    job.before(tmp_path / "before")
    return job


@pytest.fixture
def undisturbed(job, tmp_path) -> Any:
    return job.result(run_in(job, tmp_path, "undisturbed"))


def start(tmp_path: Path, name: str) -> Path:
    return shutil.copytree(tmp_path / "before", tmp_path / name)


def run_in(job: Job, tmp_path: Path, name: str) -> Path:
    folder = start(tmp_path, name)
    job.run(folder)
    return folder


def run_with(job: Job, folder: Path, strike: Callable[[str, int], None], tmp_path: Path) -> tuple[int, str]:
    def run():
        Steps(folder, strike)
        job.run(folder)

    return run_apart(run, tmp_path / "error.txt")


def test_killed_at_each_step(job, undisturbed, tmp_path):
    for step in range(1, 1000):
        folder = start(tmp_path, f"killed at {step}")
        status, error = run_with(job, folder, lambda _, number: number == step and kill(), tmp_path)
        assert error == ""
        job.run(folder)
        assert job.result(folder) == undisturbed
        assert not list(folder.rglob("*.tmp"))
        if status == 0:
            break
        assert status == -9
    assert step > 5


def test_a_disk_that_is_full_from_each_write_on(job, undisturbed, tmp_path):
    for step in range(1, 1000):
        folder = start(tmp_path, f"full at {step}")

        def strike(kind: str, number: int):
            if number >= step and kind == WRITE:
                raise_disk_full()

        status, error = run_with(job, folder, strike, tmp_path)
        assert not list(folder.rglob("*.tmp"))
        if status == 1:
            assert "No space left on device" in error
        job.run(folder)
        assert job.result(folder) == undisturbed
        if status == 0:
            break
    assert step > 5


def test_an_output_that_is_deleted_at_each_step(job, undisturbed, tmp_path):
    for step in range(1, 1000):
        folder = start(tmp_path, f"deleted at {step}")
        is_deleted = tmp_path / f"deleted {step}"

        def strike(_, number: int):
            if number == step:
                shutil.rmtree(folder / job.output)
                is_deleted.touch()

        status, error = run_with(job, folder, strike, tmp_path)
        if not is_deleted.exists():
            break
        # A job may begin anew after that, and must not call itself done otherwise
        assert status == 1 and error or job.result(folder) == undisturbed
    assert step > 5


def test_two_runs_at_once(job, undisturbed, tmp_path):
    """The second is told that the first is writing, and harms nothing."""
    folder = start(tmp_path, "shared")
    second = []

    def strike(_, number: int):
        if number == 3:
            # A process of the same folder, which the first one waits for
            second.append(run_apart(lambda: job.run(folder), tmp_path / "second.txt"))
            assert second[0][0] == 1 and "Another run is writing to" in second[0][1], second

    status, error = run_with(job, folder, strike, tmp_path)
    assert (status, error) == (0, "")
    assert job.result(folder) == undisturbed
    with pytest.raises(OutputInUseError, match="Another run is writing to"):
        raise OutputInUseError("Another run is writing to")
