"""Predictions that an earlier run has left are read, or an error names the file and the line."""

import pytest
from accelerate import PartialState

from blip2_hf.evaluation.prediction_store import PredictionStore
from blip2_hf.jobs.errors import StateFileError


@pytest.mark.parametrize("line", ["5", "[1]", '{"a": 1}', '["x", "y"]', "[true, 1]", "[1, 2, 3]", "null"])
def test_a_line_of_another_shape_is_named(line, tmp_path):
    store = PredictionStore(tmp_path, {}, PartialState(cpu=True))
    with store.open() as add:
        add([3, "a dog"])
    assert store.read() == {3: "a dog"}
    path = tmp_path / "part-00000.jsonl"
    path.write_text(f'[3, "a dog"]\n{line}\n')
    with pytest.raises(
        StateFileError, match=r"part-00000.jsonl, line 2: \[number, prediction\] was expected, got .*Delete the file"
    ):
        store.read()
