"""Files that are whole or not there: written under a name of their own, put on the disk, and then renamed."""

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import secrets
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
    disk, a file of that name stays as it was. An `OSError` names `path`. The folder of `path` must be there.
    """
    path = Path(path)
    # The name does not contain that of the file, which may already be as long as a name can be
    temporary = path.with_name(f".blip2-hf-{_machine()}-{os.getpid():d}-{secrets.token_hex(4)}.tmp")
    try:
        with named_in_errors(path, temporary):
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


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
    """Rename a file or a folder, on the disk too."""
    os.replace(source, target)
    sync_folder(Path(target).parent)


def sync_folder(folder: Path):
    """Put the names in a folder on the disk, if its file system can do that."""
    if os.name == "nt":  # there a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: str | os.PathLike):
    """Remove the files that runs which were killed did not write to the end. Those of a run that lives stay."""
    with contextlib.suppress(FileNotFoundError):
        for path in Path(folder).iterdir():
            match = _TEMPORARY.fullmatch(path.name)
            if match and _is_abandoned(path, match[1], int(match[2])):
                # Another process may remove it too; Windows refuses to remove an open file
                with contextlib.suppress(FileNotFoundError, PermissionError):
                    path.unlink()


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
    return hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()
