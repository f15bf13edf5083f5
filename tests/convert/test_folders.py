"""A folder of a checkpoint is whole or not there, also if the process is killed."""

import os
import signal

import pytest
from faults import run_apart

from blip2_hf.convert.folders import whole_folder


def write(output, content: str):
    with whole_folder(output) as folder:
        (folder / "config.json").write_text(content)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_run_leaves_goes_with_the_next(tmp_path):
    output = tmp_path / "more" / "model"
    write(output, "first")

    def run():
        with whole_folder(output) as folder:
            (folder / "config.json").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert run_apart(run, tmp_path / "error.txt")[0] == -signal.SIGKILL
    assert (output / "config.json").read_text() == "first" and len(names(output.parent)) == 2
    write(output, "second")
    assert names(output.parent) == ["model"] and (output / "config.json").read_text() == "second"


def test_what_fails_leaves_what_was_there(tmp_path):
    output = tmp_path / "model"
    write(output, "first")
    with pytest.raises(KeyError), whole_folder(output) as folder:
        (folder / "config.json").write_text("half")
        raise KeyError
    assert names(tmp_path) == ["model"] and (output / "config.json").read_text() == "first"
