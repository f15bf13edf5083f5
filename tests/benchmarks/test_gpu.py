"""The command for a GPU, at tiny sizes on a CPU."""

import json
import subprocess
import sys

import pytest
import torch
from paths import REPOSITORY

from benchmarks.measure import fits, largest


def run(folder, *arguments: str) -> tuple[int, dict, str]:
    """Run the command; return its exit status, its JSON and its Markdown."""
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--output", str(folder / "gpu"), *arguments]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert process.returncode in (0, 1), process.stderr
    return process.returncode, json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text()


def test_parts_go_into_one_table(tmp_path):
    status, report, table = run(tmp_path, "--parts", "reranking", "pinned")
    assert status == 0 and list(report["parts"]) == ["reranking", "pinned"]
    (row,) = report["parts"]["reranking"]["rows"]
    assert row["ratio"] == pytest.approx(row["here"] / row["baseline"])
    assert report["parts"]["pinned"]["rows"][0]["note"] == "needs a GPU"
    assert row["name"] in table and "needs a GPU" in table
    status, report, later = run(tmp_path, "--parts", "attention", "--add", "--seconds", "0")
    assert status == 0 and list(report["parts"]) == ["reranking", "pinned", "attention"]
    assert report["parts"]["attention"]["rows"][0]["note"] == "skipped: out of time"
    assert row["name"] in later


PARTS = """
import time
import gpu

def fails(setting):
    yield gpu.Row("before", here=1.0)
    raise ValueError("something is wrong")

def lasts(setting):
    yield gpu.Row("before", here=2.0)
    time.sleep(60)

def drops_the_signal(setting):
    yield gpu.Row("before", here=3.0)
    try:
        time.sleep(60)
    except gpu.OutOfTime:
        pass
    time.sleep(60)

gpu.AGAIN = 0.5
gpu.PARTS = {"fails": (fails, 9), PART: (globals()[PART], 9)}
# Without the imports
gpu.STARTED = time.monotonic()
gpu.main()
"""


@pytest.mark.parametrize("name", ["lasts", "drops_the_signal"])
def test_a_part_that_fails_or_lasts_loses_nothing(tmp_path, name):
    script = f"PART = {name!r}\n{PARTS}"
    command = [sys.executable, "-c", script, "--device", "cpu", "--output", str(tmp_path / "gpu"), "--seconds", "4"]
    process = subprocess.run(command, cwd=REPOSITORY / "benchmarks", capture_output=True, text=True)
    assert process.returncode == 1, process.stderr
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    before, failure = parts["fails"]["rows"]
    assert before["here"] == 1.0 and failure["passed"] is False
    assert failure["note"] == "ValueError: something is wrong" and "in fails" in failure["traceback"]
    assert [row["note"] for row in parts[name]["rows"]] == ["", "skipped: out of time"]


@pytest.mark.slow
def test_all_parts(tmp_path):
    _, report, table = run(tmp_path, "--seconds", "3000")
    rows = [row for part in report["parts"].values() for row in part["rows"]]
    assert len(report["parts"]) == 15 and all(part["rows"] for part in report["parts"].values())
    assert [row["name"] for row in rows if row["passed"] is False] == []
    assert not any("out of time" in row["note"] for row in rows)
    assert table.count("passed") >= 20


@pytest.mark.parametrize("capacity", [0, 3, 4, 5, 7, 100, 1000])
def test_the_largest_batch_is_found_in_few_probes(capacity):
    probes = []

    def fits_in(size: int) -> bool:
        probes.append(size)
        return size <= capacity

    found = largest(fits_in, start=4)
    assert found <= capacity
    assert found == 0 if capacity < 4 else capacity - found <= capacity / 8
    assert len(probes) <= 13


def test_too_little_memory_is_told_from_other_errors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def run(error: Exception | None):
        if error is not None:
            raise error

    assert fits(lambda: run(None))
    assert not fits(lambda: run(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")))
    assert not fits(lambda: run(RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED. CUDA out of memory.")))
    with pytest.raises(RuntimeError, match="shape"):
        fits(lambda: run(RuntimeError("wrong shape")))
