"""Pictures are read ahead in batches; what can't be read stops nothing; batches shrink if memory runs out."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import processes
import pytest
import torch
from tiny import make_image, make_image_processor

from blip2_hf.jobs.batch_size import BatchSize
from blip2_hf.jobs.picture_inputs import PictureInputs, PictureStream, collate_pictures, load_ahead


PICTURES = [make_image(0), "missing.png", make_image(1), b"no picture", make_image(2)]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", [PictureInputs, PictureStream])
def test_batches(kind, num_workers):
    processor = make_image_processor()
    given = PICTURES if kind is PictureInputs else iter(PICTURES)
    batches = list(load_ahead(kind(given, processor, "image"), num_workers, batch_size=2))
    assert [batch.numbers for batch in batches] == [[0, 1], [2, 3], [4]]
    assert [batch.readable for batch in batches] == [[0], [2], [4]]
    label = "image 2 of 5" if kind is PictureInputs else "image 2"
    assert batches[0].errors[1].startswith(f"{label} ('missing.png'): no such file")
    found = torch.cat([batch.pixel_values for batch in batches])
    assert torch.equal(found, processor(images=PICTURES[::2], return_tensors="pt")["pixel_values"])


def test_a_batch_of_which_nothing_can_be_read():
    batch = collate_pictures([(0, "gone"), (1, "broken")])
    assert (batch.readable, batch.pixel_values) == ([], None)
    assert batch.errors == {0: "gone", 1: "broken"}


def test_pictures_of_several_sizes():
    with pytest.raises(ValueError, match="several sizes.*pictures 7 to 9.*batch_size=1"):
        collate_pictures([(7, torch.zeros(1, 3, 4, 4)), (8, "broken"), (9, torch.zeros(1, 3, 4, 5))])


def test_batches_are_halved_and_stay_so():
    tried, batch_size = [], BatchSize(8)

    def double(items):
        tried.append(len(items))
        if len(items) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return [2 * item for item in items]

    found = [x for _, part in batch_size.run(double, list(range(9))) for x in part]
    assert found == list(range(0, 18, 2))
    assert tried == [8, 4, 2, 2, 2, 2, 1] and batch_size.size == 2
    assert [part for part, _ in batch_size.run(double, [1, 2, 3])] == [[1, 2], [3]]

    def fail(items):
        raise error

    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), RuntimeError("another")):
        with pytest.raises(RuntimeError) as caught:
            list(BatchSize(4).run(fail, [1, 2, 3, 4]))
        assert caught.value is error


def read_and_write_names(folder: Path):
    """Begin to read pictures, of which a batch is more than a pipe holds, and write down what reads them."""
    images = PictureInputs([make_image(0)] * 64, make_image_processor(512))
    batches = load_ahead(images, 2, batch_size=4)
    next(batches)
    workers = [str(process.pid) for process in multiprocessing.active_children()]
    (folder / "new").write_text(" ".join(workers))
    (folder / "new").rename(folder / "workers")
    time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(tmp_path, number):
    process = processes.start(read_and_write_names, tmp_path, folder=tmp_path)
    wait_until(lambda: (tmp_path / "workers").exists())
    workers = [int(name) for name in (tmp_path / "workers").read_text().split()]
    assert len(workers) == 2 and all(map(is_there, workers))
    time.sleep(0.5)  # until they wait for their batches to be taken
    os.kill(process.pid, number)
    process.join()
    wait_until(lambda: not any(map(is_there, workers)))


def is_there(pid: int) -> bool:
    """Tell whether a process runs. One that has ended may still have its number, until its new parent looks."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(holds, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
