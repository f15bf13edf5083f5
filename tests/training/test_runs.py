"""The pieces that commands and scripts share: pairs to learn from, the table of samples, what is saved."""

import datasets
import pytest
import torch
from stage2 import make_arguments
from tiny import make_image, make_model, make_processor

from blip2_hf import Blip2ForConditionalGeneration
from blip2_hf.data import ImageTextPairs, ImageTextStream, LanguageModelCollator, RandomResizedCropAndFlip
from blip2_hf.evaluation import GeneratedTextMetrics
from blip2_hf.training import SampleTable, make_trainer, save_result, training_pairs, without_bad_rows


def make_rows(texts: list) -> datasets.Dataset:
    rows = {"image": [make_image(i) for i in range(len(texts))], "caption": texts}
    rows["question"] = [f"what is it {i}?" for i in range(len(texts))]
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def test_pairs_to_learn_from():
    rows = make_rows(["a dog", "grass"])
    pairs = training_pairs(rows, 14, seed=3, prompt="a photo of")
    assert isinstance(pairs, ImageTextPairs) and isinstance(pairs.transform, RandomResizedCropAndFlip)
    assert (pairs[0]["image"].size, pairs[0]["prompt"], pairs.seed) == ((14, 14), "a photo of", 3)
    stream = training_pairs(rows.to_iterable_dataset(), 14)
    assert isinstance(stream, ImageTextStream) and stream.repeat
    columns = {"image_embeds": [b""], "image_embeds_shape": [[1, 1, 1]], "image_embeds_dtype": ["float32"]}
    features = datasets.Dataset.from_dict(columns | {"caption": ["a dog"]})
    assert training_pairs(features, 14).transform is None


def test_bad_rows_are_left_out_of_each_part(tmp_path, capsys):
    parts = {"train": ImageTextPairs(make_rows(["a dog", ""])), "validation": None}
    kept = without_bad_rows(parts, lambda rows: None, str(tmp_path))
    assert len(kept["train"]) == 1 and kept["validation"] is None
    assert "text empty" in (tmp_path / "bad_rows-train.jsonl").read_text()
    assert "1 bad row" in capsys.readouterr().out


@pytest.mark.parametrize("prompt", ["a photo of", "Question: {} Answer:"])
def test_a_table_of_eight_samples(prompt, tmp_path):
    column = "question" if "{}" in prompt else None
    texts = [["a | dog", "a cat", "a cow"], *([f"text {i}"] for i in range(1, 20))]
    pairs = ImageTextPairs(make_rows(texts), train=False, prompt=prompt, prompt_column=column)
    metrics = GeneratedTextMetrics(make_processor(), pairs)
    metrics.predictions = [f"said {i}\nagain" for i in range(20)]
    heading, _, names, rule, *lines = SampleTable(pairs, metrics).describe("Step 3").splitlines()
    assert heading == "## Step 3" and len(lines) == 8 and rule.count("---") == names.count("|") - 1
    assert ("question" in names) == ("Question: what is it 0? Answer:" in lines[0]) == (column is not None)
    # Two references at most, and nothing that would end a cell or a line
    assert lines[0].startswith("| row 0 |") and r"| a \| dog / a cat | said 0 again |" in lines[0]
    assert lines[-1].startswith("| row 17 |") and "| text 17 | said 17 again |" in lines[-1]


def test_samples_are_of_different_pictures():
    rows = make_rows([f"text {i}" for i in range(10)])
    pairs = ImageTextPairs(rows.select([row for row in range(10) for _ in range(5)]), train=False, prompt="a photo of")
    assert SampleTable(pairs, GeneratedTextMetrics(make_processor(), pairs)).rows == [0, 6, 12, 18, 25, 31, 37, 43]
    few = ImageTextPairs(rows.select([0, 1, 2] * 8), train=False, prompt="a photo of")
    assert SampleTable(few, GeneratedTextMetrics(make_processor(), few)).rows == [0, 1, 2]


def test_what_is_saved_takes_the_place_of_another_kind(tmp_path):
    """A whole model, then adapters, then a whole model: never two in one folder."""
    pairs = ImageTextPairs(make_rows(["a dog", "grass", "a red bus", "the sky"]), prompt="a photo of")
    processor = make_processor()

    def train(**options):
        arguments = make_arguments(tmp_path, max_steps=1, **options)
        trainer = make_trainer(make_model(), processor, arguments, pairs, None, LanguageModelCollator(processor))
        trainer.train()
        return trainer

    save_result(train(preset="projection"))
    assert (tmp_path / "config.json").exists()
    trainer = train(preset="lora_language_model")
    save_result(trainer)
    assert (tmp_path / "adapter_config.json").exists() and not (tmp_path / "config.json").exists()
    adapted = trainer.model.get_base_model().language_model.model.decoder.layers[0].self_attn.q_proj
    expected = (adapted.base_layer.weight + adapted.get_delta_weight("default")).detach()
    assert not torch.equal(expected, adapted.base_layer.weight)
    save_result(trainer, merge=True)
    assert (tmp_path / "config.json").exists() and not (tmp_path / "adapter_config.json").exists()
    merged = Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(merged.language_model.model.decoder.layers[0].self_attn.q_proj.weight, expected)
