"""Ctrl-C while pictures are fetched: the first ends a command, whichever process or thread fetches."""

import os
import signal
import subprocess
import sys
import time

import pytest
from paths import HELPERS
from picture_server import picture_server


# What `blip2-hf caption` does, without its model on the disk
CODE = """
import datasets, sys, torch
from tiny import make_model, make_processor
from blip2_hf.captioning import RowPictures, caption_images
from blip2_hf.cli._common import processes

torch.set_num_threads(1)
url, num_workers = sys.argv[1:]
pictures = RowPictures(datasets.Dataset.from_dict({"image": [url] * 8}), "image", ["127.0.0.1"])
with processes("cpu"):
    list(caption_images(make_model(), make_processor(), pictures, batch_size=1, num_workers=int(num_workers)))
"""


@pytest.mark.parametrize("num_workers, reaches", [("0", "all processes"), ("2", "the main process")])
def test_the_first_interrupt_ends_a_command_that_fetches(num_workers, reaches):
    with picture_server() as server:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HELPERS), *sys.path])}
        process = subprocess.Popen(
            [sys.executable, "-c", CODE, f"{server.url}/silent", num_workers],
            env=environment,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 120
        while server.connections < max(1, int(num_workers)) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        time.sleep(0.2)
        start = time.monotonic()
        (os.killpg if reaches == "all processes" else os.kill)(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert time.monotonic() - start < 8  # without help a DataLoader waits 5 seconds for each worker, a thread 30
        assert process.returncode == 130, errors
        assert "Interrupted. What is finished is kept" in output and "Traceback" not in errors
