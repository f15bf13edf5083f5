"""Commands that listen at a port, each in a process of its own."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


START = "import sys; from blip2_hf.cli import main; main(sys.argv[1:])"
LIMIT = 120  # seconds until a server answers


@contextmanager
def served(*arguments: str, ready: str = "", folder: Path | None = None) -> Iterator[str]:
    """Run `blip2-hf` with `--port` in a folder, and yield its address once it answers at the path `ready`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-c", START, *arguments, "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + LIMIT
    try:
        while not _answers(f"{address}/{ready}"):
            assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def _answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except urllib.error.URLError:
        return False
