"""`blip2-hf convert`, from files of LAVIS and folders of transformers to ours and back."""

import json
import os
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from instructblip_video import save_instructblip_video
from lavis_cases import FIXTURES, NEWLINE, opt_processor
from lavis_shapes import eva_shapes, linear, of_tower, qformer_shapes, random_state_dict
from safetensors.torch import load_file, save_file
from stage1 import make_stage1
from theirs import inputs, make_theirs
from tiny import LANGUAGE_MODELS, NUM_QUERIES, QFORMER, VISION, VOCAB_SIZE, make_image, make_processor, randomize

import blip2_hf
from blip2_hf.cli import convert as command
from blip2_hf.cli import main
from blip2_hf.convert import load_instructblip_checkpoint, load_lavis_checkpoint, save_instructblip_checkpoint, towers
from blip2_hf.convert.folders import load_checkpoint
from blip2_hf.convert.processors import image_processor_of_size


def convert(source, output, *options):
    main(["convert", str(source), "--output", str(output), *map(str, options)])


def same_weights(first, second) -> bool:
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    """A folder with a tiny OPT and LAVIS's tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("opt")
    config = LANGUAGE_MODELS["opt"]()
    config.vocab_size = 432
    randomize(transformers.OPTForCausalLM(config)).save_pretrained(folder)
    tokenizer = opt_processor().tokenizer
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lavis(tmp_path_factory):
    """A file of LAVIS with its tower, as wide as the real one, that a projection to OPT follows."""
    torch.manual_seed(1)
    shapes = of_tower(eva_shapes(1408, layers=1, side=3)) | linear("opt_proj", 64, 32)
    shapes |= qformer_shapes(64, layers=2, every=2, tower_width=1408, text=False)
    path = tmp_path_factory.mktemp("lavis") / "blip2_caption.pth"
    torch.save({"model": random_state_dict(shapes), "epoch": 3}, path)
    return path


def test_a_file_of_lavis_becomes_one_of_ours(lavis, opt, tmp_path, capsys):
    convert(lavis, tmp_path / "out", "--language-model", opt)
    printed = capsys.readouterr().out
    assert "visual_encoder.blocks.*.attn.q_bias -> vision_model.encoder.layers.*.self_attn.qkv.bias" in printed
    assert 'epoch: beside "model", which alone is read' in printed
    assert "Blip2ForConditionalGeneration for pictures of 42 pixels" in printed
    expected = load_lavis_checkpoint(lavis, language_model=opt)
    model = blip2_hf.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert same_weights(model, expected)
    assert model.generation_config.eos_token_id == NEWLINE
    assert os.listdir(tmp_path) == ["out"]
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(processor) is blip2_hf.Blip2Processor
    assert processor.num_query_tokens == 5 and processor.end_token_id == NEWLINE
    assert not processor.is_encoder_decoder and model.config.image_token_index == processor.image_token_id
    batch = processor(images=make_image(), text="a photo", return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=3).shape[1] > batch["input_ids"].shape[1]


def test_pictures_are_scaled_as_lavis_does():
    picture = make_image(size=(80, 30))
    pixels = np.asarray(picture.resize((42, 42), resample=3), dtype=np.float32) / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    expected = torch.tensor((pixels - mean) / std).permute(2, 0, 1).float()
    found = image_processor_of_size(42)(images=[picture], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_file_of_lavis_becomes_one_of_transformers_and_comes_back(lavis, opt, tmp_path):
    convert(lavis, tmp_path / "theirs", "--language-model", opt, "--transformers")
    theirs, info = transformers.Blip2ForConditionalGeneration.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not any(info.values()), info
    assert json.loads((tmp_path / "theirs" / "processor_config.json").read_text())["processor_class"] == (
        "Blip2Processor"
    )
    convert(tmp_path / "theirs", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "again", "--transformers")
    again = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert same_weights(again, theirs)
    first = transformers.Blip2Processor.from_pretrained(tmp_path / "theirs")
    picture = {"images": make_image(), "text": "a photo", "return_tensors": "pt"}
    batch = first(**picture)
    second = transformers.Blip2Processor.from_pretrained(tmp_path / "again")(**picture)
    ours = blip2_hf.Blip2Processor.from_pretrained(tmp_path / "ours")(**picture)
    for name in batch:
        assert torch.equal(batch[name], second[name]) and torch.equal(batch[name], ours[name])


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_transformers_to_ours_and_back_is_the_same(name, tmp_path, capsys):
    theirs = make_theirs(name)
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    assert "No processor is written" in capsys.readouterr().out
    convert(tmp_path / "ours", tmp_path / "back", "--transformers")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "back"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    back = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        batch = inputs() | ({"decoder_input_ids": torch.tensor([[1], [1]])} if name == "t5" else {})
        torch.testing.assert_close(back(**batch).logits, theirs(**batch).logits)


def test_retrieval_to_transformers_and_back(tmp_path, capsys):
    torch.manual_seed(0)
    stage1 = make_stage1()
    stage1.save_pretrained(tmp_path / "stage1")
    convert(tmp_path / "stage1", tmp_path / "theirs", "--transformers")
    assert "temperature, lm_head" in capsys.readouterr().out
    theirs, info = transformers.Blip2ForImageTextRetrieval.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not any(info.values()), info
    convert(tmp_path / "theirs", tmp_path / "ours")
    model, left = load_checkpoint(tmp_path / "ours")
    assert type(model) is blip2_hf.Blip2ForImageTextRetrieval and left == []
    own = stage1.state_dict()
    for name, tensor in model.state_dict().items():
        assert name == "temperature.weight" or torch.equal(tensor, own[name]), name


@torch.no_grad()
def test_a_flan_t5_keeps_its_own_head_and_gets_the_exact_gelu(tmp_path):
    torch.manual_seed(0)
    t5 = randomize(transformers.T5ForConditionalGeneration(LANGUAGE_MODELS["t5"]()))
    weights = {name: tensor.clone() for name, tensor in t5.state_dict().items() if "embed_tokens" not in name}
    weights["lm_head.weight"] = torch.randn_like(weights["lm_head.weight"])
    t5.save_pretrained(tmp_path / "t5")
    save_file(weights, tmp_path / "t5" / "model.safetensors", metadata={"format": "pt"})
    make_processor(is_encoder_decoder=True).tokenizer.save_pretrained(tmp_path / "t5")
    shapes = of_tower(eva_shapes(1408, layers=1, side=2)) | linear("t5_proj", 64, 32)
    shapes |= qformer_shapes(64, layers=1, every=2, tower_width=1408, text=False)
    torch.save(random_state_dict(shapes), tmp_path / "blip2_caption_flant5.pth")
    for folder, options in (("ours", []), ("theirs", ["--transformers"])):
        convert(
            tmp_path / "blip2_caption_flant5.pth", tmp_path / folder, "--language-model", tmp_path / "t5", *options
        )
        model, _ = load_checkpoint(tmp_path / folder)
        assert torch.equal(model.language_model.lm_head.weight, weights["lm_head.weight"])
        assert torch.equal(model.language_model.shared.weight, weights["shared.weight"])
        assert model.config.text_config.dense_act_fn == "gelu"
        assert blip2_hf.Blip2Processor.from_pretrained(tmp_path / folder).is_encoder_decoder


# Stage 1


@pytest.fixture(scope="module")
def stage1_file(tmp_path_factory):
    """Without its tower, which was frozen."""
    torch.manual_seed(2)
    head = "Qformer.cls.predictions"
    shapes = qformer_shapes(64, layers=2, every=2, tower_width=1408, text=True)
    shapes |= {"temp": (), "Qformer.bert.embeddings.word_embeddings.weight": (188, 64), f"{head}.bias": (188,)}
    shapes |= linear(f"{head}.transform.dense", 64, 64) | linear("vision_proj", 64, 16) | linear("text_proj", 64, 16)
    shapes |= {f"{head}.transform.LayerNorm.{kind}": (64,) for kind in ("weight", "bias")} | linear("itm_head", 64, 2)
    path = tmp_path_factory.mktemp("stage1") / "blip2_pretrained.safetensors"
    save_file(random_state_dict(shapes), path)
    return path


@pytest.fixture
def eva_file(tmp_path, monkeypatch):
    """The tower's own file: a block that is taken and the last, which is not."""
    monkeypatch.setitem(towers.DEPTHS, (False, 1408), 1)
    (tmp_path / "parts").mkdir()
    path = tmp_path / "parts" / "eva_vit_g.pth"
    torch.save(random_state_dict(eva_shapes(1408, layers=2, side=3)), path)
    return path


