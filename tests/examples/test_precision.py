"""examples/precision.py: what is measured, and what follows from it."""

import pytest
import torch
from tiny_examples import tiny_examples


@pytest.fixture
def precision(tmp_path):
    """The script, imported by its name, with nothing measured yet."""
    with tiny_examples(tmp_path):
        import precision

        yield precision


@pytest.mark.parametrize("faster", [torch.float32, torch.bfloat16])
def test_what_a_cpu_multiplies_fastest_in(precision, monkeypatch, faster):
    monkeypatch.setattr(precision, "_seconds_of_product", lambda dtype: 1.0 if dtype == faster else 2.0)
    assert precision.fast_dtype() == faster
    with precision.fast_autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == faster
    assert precision.computed_in()["dtype"] == str(faster).removeprefix("torch.")


@pytest.mark.parametrize("faster", ["eager", "sdpa"])
def test_what_a_cpu_attends_fastest_with(precision, monkeypatch, faster):
    measured = []

    def seconds(attend):
        measured.append(attend)
        return 1.0 if (attend is precision._plain_attention) == (faster == "eager") else 2.0

    monkeypatch.setattr(precision, "_seconds_of_attention", seconds)
    assert precision.training_attention() == faster
    times = len(measured)
    assert times >= 2 and precision.training_attention() == faster
    assert len(measured) == times  # once


def test_what_is_measured_is_attention(precision):
    query, key, value = torch.randn(3, 2, 4, 5, 8).unbind()
    mask = torch.zeros(2, 1, 5, 5).masked_fill(torch.rand(2, 1, 5, 5) < 0.3, -1e4)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(precision._plain_attention(query, key, value, mask), expected)
    assert precision.training_attention() in ("eager", "sdpa")


def test_a_gpu_attends_by_the_fused_kernel(precision, monkeypatch):
    monkeypatch.setattr(precision, "device_type", lambda: "cuda")
    monkeypatch.setattr(precision, "_seconds_of_attention", None)
    assert precision.training_attention() == "sdpa"
