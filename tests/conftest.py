import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers


torch.set_num_threads(2)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def likeliest_negatives(monkeypatch):
    """Hard negatives without chance: the likeliest is drawn."""
    monkeypatch.setattr(torch, "multinomial", lambda weights, *args, **kwargs: weights.argmax(-1, keepdim=True))