@pytest.fixture
def bert(tmp_path):
    tokenizer = transformers.BertTokenizer(str(FIXTURES / "tokenizers" / "bert" / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "parts" / "bert")
    return tmp_path / "parts" / "bert"


def test_stage1_with_the_file_of_its_tower(stage1_file, eva_file, bert, tmp_path, capsys):
    output = tmp_path / "out"
    convert(stage1_file, output, "--vision-model", eva_file, "--tokenizer", bert, "--image-size", 56)
    printed = capsys.readouterr().out
    assert "file of the vision tower:" in printed and "LAVIS takes the output of block 0" in printed
    model, left = load_checkpoint(output)
    assert type(model) is blip2_hf.Blip2ForPreTraining and left == []
    expected = load_lavis_checkpoint(stage1_file, vision_model=eva_file)
    differing = {
        name for name, tensor in expected.state_dict().items() if not torch.equal(tensor, model.state_dict()[name])
    }
    assert differing == {"vision_model.embeddings.position_embedding"}
    assert model.config.vision_config.image_size == 56
    processor = blip2_hf.Blip2Processor.from_pretrained(output)
    assert processor.tokenizer.bos_token == "[DEC]"
    assert processor.tokenizer.bos_token_id == model.config.qformer_config.bos_token_id == 187
    batch = processor(images=make_image(), text="a dog", return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 56, 56)
    with torch.no_grad():
        pixel_values = batch["pixel_values"]
        torch.testing.assert_close(model.get_image_embeds(pixel_values), expected.get_image_embeds(pixel_values))
        assert model(**batch, return_loss=False).logits_per_image.shape == (1, 1)


def test_a_tokenizer_that_cannot_be_had_or_is_another(stage1_file, eva_file, bert, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_BERT", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="no tokenizer comes from .*nowhere: give one as --tokenizer"):
        convert(stage1_file, tmp_path / "out", "--vision-model", eva_file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(bert)
    with pytest.raises(SystemExit, match="begins texts with token 187, and this tokenizer with 188"):
        convert(stage1_file, tmp_path / "out", "--vision-model", eva_file, "--tokenizer", bert)
    assert not (tmp_path / "out").exists()


def test_parts_that_are_missing_are_asked_for(stage1_file, lavis, tmp_path):
    with pytest.raises(SystemExit, match="blip2-hf: The vision tower .*eva_vit_g.pth"):
        convert(stage1_file, tmp_path / "out")
    with pytest.raises(SystemExit, match="blip2-hf: The language model .*by its width, 32: none"):
        convert(lavis, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# What is written


def test_shards_and_precision(lavis, opt, tmp_path):
    options = ["--language-model", opt, "--dtype", "bfloat16", "--max-shard-size", "8MB"]
    convert(lavis, tmp_path / "out", *options)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1 and (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert not list((tmp_path / "out").glob("*.bin"))
    assert {tensor.dtype for name in shards for tensor in load_file(tmp_path / "out" / name).values()} == {
        torch.bfloat16
    }
    model = blip2_hf.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "out")
    expected = load_lavis_checkpoint(lavis, language_model=opt).bfloat16()
    assert same_weights(model.bfloat16(), expected)


@pytest.fixture
def model_folder(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "theirs"
    make_theirs("opt").save_pretrained(folder)
    return folder


def test_nothing_half_written_is_left(model_folder, tmp_path, monkeypatch):
    def fail(self, folder, **kwargs):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    convert(model_folder, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr(blip2_hf.Blip2ForConditionalGeneration, "save_pretrained", fail)
    for options in (["out", "--overwrite"], ["new"]):
        with pytest.raises(SystemExit, match="disk full"):
            convert(model_folder, tmp_path / options[0], *options[1:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "theirs"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_what_is_there_is_refused_or_replaced(model_folder, tmp_path):
    output = tmp_path / "out"
    convert(model_folder, output)
    with pytest.raises(SystemExit, match="is there already.*--overwrite"):
        convert(model_folder, output)
    (output / "stale").write_text("")
    convert(model_folder, output, "--overwrite", "--transformers")
    assert not (output / "stale").exists()
    assert json.loads((output / "config.json").read_text())["model_type"] == "blip-2"
    (output / "README.md").write_text("mine")
    (output / "parts").mkdir()
    (output / "parts" / "blip2.pth").write_text("")
    for source in (output, output / "parts" / "blip2.pth"):
        with pytest.raises(SystemExit, match=f"{source} would be replaced by what is made of it"):
            convert(source, output, "--overwrite")
    assert (output / "README.md").read_text() == "mine"
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "cat.png").write_text("")
    with pytest.raises(SystemExit, match="not the folder of a model"):
        convert(model_folder, pictures, "--overwrite")
    assert (pictures / "cat.png").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pictures", "theirs"]


def files_dtypes(folder) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_each_weight_of_a_folder_stays_as_it_is(name, tmp_path):
    make_theirs(name).half().save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", "--transformers")
    for folder in ("ours", "back"):
        assert set(files_dtypes(tmp_path / folder).values()) == {torch.float16}
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "back"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_each_weight_of_shards_in_two_precisions_stays_as_it_is(tmp_path):
    """float32 beside bfloat16, which transformers would load as bfloat16."""
    model = load_model_of_two_precisions(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "mixed", max_shard_size="50KB")
    assert len(list((tmp_path / "mixed").glob("*.safetensors"))) > 1
    convert(tmp_path / "mixed", tmp_path / "again")
    weights = load_file(tmp_path / "again" / "model.safetensors")
    own = model.state_dict()
    assert {weights[name].dtype for name in weights} == {torch.bfloat16, torch.float32}
    assert all(tensor.dtype == own[name].dtype and torch.equal(tensor, own[name]) for name, tensor in weights.items())


def load_model_of_two_precisions(folder) -> blip2_hf.Blip2ForConditionalGeneration:
    make_theirs("opt").save_pretrained(folder)
    model = blip2_hf.Blip2ForConditionalGeneration.from_pretrained(folder)
    model.vision_model.bfloat16()
    model.language_model.bfloat16()
    return model


def test_an_instructblip_in_float16_stays_so_and_brings_no_code(tmp_path):
    make_instructblip("opt").half().save_pretrained(tmp_path / "theirs")
    model, _ = load_checkpoint(tmp_path / "theirs")
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float16}
    model.saves_code = True
    save_instructblip_checkpoint(model, tmp_path / "back")
    assert not list((tmp_path / "back").glob("*.py")) and not (tmp_path / "back" / "README.md").exists()
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "back"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_adapters_are_merged_into_their_base(model_folder, tmp_path):
    model = blip2_hf.Blip2ForConditionalGeneration.from_pretrained(model_folder)
    settings = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "out")
    merged = blip2_hf.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert not same_weights(merged, blip2_hf.Blip2ForConditionalGeneration.from_pretrained(model_folder))
    assert same_weights(merged, adapted.merge_and_unload())


def test_sources_that_are_something_else(model_folder, tmp_path):
    with pytest.raises(SystemExit, match="--vision-model goes with a file of LAVIS"):
        convert(model_folder, tmp_path / "out", "--vision-model", str(model_folder))
    transformers.OPTForCausalLM(LANGUAGE_MODELS["opt"]()).save_pretrained(tmp_path / "opt")
    with pytest.raises(SystemExit, match="is of type 'opt': a BLIP-2 or an InstructBLIP was expected"):
        convert(tmp_path / "opt", tmp_path / "out")
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"architectures": ["Blip2VisionModel"]}))
    with pytest.raises(SystemExit, match="holds Blip2VisionModel: one of"):
        convert(model_folder, tmp_path / "out")
    (model_folder / "config.json").write_text(json.dumps(config))
    weights = load_file(model_folder / "model.safetensors")
    del weights["language_projection.weight"]
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="lacks 1 weights: language_projection.weight"):
        convert(model_folder, tmp_path / "out")


# InstructBLIP


def make_instructblip(name: str, **qformer) -> transformers.InstructBlipForConditionalGeneration:
    text_config = LANGUAGE_MODELS[name]()
    text_config.bos_token_id = 0
    config = transformers.InstructBlipConfig(
        vision_config={**VISION, "initializer_range": 0.02},
        qformer_config={k: v for k, v in QFORMER.items() if k != "bos_token_id"} | qformer,
        text_config=text_config,
        num_query_tokens=NUM_QUERIES,
        image_token_index=VOCAB_SIZE - 1,
    )
    return randomize(transformers.InstructBlipForConditionalGeneration(config)).eval()


def instructions() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    return {"qformer_input_ids": ids, "qformer_attention_mask": ids.ne(0).long()}


@pytest.mark.parametrize("name", ["opt", "t5"])
@torch.no_grad()
def test_instructblip_computes_the_same_and_comes_back(name, tmp_path):
    torch.manual_seed(0)
    theirs = make_instructblip(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_instructblip_checkpoint(tmp_path / "theirs").eval()
    batch = inputs() | instructions()
    target = {"decoder_input_ids": torch.tensor([[1, 2], [1, 3]])} if name == "t5" else {}
    expected = theirs(**batch, **target).logits
    torch.testing.assert_close(ours(**batch, **target).logits, expected, atol=1e-5, rtol=0)
    others = batch | {"qformer_input_ids": batch["qformer_input_ids"].flip(0)}
    assert not torch.allclose(ours(**others, **target).logits, expected, atol=1e-3)
    tokens = theirs.generate(**batch, max_new_tokens=5)
    assert torch.equal(ours.generate(**batch, max_new_tokens=5), tokens)
    ours.save_pretrained(tmp_path / "ours")
    again = blip2_hf.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "ours")
    save_instructblip_checkpoint(again, tmp_path / "back")
    assert again.config.model_type == "blip2"
    back, info = transformers.InstructBlipForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(info.values()), info
    assert same_weights(back, theirs)


@torch.no_grad()
def test_from_pretrained_takes_instructblip_without_a_conversion(tmp_path):
    torch.manual_seed(0)
    theirs = make_instructblip("opt")
    batch = inputs() | instructions()
    theirs.save_pretrained(tmp_path)
    ours, info = blip2_hf.Blip2ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    torch.testing.assert_close(ours.eval()(**batch).logits, theirs(**batch).logits, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="1 qformer_input_ids were given for 2 images: one instruction for each"):
        ours(**batch | {name: value[:1] for name, value in instructions().items()})


@torch.no_grad()
def test_from_pretrained_takes_instructblip_video(tmp_path):
    torch.manual_seed(0)
    config = make_instructblip("opt").config.to_dict()
    config["video_token_index"] = config.pop("image_token_index")
    for part in ("vision_config", "qformer_config"):
        config[part].pop("model_type")
    del config["model_type"], config["architectures"]
    theirs = transformers.InstructBlipVideoForConditionalGeneration(transformers.InstructBlipVideoConfig(**config))
    theirs = randomize(theirs).eval()
    theirs.save_pretrained(tmp_path)
    ours, info = blip2_hf.Blip2ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    frames, placeholder = 4, VOCAB_SIZE - 1
    text = torch.tensor([[0, 5, 6, 7], [0, 8, 9, 10]])
    placeholders = torch.full((2, frames * NUM_QUERIES), placeholder)
    input_ids = torch.cat([placeholders, text], dim=1)
    batch = {"pixel_values": torch.randn(2, frames, 3, 28, 28), "input_ids": input_ids} | instructions()
    batch["attention_mask"] = torch.ones_like(input_ids)
    torch.testing.assert_close(ours.eval()(**batch).logits, theirs(**batch).logits, atol=1e-5, rtol=0)
    # Each instruction goes with all frames, also if it is given for each
    repeated = {name: value.repeat_interleave(frames, dim=0) for name, value in instructions().items()}
    torch.testing.assert_close(ours(**batch | repeated).logits, theirs(**batch).logits, atol=1e-5, rtol=0)


def test_commands_take_instructblip_without_a_conversion(tmp_path, capsys):
    tokenizer = save_instructblip_processor(tmp_path / "theirs")
    make_instructblip("opt", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    make_image().save(tmp_path / "a.png")
    answers = []
    for folder in ("theirs", "ours"):
        capsys.readouterr()
        model = str(tmp_path / folder)
        main(["ask", str(tmp_path / "a.png"), "what is it?", "--model", model, "--device", "cpu"])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_instructblip_video_becomes_ours_and_does_not_go_back(tmp_path):
    save_instructblip_video(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    processor = blip2_hf.Blip2Processor.from_pretrained(tmp_path / "ours")
    assert processor.image_token_id == load_checkpoint(tmp_path / "ours")[0].config.image_token_index
    with pytest.raises(SystemExit, match="of an InstructBLIP-Video, whose mark of a frame is `<video>`"):
        convert(tmp_path / "ours", tmp_path / "back", "--transformers")
    assert not (tmp_path / "back").exists()


def test_half_an_instructblip_and_a_blip2_are_refused(tmp_path):
    theirs = make_instructblip("opt")
    theirs.save_pretrained(tmp_path / "theirs")
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    del weights["qformer.embeddings.word_embeddings.weight"]
    save_file(weights, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing keys: embeddings.word_embeddings.weight"):
        load_instructblip_checkpoint(tmp_path / "theirs")
    make_theirs("opt").save_pretrained(tmp_path / "blip2")
    with pytest.raises(ValueError, match="reads no text.*transformers_compatible"):
        save_instructblip_checkpoint(load_checkpoint(tmp_path / "blip2")[0], tmp_path / "back")


def save_instructblip_processor(folder: Path) -> transformers.BertTokenizer:
    """Write transformers' processor, and return the Q-Former's tokenizer."""
    parts = make_processor()
    qformer_tokenizer = transformers.BertTokenizer(str(FIXTURES / "tokenizers" / "bert" / "vocab.txt"))
    transformers.InstructBlipProcessor(
        parts.image_processor, parts.tokenizer, qformer_tokenizer, num_query_tokens=NUM_QUERIES
    ).save_pretrained(folder)
    return qformer_tokenizer


def test_the_command_takes_instructblip_both_ways(tmp_path):
    theirs = make_instructblip("opt")
    theirs.save_pretrained(tmp_path / "theirs")
    qformer_tokenizer = save_instructblip_processor(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    processor = blip2_hf.Blip2Processor.from_pretrained(tmp_path / "ours")
    assert processor.qformer_tokenizer.get_vocab() == qformer_tokenizer.get_vocab()
    convert(tmp_path / "ours", tmp_path / "back", "--transformers")
    back = transformers.InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "back")
    assert same_weights(back, theirs)
    picture = {"images": make_image(), "text": "a dog", "return_tensors": "pt"}
    first, second = (
        transformers.InstructBlipProcessor.from_pretrained(tmp_path / folder)(**picture)
        for folder in ("theirs", "back")
    )
    own = processor(**picture)
    for name in first:
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], own[name]), name
