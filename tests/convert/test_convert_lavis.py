"""LAVIS's checkpoints: the numbers that LAVIS computes with them come out, and no tensor is lost on the way."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from lavis_cases import CASES, NEWLINE, OPT, STAGE1, T5, lavis_config, load, opt_processor, tensors
from lavis_shapes import eva_shapes, linear, of_tower, qformer_shapes, random_state_dict
from safetensors.torch import save_file
from tiny import LANGUAGE_MODELS

from blip2_hf import Blip2Config, Blip2ForConditionalGeneration, Blip2Model, Blip2VisionConfig
from blip2_hf.convert import convert_lavis_state_dict, load_lavis_checkpoint, load_lavis_tower, resize_tower
from blip2_hf.models.modeling_pretraining import Blip2ForPreTraining
from blip2_hf.models.modeling_retrieval import Blip2ForImageTextRetrieval


def without(state_dict: dict[str, torch.Tensor], *prefixes: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state_dict.items() if not name.startswith(prefixes)}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-4):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@torch.no_grad()
def run_stage2(model: Blip2ForConditionalGeneration, folder: Path):
    inputs, outputs = tensors(folder, "inputs"), tensors(folder, "outputs")
    labels = outputs["labels"][:, -inputs["input_ids"].shape[1] :]
    kwargs = {"labels": labels, "input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    if folder == T5:
        kwargs |= {"labels": outputs["labels"], "decoder_attention_mask": inputs["output_attention_mask"]}
    return model(pixel_values=inputs["image"], **kwargs)


def assert_stage2_agrees(model: Blip2ForConditionalGeneration, folder: Path):
    outputs, expected = run_stage2(model, folder), tensors(folder, "outputs")
    assert_close(outputs.qformer_outputs.last_hidden_state, expected["query_output"])
    with torch.no_grad():
        assert_close(model.language_projection(expected["query_output"]), expected["language_projection"])
    # What stands at padding differs and matters to nobody
    is_text = expected["decoder_attention_mask" if folder == T5 else "attention_mask"].bool()
    assert_close(outputs.logits[is_text], expected["logits"][is_text])
    assert_close(outputs.loss, torch.tensor(json.loads((folder / "outputs.json").read_text())["loss"]), atol=1e-5)


@pytest.mark.parametrize("folder", [OPT, T5], ids=["opt", "t5"])
def test_stage2_computes_what_lavis_computes(folder):
    model = load(folder)
    assert type(model) is Blip2ForConditionalGeneration
    assert not model.training and not any(p.requires_grad for p in model.language_model.parameters())
    assert_stage2_agrees(model, folder)


@torch.no_grad()
def test_stage1_computes_what_lavis_computes():
    model, inputs, expected = load(STAGE1), tensors(STAGE1, "inputs"), tensors(STAGE1, "outputs")
    assert type(model) is Blip2ForPreTraining
    assert_close(model.get_image_embeds(inputs["image"]), expected["vit_output"])
    assert_close(model.get_image_features(inputs["image"]).pooler_output, expected["image_feats"])
    text_features = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    assert_close(text_features, expected["text_feat"])
    assert_close(model.lm_head(expected["lm_hidden"]), expected["lm_logits"])
    itm_logits = model.itm_head(expected["itm_output"][:, : model.config.num_query_tokens]).mean(dim=1)
    assert_close(itm_logits, expected["itm_logits"])
    assert model.lm_head.decoder.weight is model.embeddings.word_embeddings.weight
    outputs = model(inputs["image"], input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    losses = json.loads((STAGE1 / "outputs.json").read_text())
    assert_close(outputs.loss_itc, torch.tensor(losses["loss_itc"]), atol=1e-5)
    assert_close(outputs.loss_itg, torch.tensor(losses["loss_lm"]), atol=1e-5)


def test_temperature_gets_an_axis():
    state_dict = tensors(STAGE1, "state_dict")
    assert state_dict["temp"].shape == ()
    model = load(STAGE1)
    assert model.temperature.weight.shape == (1,)
    assert model.temperature.weight.item() == state_dict["temp"].item()


@pytest.mark.parametrize("folder", [OPT, T5], ids=["opt", "t5"])
def test_what_was_loaded_is_saved_and_comes_back(folder, tmp_path):
    load(folder).save_pretrained(tmp_path)
    assert_stage2_agrees(Blip2ForConditionalGeneration.from_pretrained(tmp_path), folder)


def test_t5_has_the_exact_gelu_and_a_head_of_its_own():
    config = lavis_config(T5)
    # That of a T5 whose configuration does not say that it is not tied
    config.text_config.scale_decoder_outputs = True
    model = load_lavis_checkpoint(T5 / "state_dict.safetensors", config)
    assert_stage2_agrees(model, T5)
    assert model.config.text_config.dense_act_fn == "gelu" and config.text_config.dense_act_fn == "gelu_new"
    language_model = model.language_model
    assert language_model.shared.weight is language_model.encoder.embed_tokens.weight
    head = language_model.lm_head.weight.clone()
    model.tie_weights()
    assert torch.equal(language_model.lm_head.weight, head)
    assert not torch.equal(head, language_model.shared.weight)


# What is given and what is in the file


@pytest.mark.parametrize("folder", [OPT, T5], ids=["opt", "t5"])
def test_frozen_parts_that_are_given(folder):
    whole = load(folder)
    state_dict = without(tensors(folder, "state_dict"), "visual_encoder.", "opt_model.", "t5_model.")
    if folder == T5:
        # What FlanT5 is before LAVIS has it
        for module in whole.language_model.modules():
            if hasattr(module, "act"):
                module.act = transformers.activations.ACT2FN["gelu_new"]
    tower = whole.vision_model
    tower.post_layernorm.reset_parameters()
    tower.post_layernorm.eps = tower.config.post_layernorm_eps = 1e-6
    config = lavis_config(folder, text_config=None)
    model = load_lavis_checkpoint(state_dict, config, vision_model=tower, language_model=whole.language_model)
    assert model.language_model is whole.language_model and model.vision_model is tower
    assert model.config.is_encoder_decoder == (folder == T5) and config.text_config is None
    assert tower.post_layernorm.eps == 1e-5
    assert_stage2_agrees(model, folder)


@pytest.mark.parametrize(("prefix", "argument"), [("visual_encoder.", "vision_model"), ("opt_", "language_model")])
def test_frozen_parts_that_are_not_there_are_asked_for(prefix, argument):
    state_dict = without(tensors(OPT, "state_dict"), "opt_model." if prefix == "opt_" else prefix)
    with pytest.raises(ValueError, match=f"{prefix}.*not in the file.*as {argument}"):
        load_lavis_checkpoint(state_dict, lavis_config(OPT))


def test_a_tower_twice_is_refused():
    with pytest.raises(ValueError, match="has its own tower"):
        load(OPT, vision_model=Blip2Model(lavis_config(OPT)))


def test_a_tower_with_a_layernorm_of_its_own_is_refused():
    tower = transformers.Blip2VisionModel(
        transformers.Blip2VisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    state_dict = without(tensors(STAGE1, "state_dict"), "visual_encoder.")
    with pytest.raises(ValueError, match="applies the LayerNorm"):
        load_lavis_checkpoint(state_dict, lavis_config(STAGE1), vision_model=tower)


def test_a_language_model_of_another_kind_is_refused():
    text_config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=1, vocab_size=10)
    state_dict = without(tensors(OPT, "state_dict"), "opt_model.")
    with pytest.raises(ValueError, match="type 'opt', but the one given is of type 'gpt2'"):
        load_lavis_checkpoint(
            state_dict, lavis_config(OPT), language_model=transformers.AutoModelForCausalLM.from_config(text_config)
        )


def test_without_a_tower_where_the_configuration_has_none():
    config = lavis_config(STAGE1, has_vision_tower=False)
    model = load_lavis_checkpoint(without(tensors(STAGE1, "state_dict"), "visual_encoder."), config)
    expected = tensors(STAGE1, "outputs")
    with torch.no_grad():
        assert_close(
            model.get_image_features(image_embeds=expected["vit_output"]).pooler_output, expected["image_feats"]
        )


# Every tensor is accounted for


@pytest.mark.parametrize("case", CASES)
def test_the_report_has_every_tensor(case, caplog):
    state_dict = tensors(CASES[case], "state_dict")
    weights, report = convert_lavis_state_dict(state_dict)
    assert report.taken.keys() | report.left.keys() == state_dict.keys()
    assert not report.taken.keys() & report.left.keys()
    assert set(report.taken.values()) == weights.keys()
    assert list(report.left) == ["Qformer.bert.embeddings.position_ids"]
    assert len(report.reshaped) == 4 + (case == "stage1") and report.missing == []
    with caplog.at_level("INFO", logger="blip2_hf.convert.lavis"):
        load(CASES[case])
    assert str(report) in caplog.text
    for line in (
        "visual_encoder.blocks.*.attn.q_bias -> vision_model.encoder.layers.*.self_attn.qkv.bias (4 times)",
        "vision_model.encoder.layers.*.self_attn.qkv.bias: q_bias, zeros for the keys, v_bias (4 times)",
        "ln_vision.weight -> vision_model.post_layernorm.weight",
        "Qformer.bert.embeddings.position_ids: a buffer",
    ):
        assert line in str(report)


def test_what_stands_beside_the_model_is_reported():
    file = {"model": tensors(OPT, "state_dict"), "epoch": 3, "stray.weight": torch.zeros(2)}
    _, report = load_lavis_checkpoint(file, lavis_config(OPT), output_loading_info=True)
    assert {"epoch", "stray.weight"} < report.left.keys() and "model" not in report.left


def test_float16_is_read_in_float32():
    state_dict = {name: tensor.half() for name, tensor in tensors(OPT, "state_dict").items()}
    model = load_lavis_checkpoint(state_dict, lavis_config(OPT))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.query_tokens.weight, state_dict["query_tokens"].float())


def test_the_given_dict_is_not_changed():
    state_dict = tensors(STAGE1, "state_dict")
    names, temp = list(state_dict), state_dict["temp"]
    convert_lavis_state_dict(state_dict)
    assert list(state_dict) == names and state_dict["temp"] is temp and temp.shape == ()


@pytest.mark.parametrize(
    "name",
    [
        "Qformer.bert.pooler.dense.weight",
        "Qformer.bert.encoder.layer.9.output_query.dense.weight",
        "visual_encoder.blocks.4.norm1.weight",
        "visual_encoder.head.weight",
        "opt_model.model.decoder.layers.3.fc1.weight",
        "gpt_proj.weight",
    ],
)
def test_an_unknown_name_is_refused(name):
    state_dict = tensors(OPT, "state_dict") | {name: torch.zeros(2)}
    with pytest.raises(ValueError, match=f"1 (names|tensors).*{name}"):
        load_lavis_checkpoint(state_dict, lavis_config(OPT))


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("query_tokens", "query_tokens.weight"),
        ("ln_vision.bias", "vision_model.post_layernorm.bias"),
        ("visual_encoder.blocks.3.mlp.fc2.weight", "vision_model.encoder.layers.3.mlp.fc2.weight"),
        ("Qformer.bert.encoder.layer.1.output_query.LayerNorm.bias", "qformer.encoder.layer.1.output_query.LayerNorm"),
        ("opt_model.model.decoder.final_layer_norm.bias", "language_model.model.decoder.final_layer_norm.bias"),
        ("opt_proj.bias", "language_projection.bias"),
        ("visual_encoder.blocks.2.attn.v_bias", "v_bias"),
    ],
)
def test_a_missing_name_is_refused(name, ours):
    state_dict = tensors(OPT, "state_dict")
    del state_dict[name]
    with pytest.raises(ValueError, match=ours):
        load_lavis_checkpoint(state_dict, lavis_config(OPT))


def test_a_missing_ln_vision_is_refused_even_if_a_tower_is_given():
    donor = load(OPT)
    state_dict = without(tensors(OPT, "state_dict"), "visual_encoder.", "ln_vision.")
    with pytest.raises(ValueError, match="post_layernorm.weight, vision_model.post_layernorm.bias"):
        load_lavis_checkpoint(state_dict, lavis_config(OPT), vision_model=donor)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        (STAGE1, "Qformer.cls.predictions.decoder.weight"),
        (STAGE1, "Qformer.cls.predictions.decoder.bias"),
        (OPT, "opt_model.lm_head.weight"),
        (T5, "t5_model.encoder.embed_tokens.weight"),
    ],
)
def test_tied_tensors(folder, name):
    state_dict = tensors(folder, "state_dict")
    tensor = state_dict.pop(name)
    load_lavis_checkpoint(state_dict, lavis_config(folder))
    with pytest.raises(ValueError, match="one tensor in LAVIS"):
        load_lavis_checkpoint(state_dict | {name: tensor + 1}, lavis_config(folder))


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"query_tokens \(1, 8, 48\) for \(1, 5, 48\)"):
        load_lavis_checkpoint(tensors(OPT, "state_dict"), lavis_config(OPT, num_query_tokens=5))


def test_stage1_leaves_its_text_part_and_heads_to_a_model_without():
    state_dict = tensors(STAGE1, "state_dict")
    config = lavis_config(STAGE1)
    config.qformer_config.use_qformer_text_input = False
    model = load_lavis_checkpoint(state_dict, config, Blip2Model)
    assert type(model) is Blip2Model
    with torch.no_grad():
        queries = model(pixel_values=tensors(STAGE1, "inputs")["image"]).last_hidden_state
    assert_close(queries, tensors(STAGE1, "outputs")["query_output"])


def test_stage2_with_a_text_part_that_it_does_not_read(caplog):
    stage1 = tensors(STAGE1, "state_dict")
    names = ("intermediate.", "output.", "word_embeddings.")
    text_part = {k: v for k, v in stage1.items() if "Qformer.bert" in k and k not in tensors(OPT, "state_dict")}
    assert all(any(f".{name}" in key or "position_embeddings" in key for name in names) for key in text_part)
    with caplog.at_level("INFO", logger="blip2_hf.convert.lavis"):
        model = load_lavis_checkpoint(tensors(OPT, "state_dict") | text_part, lavis_config(OPT))
    assert_stage2_agrees(model, OPT)
    assert "use_qformer_text_input=False" in caplog.text and "has no embeddings" in caplog.text


def test_which_class():
    state_dict = tensors(STAGE1, "state_dict")
    retrieval = load_lavis_checkpoint(without(state_dict, "Qformer.cls."), lavis_config(STAGE1))
    assert type(retrieval) is Blip2ForImageTextRetrieval
    with pytest.raises(ValueError, match="Give model_class"):
        load_lavis_checkpoint({"query_tokens": state_dict["query_tokens"]}, lavis_config(STAGE1))
    with pytest.raises(ValueError, match="from_pretrained_parts"):
        load_lavis_checkpoint(state_dict, lavis_config(STAGE1), Blip2ForConditionalGeneration)
    with pytest.raises(ValueError, match="language_model was given"):
        load_lavis_checkpoint(state_dict, lavis_config(STAGE1), language_model=object())


# Files


@pytest.mark.parametrize("wrap", [dict, lambda s: {"model": s, "epoch": 3, "config": {"run": {"lr": 1e-4}}}])
def test_files_of_torch(wrap, tmp_path):
    state_dict = tensors(STAGE1, "state_dict")
    torch.save(wrap(state_dict), tmp_path / "checkpoint.pth")
    model = load_lavis_checkpoint(str(tmp_path / "checkpoint.pth"), lavis_config(STAGE1))
    assert torch.equal(model.query_tokens.weight, state_dict["query_tokens"])


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    state_dict = tensors(STAGE1, "state_dict")
    torch.save({"model": state_dict, "config": Payload(tmp_path / "was_run")}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="could run code"):
        load_lavis_checkpoint(tmp_path / "checkpoint.pth", lavis_config(STAGE1))
    assert not (tmp_path / "was_run").exists()


def test_a_tower_whose_pickle_runs_code_is_refused(tmp_path):
    torch.save({"cls_token": torch.zeros(1, 1, 1408), "more": Payload(tmp_path / "was_run")}, tmp_path / "eva.pth")
    state_dict = without(tensors(STAGE1, "state_dict"), "visual_encoder.")
    with pytest.raises(ValueError, match="could run code"):
        load_lavis_checkpoint(state_dict, lavis_config(STAGE1), vision_model=tmp_path / "eva.pth")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("name", ["checkpoint.pth", "checkpoint.safetensors"])
def test_half_a_file_is_refused(name, tmp_path):
    state_dict = tensors(STAGE1, "state_dict")
    path = tmp_path / name
    save_file(state_dict, path) if name.endswith("safetensors") else torch.save(state_dict, path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{name} is no file of.*Download it again"):
        load_lavis_checkpoint(path, lavis_config(STAGE1))


def test_what_is_no_state_dict_is_refused(tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(ValueError, match="holds no weights"):
        load_lavis_checkpoint(tmp_path / "empty.safetensors")
    with pytest.raises(ValueError, match="not a tensor: epoch"):
        load_lavis_checkpoint(tensors(STAGE1, "state_dict") | {"epoch": 3})


# Sizes from shapes, and CLIP


def clip_tower(hidden_size: int, num_hidden_layers: int, num_attention_heads: int):
    """CLIP of transformers, and its weights under OpenAI's names, which are LAVIS's."""
    tower = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=hidden_size,
            intermediate_size=40,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            image_size=42,
            patch_size=14,
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs = {name.removeprefix("vision_model."): tensor for name, tensor in tower.state_dict().items()}
    weights = {
        "class_embedding": theirs["embeddings.class_embedding"],
        "positional_embedding": theirs["embeddings.position_embedding.weight"],
        "conv1.weight": theirs["embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        weights[f"ln_pre.{kind}"] = theirs[f"pre_layrnorm.{kind}"]
        for index in range(num_hidden_layers):
            old, new = f"encoder.layers.{index}", f"transformer.resblocks.{index}"
            qkv = [theirs[f"{old}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            weights[f"{new}.attn.in_proj_{kind}"] = torch.cat(qkv)
            weights[f"{new}.attn.out_proj.{kind}"] = theirs[f"{old}.self_attn.out_proj.{kind}"]
            weights[f"{new}.mlp.c_fc.{kind}"] = theirs[f"{old}.mlp.fc1.{kind}"]
            weights[f"{new}.mlp.c_proj.{kind}"] = theirs[f"{old}.mlp.fc2.{kind}"]
            weights[f"{new}.ln_1.{kind}"] = theirs[f"{old}.layer_norm1.{kind}"]
            weights[f"{new}.ln_2.{kind}"] = theirs[f"{old}.layer_norm2.{kind}"]
    return tower, {f"visual_encoder.{name}": tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("text", [False, True])
def test_sizes_of_eva_and_the_qformer_are_read_from_the_file(text):
    shapes = of_tower(eva_shapes(1408, layers=2, side=3)) | qformer_shapes(
        128, layers=5, every=2, tower_width=1408, text=text
    )
    model = load_lavis_checkpoint(random_state_dict(shapes), model_class=Blip2Model)
    vision, qformer = model.config.vision_config, model.config.qformer_config
    assert (vision.num_attention_heads, vision.num_hidden_layers, vision.image_size) == (16, 2, 42)
    assert (vision.use_pre_layernorm, vision.hidden_act, vision.layer_norm_eps) == (False, "gelu", 1e-6)
    assert (qformer.num_attention_heads, qformer.num_hidden_layers, qformer.cross_attention_frequency) == (2, 5, 2)
    assert model.config.num_query_tokens == 5 and qformer.use_qformer_text_input is text
    if text:
        assert (qformer.vocab_size, qformer.bos_token_id, qformer.max_position_embeddings) == (30, 29, 12)


def test_sizes_that_shapes_do_not_tell_are_asked_for():
    state_dict = without(tensors(STAGE1, "state_dict"), "visual_encoder.")
    with pytest.raises(ValueError, match="48 wide.*Give a config"):
        load_lavis_checkpoint(state_dict, vision_model=load(STAGE1))
    with pytest.raises(ValueError, match="query_tokens.weight is not in the file"):
        load_lavis_checkpoint(without(state_dict, "query_tokens"), vision_model=load(STAGE1))
    shapes = of_tower(eva_shapes(64, layers=1, side=2)) | qformer_shapes(
        64, layers=1, every=2, tower_width=64, text=False
    )
    with pytest.raises(ValueError, match="64 wide.*Give a config"):
        load_lavis_checkpoint(random_state_dict(shapes), model_class=Blip2Model)


def test_sizes_of_a_file_without_its_frozen_parts():
    shapes = qformer_shapes(64, layers=2, every=2, tower_width=64, text=False) | linear("opt_proj", 64, 32)
    donor = load(OPT)
    model = load_lavis_checkpoint(random_state_dict(shapes), vision_model=donor, language_model=donor.language_model)
    assert type(model) is Blip2ForConditionalGeneration
    assert model.config.text_config.model_type == "opt" and model.config.vision_config.num_attention_heads == 4
    assert model.generate(pixel_values=torch.randn(1, 3, 56, 56), max_new_tokens=3).shape[0] == 1


def test_an_instructblip_with_vicuna():
    shapes = qformer_shapes(64, layers=2, every=2, tower_width=64, text=True) | linear("llm_proj", 64, 32)
    state_dict = random_state_dict(shapes)
    vicuna = transformers.AutoModelForCausalLM.from_config(LANGUAGE_MODELS["llama"]())
    model = load_lavis_checkpoint(state_dict, vision_model=load(OPT), language_model=vicuna)
    assert type(model) is Blip2ForConditionalGeneration
    assert model.config.qformer_config.use_qformer_text_input
    assert torch.equal(model.language_projection.weight, state_dict["llm_proj.weight"])
    assert torch.equal(
        model.embeddings.word_embeddings.weight, state_dict["Qformer.bert.embeddings.word_embeddings.weight"]
    )
    question = {"qformer_input_ids": torch.tensor([[5, 6, 7]]), "qformer_attention_mask": torch.ones(1, 3).long()}
    assert model.generate(pixel_values=torch.randn(1, 3, 56, 56), **question, max_new_tokens=3).shape[0] == 1
    with pytest.raises(ValueError, match="type 'llama', but the one given is of type 'opt'"):
        load_lavis_checkpoint(state_dict, vision_model=load(OPT), language_model=load(OPT).language_model)


@pytest.mark.parametrize(("width", "heads"), [(32, 4), (1024, 16)], ids=["config", "no config"])
@torch.no_grad()
def test_clip(width, heads):
    tower, weights = clip_tower(width, num_hidden_layers=2, num_attention_heads=heads)
    state_dict = weights | random_state_dict(qformer_shapes(64, layers=2, every=2, tower_width=width, text=False))
    config = None
    if width != 1024:
        vision_config = Blip2VisionConfig.clip_vit_l(
            hidden_size=width, intermediate_size=40, num_hidden_layers=2, num_attention_heads=heads, image_size=42
        )
        qformer = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 1}
        config = Blip2Config(vision_config=vision_config, qformer_config=qformer, num_query_tokens=5)
    _, report = convert_lavis_state_dict(state_dict)
    assert report.reshaped["vision_model.embeddings.patch_embedding.bias"] == "zeros: CLIP has none"
    # Features of a wide tower with random weights are large
    model = load_lavis_checkpoint(state_dict, config, Blip2Model).double()
    pixel_values = torch.randn(2, 3, 42, 42, dtype=torch.float64)
    expected = tower.double()(pixel_values, output_hidden_states=True).hidden_states[-1]
    assert_close(model.get_image_embeds(pixel_values), expected)
    # The same tower, given as transformers has it
    state_dict = without(state_dict, "visual_encoder.")
    with_tower = load_lavis_checkpoint(state_dict, config, Blip2Model, vision_model=tower).double()
    assert_close(with_tower(pixel_values).last_hidden_state, model(pixel_values).last_hidden_state)


# LAVIS's own files of its towers, and transformers' CLIP


def tower_file(folder: Path, more: int) -> dict[str, torch.Tensor]:
    """The tower of a fixture as a file of its own, with `more` blocks than BLIP-2 takes, and what is behind them."""
    names = "visual_encoder."
    weights = {k.removeprefix(names): v for k, v in tensors(folder, "state_dict").items() if k.startswith(names)}
    depth = lavis_config(folder).vision_config.num_hidden_layers
    for index in range(depth, depth + more):
        last = {k: v for k, v in weights.items() if k.startswith(f"blocks.{depth - 1}.")}
        weights |= {k.replace(f"blocks.{depth - 1}.", f"blocks.{index}."): v + 1 for k, v in last.items()}
    return weights | {"norm.weight": torch.ones(64), "norm.bias": torch.ones(64), "head.weight": torch.ones(8, 64)}


@torch.no_grad()
def test_a_checkpoint_and_the_file_of_its_tower(tmp_path):
    torch.save(tower_file(STAGE1, more=1), tmp_path / "eva_vit_g.pth")
    state_dict = without(tensors(STAGE1, "state_dict"), "visual_encoder.")
    model, report = load_lavis_checkpoint(
        state_dict, lavis_config(STAGE1), vision_model=tmp_path / "eva_vit_g.pth", output_loading_info=True
    )
    inputs, expected = tensors(STAGE1, "inputs"), tensors(STAGE1, "outputs")
    assert_close(model.get_image_embeds(inputs["image"]), expected["vit_output"])
    assert_close(model.get_image_features(inputs["image"]).pooler_output, expected["image_feats"])
    assert report.tower.taken.keys() | report.tower.left.keys() == tower_file(STAGE1, more=1).keys()
    depth = model.config.vision_config.num_hidden_layers
    behind = {name for name in report.tower.left if not name.startswith(f"blocks.{depth}.")}
    assert behind == {"norm.weight", "norm.bias", "head.weight"} and len(report.tower.left) == 3 + 13
    for line in ("file of the vision tower:", f"blocks.*.norm1.weight: LAVIS takes the output of block {depth - 1}"):
        assert line in str(report)


def test_a_tower_of_its_own_starts_with_a_new_layernorm():
    tower = load_lavis_tower(tower_file(STAGE1, more=2), lavis_config(STAGE1).vision_config)
    assert torch.equal(tower.post_layernorm.weight, torch.ones(64)) and not tower.training
    assert torch.equal(tower.post_layernorm.bias, torch.zeros(64))


@pytest.mark.parametrize("name", ["blocks.1.attn.proj.weight", "pos_embed", "blocks.0.attn.q_bias"])
def test_half_a_tower_is_refused(name):
    state_dict = tower_file(STAGE1, more=0)
    del state_dict[name]
    with pytest.raises(ValueError, match="not in the file|not the q_bias"):
        load_lavis_tower(state_dict, lavis_config(STAGE1).vision_config)
    with pytest.raises(ValueError, match="1 names.*rel_pos_bias"):
        load_lavis_tower(
            tower_file(STAGE1, more=0) | {"rel_pos_bias": torch.ones(2)}, lavis_config(STAGE1).vision_config
        )
    with pytest.raises(ValueError, match="ViT-g.*a width of 64"):
        load_lavis_tower(tower_file(STAGE1, more=0))


@pytest.mark.parametrize("align_corners", [False, True])
@torch.no_grad()
def test_position_embeddings_of_another_size(align_corners):
    config = lavis_config(STAGE1).vision_config
    config.interpolate_align_corners = align_corners
    state_dict = tower_file(STAGE1, more=1)
    plain = load_lavis_tower(state_dict, config)
    grid = state_dict["pos_embed"][:, 1:].reshape(1, 4, 4, 64).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=align_corners)
    expected = torch.cat([state_dict["pos_embed"][:, :1], grid.permute(0, 2, 3, 1).reshape(1, 36, 64)], dim=1)
    config.image_size = 84
    tower = load_lavis_tower(state_dict, config)
    assert_close(tower.embeddings.position_embedding, expected, atol=1e-6)
    # What is done at each image of another size, done once
    pixel_values = torch.randn(1, 3, 84, 84)
    expected = plain(pixel_values).last_hidden_state
    assert_close(tower(pixel_values, interpolate_pos_encoding=False).last_hidden_state, expected, atol=1e-6)
    resize_tower(plain, 84)
    assert_close(plain(pixel_values, interpolate_pos_encoding=False).last_hidden_state, expected, atol=1e-6)


@pytest.mark.parametrize("source", ["LAVIS", "transformers"])
@torch.no_grad()
def test_the_last_block_but_one_of_a_whole_clip(source, tmp_path):
    whole, weights = clip_tower(32, num_hidden_layers=3, num_attention_heads=4)
    state_dict = random_state_dict(qformer_shapes(64, layers=2, every=2, tower_width=32, text=False))
    vision_config = Blip2VisionConfig.clip_vit_l(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, image_size=42
    )
    qformer = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = Blip2Config(vision_config=vision_config, qformer_config=qformer, num_query_tokens=5)
    given = tmp_path / "clip_vit_L.pth"
    if source == "LAVIS":
        more = {"ln_post.weight": torch.ones(32), "ln_post.bias": torch.ones(32), "proj": torch.ones(32, 16)}
        torch.save({k.removeprefix("visual_encoder."): v for k, v in weights.items()} | more, given)
    else:
        given = whole
    model = load_lavis_checkpoint(state_dict, config, Blip2Model, vision_model=given)
    pixel_values = torch.randn(2, 3, 42, 42)
    expected = whole(pixel_values, output_hidden_states=True).hidden_states[-2]
    assert_close(model.get_image_embeds(pixel_values), expected)
    assert model.config.vision_config.model_type == "blip2_vision_model"
    assert model.config.vision_config.num_hidden_layers == 2


def test_an_opt_ends_at_a_newline():
    tokenizer = opt_processor().tokenizer
    model = load(OPT, tokenizer=tokenizer)
    assert model.generation_config.eos_token_id == model.config.text_config.eos_token_id == NEWLINE
    assert model.config.eos_token_id == NEWLINE
    # The configuration that was given says what marks an image
    assert model.config.image_token_index is None
