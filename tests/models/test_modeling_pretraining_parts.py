"""Where stage 1 begins and where it goes: from a tower and a BERT, with the tower or without, into stage 2."""

import json
import runpy
import sys

import datasets
import pytest
import torch
import transformers
from paths import EXAMPLES
from stage1 import Processor, make_inputs, make_pairs, make_stage1
from tiny import (
    LANGUAGE_MODELS,
    QFORMER,
    assert_sees_the_whole,
    make_cropping_image_processor,
    make_image,
    make_pixel_values,
)

from blip2_hf import Blip2ForConditionalGeneration, Blip2ForPreTraining, Blip2Model
from blip2_hf.cli import main as run_command


EXAMPLE = EXAMPLES / "pretrain_stage1.py"


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    """Folders of a tower, of a BERT with its head and of one without, and a file of pictures."""
    folder = tmp_path_factory.mktemp("parts")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28}
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes, patch_size=14)).save_pretrained(folder / "tower")
    make_cropping_image_processor().save_pretrained(folder / "tower")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = transformers.BertConfig(vocab_size=30, **{n: QFORMER[n] for n in names}, max_position_embeddings=40)
    tokenizer = Processor().tokenizer
    for name, kind in {"bert": transformers.BertForMaskedLM, "headless": transformers.BertModel}.items():
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    make_pairs().to_parquet(folder / "pictures.parquet")
    return {name: str(folder / name) for name in ("tower", "bert", "headless", "pictures.parquet")}


@pytest.mark.parametrize("name", ["bert", "headless"])
def test_starts_from_bert(parts, name):
    model = Blip2ForPreTraining.from_encoders_pretrained(parts["tower"], parts[name], num_query_tokens=4)
    bert = transformers.BertForMaskedLM.from_pretrained(parts["bert"])
    config = model.config.qformer_config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (30, 22, 3)
    assert model.lm_head.decoder.weight is model.embeddings.word_embeddings.weight
    if name == "bert":
        assert torch.equal(model.embeddings.word_embeddings.weight, bert.bert.embeddings.word_embeddings.weight)
        transform = bert.cls.predictions.transform.dense.weight
        assert torch.equal(model.lm_head.transform.dense.weight, transform)
        layer, source = model.qformer.encoder.layer[1], bert.bert.encoder.layer[1]
        for copy in (layer.intermediate, layer.intermediate_query):
            assert torch.equal(copy.dense.weight, source.intermediate.dense.weight)
    # Words of BERT, not vectors from N(0, 0.02); tests/models/test_bert_weights.py has which ones
    words = bert.bert.embeddings.word_embeddings.weight + bert.bert.embeddings.position_embeddings.weight[0]
    if name == "bert":
        assert (words == model.query_tokens.weight[0, 0]).all(dim=1).sum() == 1
    assert model.temperature.weight.item() == pytest.approx(0.07)
    inputs = make_inputs(3)
    inputs["input_ids"] %= 22
    inputs["image_embeds"] = torch.randn(3, 5, 32)
    assert model(**inputs).loss.isfinite()


def test_without_its_tower(parts, tmp_path):
    whole = Blip2ForPreTraining.from_encoders_pretrained(parts["tower"], parts["bert"])
    model = Blip2ForPreTraining.from_encoders_pretrained(parts["tower"], parts["bert"], load_vision_tower=False)
    assert [name for name, _ in model.vision_model.named_parameters()] == [
        "post_layernorm.weight",
        "post_layernorm.bias",
    ]
    pixel_values = make_pixel_values(2)
    with pytest.raises(ValueError, match="no vision tower"):
        model.get_image_features(pixel_values)
    with torch.no_grad():
        model.vision_model.post_layernorm.weight.fill_(2.0)
    model.save_pretrained(tmp_path)
    loaded = Blip2ForPreTraining.from_pretrained(tmp_path)
    features = whole.get_image_embeds(pixel_values)
    expected = loaded.get_image_features(image_embeds=features).pooler_output
    loaded.attach_vision_tower(parts["tower"])
    torch.testing.assert_close(loaded.get_image_features(pixel_values).pooler_output, expected)
    assert {n for n, p in loaded.vision_model.named_parameters() if p.requires_grad} == {
        "post_layernorm.weight",
        "post_layernorm.bias",
    }


def test_a_tower_of_another_shape_is_refused(parts):
    model = Blip2ForPreTraining.from_encoders_pretrained(parts["tower"], parts["bert"], load_vision_tower=False)
    other = transformers.Dinov2Model(transformers.Dinov2Config(hidden_size=16, num_attention_heads=4, patch_size=14))
    with pytest.raises(ValueError, match="hidden_size"):
        model.attach_vision_tower(other)


