"""One run writes to an output at a time, and what it wrote is looked at."""

import os
import signal

import pytest
from faults import run_apart

from blip2_hf.jobs.errors import OutputInUseError, OutputLostError
from blip2_hf.jobs.output import check_still_there, only_writer


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
