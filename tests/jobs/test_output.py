"""One run writes to an output at a time, and what it wrote is looked at."""

import errno
import os
import signal
from unittest.mock import Mock

import pytest
from accelerate import PartialState
from faults import run_apart
from filelock import FileLock
from processes import run
from transformers.utils import logging

from blip2_hf.jobs.errors import OutputInUseError, OutputLostError
from blip2_hf.jobs.output import check_still_there, format_size, only_writer


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (4_700, "4.7 kB"),
        (999_900, "1 MB"),
        (73.7e9, "73.7 GB"),
        (2.5e14, "250 TB"),
    ],
)
def test_sizes_are_in_units_that_fit(size, shown):
    assert format_size(size) == shown


def test_a_second_writer_is_told_of_the_first(tmp_path):
    lock = tmp_path / "out" / ".lock"

    def write():
        with only_writer(lock, "out"):
            pass

    with only_writer(lock, "out"):
        with pytest.raises(OutputInUseError, match="Another run is writing to out: .*another output"):
            write()
        status, error = run_apart(write, tmp_path / "error.txt")
        assert status == 1 and error.startswith("OutputInUseError: Another run is writing to out")
        # The process that was refused has not lifted the lock
        assert run_apart(write, tmp_path / "error.txt")[0] == 1
    assert run_apart(write, tmp_path / "error.txt") == (0, "")
    with pytest.raises(KeyError), only_writer(lock, "out"):
        raise KeyError
    write()


def test_a_writer_that_is_killed_holds_no_lock(tmp_path):
    """Its workers, which end later, do not hold it either."""
    begun, end = os.pipe()

    def run():
        with only_writer(tmp_path / ".lock", "out"):
            if os.fork() == 0:
                os.close(end)
                os.read(begun, 1)  # until the test ends
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)

    assert run_apart(run, tmp_path / "error.txt")[0] == -signal.SIGKILL
    with only_writer(tmp_path / ".lock", "out"):
        pass
    os.close(end)
    os.close(begun)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(number, tmp_path, monkeypatch, caplog):
    fcntl = pytest.importorskip("fcntl", reason="flock is of Unix")

    def flock(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(logging.get_logger("blip2_hf"), "propagate", True)
    with only_writer(tmp_path / ".lock", "out"):
        (tmp_path / "written").touch()
    assert "has no locks: let no other run write to out" in caplog.text


def fail_to_lock(folder):
    """Fail in the first of two processes."""
    state = PartialState(cpu=True)
    if state.is_main_process:
        FileLock.acquire = Mock(side_effect=OSError(errno.EIO, "broken disk"))
    with pytest.raises(OSError, match="broken disk"), only_writer(folder / ".lock", "out", state):
        pass
    print("told")


def test_all_processes_are_told_why_the_first_can_not_lock(tmp_path):
    printed = run(fail_to_lock, tmp_path, folder=tmp_path, processes=2)
    assert [out.stdout for out in printed] == ["told\n"] * 2


def test_files_that_are_gone(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.touch()
    check_still_there(paths, "out")
    paths[1].unlink()
    with pytest.raises(
        OutputLostError, match="^out was deleted or changed.*: .*/b were written and.*same command again"
    ):
        check_still_there(paths, "out")
    paths[0].unlink()
    with pytest.raises(OutputLostError, match="/a and 1 others"):
        check_still_there(paths, "out")
