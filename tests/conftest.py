import os
import shutil
import signal
import sys
import tempfile


# Nobody's own cache, and one for each process of pytest-xdist
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="blip2_hf-tests-")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# In the processes that tests start, too: with matrices this small, threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
import transformers
from transformers.models.auto.image_processing_auto import AutoImageProcessor


# Without torchvision, transformers 5.17 has the class by its own module alone, which snippets need not know
sys.modules["transformers"].AutoImageProcessor = AutoImageProcessor  # it also replaces itself when that is imported
# A shell lets what it starts in the background ignore Ctrl-C, which tests send
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def likeliest_negatives(monkeypatch):
    """Draw hard negatives without chance: the likeliest is taken."""
    monkeypatch.setattr(torch, "multinomial", lambda weights, *args, **kwargs: weights.argmax(-1, keepdim=True))
