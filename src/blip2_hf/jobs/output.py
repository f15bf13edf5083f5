"""An output that one run writes to at a time, its processes together, and that is there at the end."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import BaseFileLock, FileLock, Timeout
from transformers.utils import logging

from .errors import OutputInUseError, OutputLostError


if TYPE_CHECKING:
    from accelerate import PartialState

logger = logging.get_logger(__name__)

_Result = TypeVar("_Result")

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)  # of some network file systems


@contextlib.contextmanager
def only_writer(
    lock: str | os.PathLike, output: Any, state: "PartialState | None" = None, wait: float = 0
) -> Iterator[None]:
    """
    Keep other runs from an output: an [`OutputInUseError`], in all processes, if another run is writing to it. The
    system lifts the lock if the process is killed. `lock` is a hidden file, in or beside the output, which stays. The
    processes of `state` all call this, and the first one locks. `wait` is how many seconds to wait for another run.
    """
    file = FileLock(lock)
    if state is None:
        _acquire(file, output, wait)
    else:
        of_first(lambda: _acquire(file, output, wait), state)
    try:
        yield
    finally:
        file.release()


def of_first(function: Callable[[], _Result], state: "PartialState") -> _Result:
    """
    Call a function in the first process, and return its result, or raise its error, in all. What is found in an output
    may differ between machines, because a network file system shows new files some seconds later to others.
    """
    answer: list[Any] = [None, None]
    if state.is_main_process:
        try:
            answer[0] = function()
        except Exception as error:
            # The other processes would wait for ever
            answer[1] = error
    if state.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        answer = broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def _acquire(file: BaseFileLock, output: Any, wait: float):
    """Lock an output."""
    try:
        Path(file.lock_file).parent.mkdir(parents=True, exist_ok=True)
        file.acquire(timeout=wait)
    except Timeout:
        raise OutputInUseError(
            f"Another run is writing to {output}: it holds {file.lock_file}. Wait until it has ended, or give another "
            "output."
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        logger.warning(f"The file system of {file.lock_file} has no locks: let no other run write to {output}.")


def format_size(size: float) -> str:
    """Return a number of bytes as people read it, such as `4.7 MB`."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:  # which would be shown as 1e+03
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


def share(items: Sequence, state: "PartialState") -> Sequence:
    """Return what this process does of the work: every n-th item, if there are n processes."""
    return items[state.process_index :: state.num_processes]


def tell_share(state: "PartialState") -> str:
    """Return what a message says of the processes, behind the amount of work."""
    return (
        "" if state.num_processes == 1 else f" in {state.num_processes} processes, of which this one shows its share"
    )


def check_still_there(paths: Iterable[str | os.PathLike], output: Any):
    """Refuse to call a job done whose files are gone, as when their folder was deleted meanwhile."""
    missing = [Path(path) for path in paths if not Path(path).exists()]
    if missing:
        more = f" and {len(missing) - 1:,} others" if len(missing) > 1 else ""
        raise_lost(output, f"{missing[0]}{more} were written and are not there any more")


def raise_lost(output: Any, what: str):
    """Raise the error of results that are gone."""
    raise OutputLostError(
        f"{output} was deleted or changed while this run wrote to it: {what}. Run the same command again, which makes "
        "what is missing."
    )
