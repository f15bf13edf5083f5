"""
Check this library on a GPU, and measure it there, in one command that ends within eight minutes.

    python benchmarks/gpu.py                                # on a GPU at full size, without one at tiny sizes
    python benchmarks/gpu.py --parts stage1 tests --add     # some of the parts, into the same table
    python benchmarks/gpu.py --small --output small         # tiny sizes, into small.json and small.md

Nothing is downloaded: all weights are random. Correctness comes first, then speed and memory against the baselines of
the other benchmarks. The table is written anew after each part, so that a run that is stopped keeps what it has. If a
part fails, the JSON has its traceback, and the others go on. With tiny sizes, times say nothing.
"""

import argparse
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path


STARTED = time.monotonic()

import gpu_correctness  # noqa: E402
import gpu_speed  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from gpu_rows import Row, Setting, failed, free_memory  # noqa: E402


# Each part, and the most seconds that it may take at full size
PARTS: dict[str, tuple[Callable[[Setting], Iterator[Row]], float]] = {
    "tests": (gpu_correctness.tests, 90),
    "attention": (gpu_correctness.attention, 90),
    "precision": (gpu_correctness.precision, 40),
    "waiting": (gpu_correctness.waiting, 40),
    "pinned": (gpu_correctness.pinned, 20),
    "offloading": (gpu_correctness.offloading, 30),
    "quantized": (gpu_correctness.quantized, 40),
    "matmul": (gpu_speed.matmul, 20),
    "stage2": (gpu_speed.stage2_steps, 90),
    "captions": (gpu_speed.captions, 140),
    "reranking": (gpu_speed.reranking, 30),
    "cache": (gpu_speed.feature_cache, 40),
    "large_batch": (gpu_speed.large_batch, 90),
    "stage1": (gpu_speed.stage1_steps, 150),
    "compiling": (gpu_correctness.compiling, 150),
}


# A signal is lost if Python is in a callback that drops exceptions, so it comes again after these seconds
AGAIN = 10.0


class OutOfTime(BaseException):
    """Ends a part. Not an `Exception`, which a part would take for a failure of its own."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    names = ", ".join(PARTS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=names)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny models and batches; always on a CPU")
    parser.add_argument("--seconds", type=float, default=480, help="after which no part begins or goes on")
    parser.add_argument("--output", type=Path, default=Path("gpu"), help="name of the files, without .json and .md")
    parser.add_argument("--add", action="store_true", help="keep other parts that the files have, if they are there")
    return parser.parse_args()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_):
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_part(name: str, setting: Setting, seconds: float) -> list[Row]:
    """Return the rows of a part, those before a failure too."""
    rows: list[Row] = []
    function, limit = PARTS[name]
    if seconds <= 0:
        return [Row(name, note="skipped: out of time")]
    try:
        with time_limit(min(seconds, limit) if setting.is_cuda else seconds):
            for row in function(setting):
                rows.append(row)
                print(f"  {as_line(row)}", flush=True)
        return rows
    except OutOfTime:
        rows.append(Row(name, note="skipped: out of time"))
    except Exception as error:
        rows.append(failed(name, error))
    print(f"  {as_line(rows[-1])}", flush=True)
    return rows


def as_cell(value: float | str | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.4g}"


def as_line(row: Row) -> str:
    passed = {None: "", True: "passed", False: "FAILED"}[row.passed]
    cells = [row.name, as_cell(row.here), as_cell(row.baseline), as_cell(row.ratio), passed, row.note]
    return " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells)


def environment(setting: Setting) -> dict[str, str | bool]:
    return {
        "device": torch.cuda.get_device_name() if setting.is_cuda else f"CPU, {torch.get_num_threads()} threads",
        "small": setting.is_small,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def write(path: Path, report: dict):
    """Write the table as JSON and as Markdown, each in one step."""
    lines = [", ".join(f"{name}: {value}" for name, value in report["environment"].items()), ""]
    lines += ["| | here | baseline | ratio | | |", "|---|---|---|---|---|---|"]
    for part, found in report["parts"].items():
        lines.append(f"| **{part}**, {found['seconds']:.0f} s | | | | | |")
        lines += [f"| {as_line(Row(**row))} |" for row in found["rows"]]
    for ending, text in ((".json", json.dumps(report, indent=1)), (".md", "\n".join(lines) + "\n")):
        new = path.with_name(path.name + ending + ".new")
        new.write_text(text)
        new.replace(path.with_name(path.name + ending))


def is_broken(setting: Setting) -> bool:
    """Tell whether an error has left the GPU in a state in which this process cannot use it."""
    try:
        if setting.is_cuda:
            torch.cuda.synchronize()
        return False
    except RuntimeError:
        return True


def go_on_in_new_process(parts: list[str], arguments: argparse.Namespace, seconds: float):
    command = [sys.executable, __file__, "--add", "--device", arguments.device, "--output", str(arguments.output)]
    command += ["--seconds", str(seconds), *(["--small"] if arguments.small else []), "--parts", *parts]
    os.execv(sys.executable, command)


def main():
    arguments = parse_arguments()
    setting = Setting(arguments.device, arguments.small or arguments.device == "cpu")
    if not setting.is_cuda:
        torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    report = {"environment": environment(setting), "parts": {}}
    path = arguments.output.with_name(arguments.output.name + ".json")
    if arguments.add and path.exists():
        before = json.loads(path.read_text())
        if before["environment"] != report["environment"]:
            sys.exit(f"{path} was made with {before['environment']}, and this is {report['environment']}.")
        report = before
    for index, name in enumerate(arguments.parts):
        print(name, flush=True)
        begun = time.monotonic()
        rows = run_part(name, setting, STARTED + arguments.seconds - begun)
        report["parts"][name] = {"seconds": time.monotonic() - begun, "rows": [asdict(row) for row in rows]}
        write(arguments.output, report)
        if is_broken(setting):
            left = arguments.parts[index + 1 :]
            if left:
                go_on_in_new_process(left, arguments, STARTED + arguments.seconds - time.monotonic())
            break
        free_memory()
    found = [row for part in report["parts"].values() for row in part["rows"]]
    failures = [row["name"] for row in found if row["passed"] is False]
    print(f"{len(found)} rows, {len(failures)} failed; {arguments.output}.json and {arguments.output}.md")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
