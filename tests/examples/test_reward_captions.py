"""`examples/reward_captions.py` with a tiny captioner: the table has what was measured."""

import json

import pytest
import torch
from paths import EXAMPLES
from processes import run_script
from tiny import NUM_QUERIES, make_image_processor, make_model, make_tokenizer

from blip2_hf import Blip2ForConditionalGeneration, Blip2Processor


pytest.importorskip("trl")


def test_a_table_and_models_of_each_seed(tmp_path):
    torch.manual_seed(0)
    processor = Blip2Processor(make_image_processor(), make_tokenizer(), num_query_tokens=NUM_QUERIES)
    make_model("llama", image_token_index=processor.image_token_id).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    options = ["--model", "model", "--output", "out", "--seeds", "0", "1", "--steps", "1", "--test", "3"]
    printed = run_script(EXAMPLES / "reward_captions.py", *options, folder=tmp_path).stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results) == {"before", "seed 0", "seed 1"}
    for seed in (0, 1):
        row = results[f"seed {seed}"]
        assert f"| seed {seed} | {row['reward, first steps']:.2f} |" in printed
        assert row["reward, first steps"] == row["reward, last steps"] and 0 <= row["right (%)"] <= 100
    before, after = (Blip2ForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("model", "out/seed0"))
    assert before.config.num_query_tokens == after.config.num_query_tokens
