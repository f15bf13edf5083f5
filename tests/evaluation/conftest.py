import pytest
import torch
from tiny import make_model, make_processor


@pytest.fixture(scope="module")
def opt():
    """A captioner and its processor."""
    torch.manual_seed(0)
    return make_model(), make_processor()
