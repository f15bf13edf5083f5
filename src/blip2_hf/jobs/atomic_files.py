"""Files that are whole or not there: written under a name of their own, put on the disk, and then renamed."""

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


_TEMPORARY = re.compile(r"\.blip2-hf-([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.tmp")
_ABANDONED_AFTER = 24 * 3600  # seconds without a write: whether a process of another machine lives is not known
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """
    Open a file of bytes that takes its name once it is written to the end. If anything fails before, such as a full
    disk, a file of that name stays as it was. An `OSError` names `path`. The folder of `path` must be there. A link
    stays, and the file that it leads to is written.
    """
    path = Path(path)
    target = path.resolve() if path.is_symlink() else path
    temporary = _temporary(target.parent)
    try:
        with named_in_errors(path, temporary):
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(target.parent)


@contextlib.contextmanager
def temporary_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Make a folder inside another. It is removed in the end or, if this process is killed, by the next run."""
    remove_leftovers(folder)
    temporary = _temporary(Path(folder))
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(folder: Path) -> Path:
    # Without the name of what is written, which may already be as long as a name can be
    return folder / f".blip2-hf-{_machine()}-{os.getpid():d}-{secrets.token_hex(4)}.tmp"


@contextlib.contextmanager
def named_in_errors(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Let the error of a full disk, and an error about a temporary file, name the file that was to be written."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL or error.filename == str(temporary):
            error.filename = str(path)
        raise


def write_text(path: str | os.PathLike, text: str):
    """Write a file of UTF-8, whole."""
    with atomic_file(path) as file:
        file.write(text.encode())


def write_json(path: str | os.PathLike, content: Any, indent: int | None = 2):
    """Write a file of JSON, whole. It is ASCII, which names of files that are not Unicode survive."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def rename(source: str | os.PathLike, target: str | os.PathLike):
    """Put a file, or a folder with its files, on the disk, and rename it there."""
    for path in (Path(source), *Path(source).rglob("*")):
        if path.is_file():
            _sync(path)
    os.replace(source, target)
    sync_folder(Path(target).parent)


def sync_folder(folder: Path):
    """Put the names in a folder on the disk, if its file system can do that."""
    with contextlib.suppress(OSError):
        _sync(folder)


def _sync(path: Path):
    if os.name == "nt":  # there a folder cannot be opened, and a file only be put on the disk by who may write to it
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: str | os.PathLike):
    """
    Remove the files and folders that runs which were killed did not write to the end. Those of a run that lives stay.
    """
    with contextlib.suppress(FileNotFoundError):
        for path in Path(folder).iterdir():
            match = _TEMPORARY.fullmatch(path.name)
            if match and _is_abandoned(path, match[1], int(match[2])):
                # Another process may remove it too; Windows refuses to remove an open file
                with contextlib.suppress(FileNotFoundError, PermissionError):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_abandoned(path: Path, machine: str, pid: int) -> bool:
    if machine == _machine() and not _is_alive(pid):
        return True
    with contextlib.suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > _ABANDONED_AFTER
    return False


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # there os.kill would end the process
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def _machine() -> str:
    """Return what tells apart the places in which a number of a process has a meaning of its own."""
    place = platform.node()
    with contextlib.suppress(OSError):  # Linux has both
        # Containers, and copies of a machine, may have one name
        place += os.readlink("/proc/self/ns/pid") + Path("/proc/sys/kernel/random/boot_id").read_text()
    return hashlib.blake2b(place.encode(), digest_size=4).hexdigest()