@pytest.mark.parametrize("has_tower", [True, False])
def test_into_stage_2(parts, tmp_path, has_tower):
    stage1 = Blip2ForPreTraining.from_encoders_pretrained(
        parts["tower"], parts["bert"], load_vision_tower=has_tower, num_query_tokens=4
    )
    stage1.save_pretrained(tmp_path)
    language_model = transformers.AutoModelForCausalLM.from_config(LANGUAGE_MODELS["opt"]())
    if not has_tower:
        with pytest.raises(ValueError, match="give its vision_model"):
            Blip2ForConditionalGeneration.from_pretrained_parts(tmp_path, language_model)
    tower = None if has_tower else parts["tower"]
    model = Blip2ForConditionalGeneration.from_pretrained_parts(tmp_path, language_model, vision_model=tower)
    pixel_values = make_pixel_values(2)
    expected = Blip2Model.from_pretrained(tmp_path)
    if not has_tower:
        expected.attach_vision_tower(parts["tower"])
    actual = model.encode_image(pixel_values, None)[2].last_hidden_state
    torch.testing.assert_close(actual, expected(pixel_values).last_hidden_state)


@pytest.mark.parametrize(
    "changes, message",
    [({"use_qformer_text_input": False}, "use_qformer_text_input=True"), ({"bos_token_id": 64}, r"\[DEC\]")],
)
def test_sizes_that_stage_1_cannot_have(changes, message):
    config = make_stage1().config
    for name, value in changes.items():
        setattr(config.qformer_config, name, value)
    with pytest.raises(ValueError, match=message):
        Blip2ForPreTraining(config)


def run_example(monkeypatch, parts, data, folder, *options: str):
    fields = f"--vision_model {parts['tower']} --text_encoder {parts['bert']} --num_query_tokens 4 --image_size 28"
    length = "--max_steps 2 --warmup_steps 1 --per_device_train_batch_size 4 --held_out 4 --use_cpu --report_to none"
    arguments = ["--data", str(data), *fields.split(), *length.split(), "--output_dir", str(folder), *options]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    # At each end of a stream, for the sake of a process that ends
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    runpy.run_path(str(EXAMPLE), run_name="__main__")


@pytest.mark.parametrize("options", [(), ("--streaming",)], ids=["rows", "stream"])
def test_example_on_pictures(monkeypatch, parts, tmp_path, options):
    run_example(monkeypatch, parts, parts["pictures.parquet"], tmp_path / "run", *options)
    model = Blip2ForPreTraining.from_pretrained(tmp_path / "run")
    assert model.generate(pixel_values=make_pixel_values(2), max_new_tokens=3).shape[0] == 2
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "run")
    assert_sees_the_whole(processor.image_processor, 28)
    assert processor.tokenizer.bos_token_id == model.config.qformer_config.bos_token_id


@pytest.mark.parametrize("options", [(), ("--streaming",)], ids=["rows", "stream"])
def test_example_leaves_out_bad_rows(monkeypatch, parts, tmp_path, options, capsys):
    """A picture that can't be fetched stops the run by name or, with --skip_bad_rows, is listed by its row."""
    files = []
    for number in range(12):
        files.append(str(tmp_path / f"{number}.png") if number not in (2, 7) else "http://a..b/x.png")
        make_image(number).save(tmp_path / f"{number}.png")
    data = tmp_path / "broken.parquet"
    datasets.Dataset.from_dict({"image": files, "caption": make_pairs(12)["caption"][:]}).to_parquet(data)
    options = (*options, "--validation", parts["pictures.parquet"], "--save_strategy", "no", "--max_steps", "6")
    with pytest.raises(SystemExit, match=r"row \d.*'http://a..b/x.png'"):
        run_example(monkeypatch, parts, data, tmp_path / "run", *options)
    capsys.readouterr()
    run_example(monkeypatch, parts, data, tmp_path / "run", *options, "--skip_bad_rows")
    printed = capsys.readouterr().out
    assert "No bad rows." in printed
    listed = tmp_path / "run" / "bad_rows-train.jsonl"
    if "--streaming" not in options:
        assert "2 bad rows: 2 picture unreadable." in printed
        assert [json.loads(line)["row"] for line in listed.read_text().splitlines()] == [2, 7]
    assert Blip2ForPreTraining.from_pretrained(tmp_path / "run").config.has_vision_tower


def test_example_refuses_to_validate_on_what_it_learns_from(monkeypatch, parts, tmp_path):
    data = parts["pictures.parquet"]
    with pytest.raises(SystemExit, match="which is what is learned from"):
        run_example(monkeypatch, parts, data, tmp_path / "run", "--validation", str(data))


def test_example_on_stored_features(monkeypatch, parts, tmp_path):
    run_command(
        ["cache-features", parts["pictures.parquet"], "--vision-model", parts["tower"], "--size", "28", "--views", "2"]
        + ["--output", str(tmp_path / "features")]
    )
    stored = json.loads((tmp_path / "features" / "cache.json").read_text())["image_processor"]
    assert_sees_the_whole(transformers.BitImageProcessorPil.from_dict(stored), 28)
    with pytest.raises(SystemExit, match="made of pictures of 28x28 pixels, but image_size is 42"):
        run_example(monkeypatch, parts, tmp_path / "features", tmp_path / "other", "--image_size", "42")
    assert not (tmp_path / "other").exists()
    run_example(monkeypatch, parts, tmp_path / "features", tmp_path / "run")
    model = Blip2ForPreTraining.from_pretrained(tmp_path / "run")
    assert not model.config.has_vision_tower
    model.attach_vision_tower(parts["tower"])
    assert model.get_image_features(make_pixel_values(2)).pooler_output.shape == (2, 4, 256)
