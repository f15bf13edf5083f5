"""Files that are whole or not there."""

import errno
import os
import signal
import stat
import time

import pytest
from faults import run_apart

from blip2_hf.jobs.atomic_files import (
    atomic_file,
    remove_leftovers,
    rename,
    sync_folder,
    temporary_folder,
    write_json,
    write_text,
)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def leave_unfinished(path):
    """A process of its own is killed while it writes."""

    def run():
        with atomic_file(path) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    assert run_apart(run, path.with_suffix(".error"))[0] == -signal.SIGKILL


def test_a_file_has_its_name_once_it_is_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"name": "caf\u00e9 \udcff"}, indent=None)
    assert path.read_bytes() == b'{"name": "caf\\u00e9 \\udcff"}\n'
    with atomic_file(path) as file:
        file.write(b"new")
        assert path.read_bytes().startswith(b"{")
    assert path.read_bytes() == b"new"
    mask = os.umask(0o022)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask  # others may read it, as any file


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()]
)
def test_what_fails_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(type(error)) as caught, atomic_file(path) as file:
        file.write(b"new")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]
    if isinstance(error, OSError):
        assert str(caught.value) == f"[Errno {errno.ENOSPC}] No space left on device: {str(path)!r}"


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="nosuch/a.txt'$"):
        write_text(tmp_path / "nosuch" / "a.txt", "")
    with pytest.raises(OSError, match="another"), atomic_file(tmp_path / "a.txt"):
        raise OSError(errno.ECONNRESET, "another", "elsewhere")


def test_two_writers_of_one_file(tmp_path):
    """Each has a temporary file of its own, and the last one that ends counts."""
    path = tmp_path / "a.txt"
    with atomic_file(path) as first:
        first.write(b"first")
        with atomic_file(path) as second:
            second.write(b"second")
            assert len(names(tmp_path)) == 2
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first" and names(tmp_path) == ["a.txt"]


def test_a_name_as_long_as_names_can_be(tmp_path):
    path = tmp_path / ("n" * 251 + ".txt")
    write_text(path, "x")
    assert path.read_text() == "x"


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    (tmp_path / "mine.tmp").write_text("of another program")
    leave_unfinished(tmp_path / "a.txt")
    (leftover,) = tmp_path.glob(".blip2-hf-*")
    with atomic_file(tmp_path / "b.txt") as file:
        remove_leftovers(tmp_path)
        assert not leftover.exists() and len(names(tmp_path)) == 2
        file.write(b"whole")
    assert (tmp_path / "b.txt").read_bytes() == b"whole"
    assert names(tmp_path) == ["b.txt", "mine.tmp"]
    remove_leftovers(tmp_path / "nosuch")


def test_a_folder_that_is_left_by_the_dead_goes(tmp_path):
    with temporary_folder(tmp_path / ".") as living:
        (living / "a.txt").write_text("x")

        def run():
            with temporary_folder(tmp_path) as folder:
                (folder / "half.txt").write_text("x")
                os.kill(os.getpid(), signal.SIGKILL)

        assert run_apart(run, tmp_path / "error.txt")[0] == -signal.SIGKILL
        assert len(names(tmp_path)) == 2
        with temporary_folder(tmp_path) as folder:
            assert names(tmp_path) == sorted([living.name, folder.name]) and living != folder
        assert (living / "a.txt").exists()
    assert names(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/proc/self/ns/pid"), reason="only Linux has namespaces of processes")
def test_a_number_of_a_process_counts_in_its_own_container(tmp_path, monkeypatch):
    leave_unfinished(tmp_path / "a.txt")
    readlink = os.readlink
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]" if path == "/proc/self/ns/pid" else readlink(path))
    remove_leftovers(tmp_path)
    assert len(names(tmp_path)) == 1
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_a_link_stays_and_its_file_is_written(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for name in ("there.txt", "not yet.txt"):
        link, target = tmp_path / f"link to {name}", tmp_path / "elsewhere" / name
        link.symlink_to(target)
        write_text(link, "new")
        assert link.is_symlink() and target.read_text() == "new" and not target.is_symlink()
    assert names(tmp_path / "elsewhere") == ["not yet.txt", "there.txt"]


def test_a_folder_that_can_not_be_read_is_no_error(tmp_path):
    """Its files may be written all the same."""
    sync_folder(tmp_path / "nosuch")


def test_leftovers_of_another_machine_go_after_a_day(tmp_path):
    leave_unfinished(tmp_path / "a.txt")
    (leftover,) = tmp_path.glob(".blip2-hf-*")
    mine = leftover.name.split("-")[2]
    foreign = leftover.rename(leftover.with_name(leftover.name.replace(mine, "0" * 8)))
    remove_leftovers(tmp_path)
    assert foreign.exists()
    long_ago = time.time() - 25 * 3600
    os.utime(foreign, (long_ago, long_ago))
    remove_leftovers(tmp_path)
    assert not foreign.exists()


def test_names_are_put_on_the_disk(tmp_path, monkeypatch):
    """The file before it has its name, the folder after that; a folder that is renamed too."""
    calls, sync, replace = [], os.fsync, os.replace

    def logged(descriptor: int):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", logged)
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    write_text(tmp_path / "a.txt", "x")
    assert calls == ["file", "rename", "folder"]
    (tmp_path / "unfinished").mkdir()
    rename(tmp_path / "unfinished", tmp_path / "data")
    assert calls[3:] == ["rename", "folder"] and (tmp_path / "data").is_dir()
    (tmp_path / "data" / "b.txt").write_text("x")
    rename(tmp_path / "data", tmp_path / "more")
    assert calls[5:] == ["file", "rename", "folder"]
