import pytest
import torch
import transformers
from stage2 import remove_dropout
from tiny import (
    LANGUAGE_MODELS,
    NUM_QUERIES,
    QFORMER,
    VOCAB_SIZE,
    make_config,
    make_model,
    make_pixel_values,
    make_processor,
    make_tokenizer,
    randomize,
)

import blip2_hf
from blip2_hf import Blip2Config, Blip2ForConditionalGeneration, Blip2Model
from blip2_hf.models._compat import CACHE_NAME


IDS = torch.tensor([[0, 5, 6, 7], [0, 8, 9, 2]])
TRAINED = ("query_tokens.", "qformer.", "language_projection.", "vision_model.post_layernorm.")


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_what_is_trained_learns_and_what_is_frozen_is_in_eval_mode(name):
    model = make_model(name).train()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith(TRAINED)}
    assert not any(m.training for part in (model.language_model, model.vision_model.encoder) for m in part.modules())
    assert model.qformer.training
    assert model.vision_model.post_layernorm.training
    loss = model(pixel_values=make_pixel_values(), input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained


def test_frozen_tower_runs_without_autograd_and_a_thawed_one_with_it():
    model = make_model().train()
    assert not model.get_image_embeds(make_pixel_values()).requires_grad
    model.vision_model.encoder.layers[-1].requires_grad_(True)
    assert model.get_image_embeds(make_pixel_values()).requires_grad
    model.train()
    assert model.vision_model.encoder.layers[-1].training
    pixel_values = make_pixel_values().requires_grad_(True)
    model = make_model()
    model(pixel_values=pixel_values, input_ids=IDS, labels=IDS).loss.backward()
    assert pixel_values.grad.abs().sum() > 0


def test_loaded_models_are_frozen_too(tmp_path):
    make_model().save_pretrained(tmp_path)
    model = Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    assert all(n.startswith(TRAINED) for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["load_in_8bit", "load_in_4bit"])
def test_arguments_of_earlier_transformers(tmp_path, name):
    with pytest.raises(TypeError, match=rf"{name} was given.*quantization_config=.*BitsAndBytesConfig\({name}=True\)"):
        Blip2ForConditionalGeneration.from_pretrained(tmp_path, **{name: True})


def test_loss_by_hand():
    model = make_model("llama")
    pixel_values = make_pixel_values()
    labels = torch.tensor([[-100, 5, 6, 7], [-100, 8, -100, 2]])
    outputs = model(pixel_values=pixel_values, input_ids=IDS, labels=labels)
    log_probs = outputs.logits[:, NUM_QUERIES:].log_softmax(-1)
    wanted = [(0, 0, 5), (0, 1, 6), (0, 2, 7), (1, 0, 8), (1, 2, 2)]
    expected = -sum(log_probs[row, position, token] for row, position, token in wanted)
    torch.testing.assert_close(outputs.loss, expected / 5)
    outputs = model(pixel_values=pixel_values, input_ids=IDS, labels=labels, num_items_in_batch=torch.tensor(20))
    torch.testing.assert_close(outputs.loss, expected / 20)


def test_loss_of_an_encoder_decoder_by_hand():
    model = make_model("t5")
    labels = torch.tensor([[5, 6, 2], [8, 2, -100]])
    outputs = model(pixel_values=make_pixel_values(), input_ids=IDS, labels=labels)
    log_probs = outputs.logits.log_softmax(-1)
    wanted = [(0, 0, 5), (0, 1, 6), (0, 2, 2), (1, 0, 8), (1, 1, 2)]
    expected = -sum(log_probs[row, position, token] for row, position, token in wanted) / 5
    torch.testing.assert_close(outputs.loss, expected)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_have_no_nan(name, attn, dtype, tmp_path):
    # Weights as they come, not the large ones of the other tests: float16 ends at 65504
    model = Blip2ForConditionalGeneration(make_config(name))
    model.save_pretrained(tmp_path)
    model = Blip2ForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype, attn_implementation=attn).train()
    assert model.language_model.dtype == dtype
    assert model.qformer.config._attn_implementation == attn
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    inputs = {"pixel_values": make_pixel_values().to(dtype), "input_ids": IDS, "attention_mask": mask}
    outputs = model(**inputs, labels=IDS)
    assert torch.isfinite(outputs.loss)
    assert torch.isfinite(outputs.logits[mask.bool()] if outputs.logits.shape[1] == 4 else outputs.logits).all()
    outputs.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    assert model.eval().generate(**inputs, max_new_tokens=3).shape[0] == 2


@torch.no_grad()
def test_flex_attention():
    """One test, with one size of inputs, because each is compiled for half a minute."""
    pixel_values = make_pixel_values()
    image_side = randomize(Blip2Model(make_config(None))).eval()
    expected = image_side(pixel_values).last_hidden_state
    image_side.set_attn_implementation("flex_attention")
    torch.testing.assert_close(image_side(pixel_values).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    model = make_model("opt")
    inputs = {"pixel_values": pixel_values, "input_ids": IDS, "labels": IDS}
    expected = model(**inputs)
    model.set_attn_implementation({"vision_config": "flex_attention", "qformer_config": "flex_attention"})
    actual = model(**inputs)
    found, wanted = (outputs.qformer_outputs.last_hidden_state for outputs in (actual, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["opt", "llama", "t5"])
def test_activation_checkpointing_acts_and_changes_nothing(name):
    model = make_model(name).train()
    inputs = {"pixel_values": make_pixel_values(), "input_ids": IDS, "labels": IDS}
    remove_dropout(model.qformer)

    def gradients():
        model.zero_grad()
        calls.clear()
        model(**inputs).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    calls = []
    layers = [
        m
        for m in model.language_model.modules()
        if isinstance(m, transformers.modeling_layers.GradientCheckpointingLayer)
    ]
    layers[0].register_forward_pre_hook(lambda *args: calls.append("layer"))
    norms = [m for m in layers[0].modules() if "norm" in type(m).__name__.lower()]
    norms[0].register_forward_pre_hook(lambda *args: calls.append("norm"))
    expected = gradients()
    assert calls.count("norm") == 1
    model.gradient_checkpointing_enable()
    model.train()
    actual = gradients()
    assert calls.count("norm") == 2  # once more in the backward pass
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value)
    # Dropout of the frozen language model stays off
    dropouts = [m for m in model.language_model.modules() if isinstance(m, torch.nn.Dropout)]
    assert not any(m.training for m in dropouts)


def test_device_map(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    inputs = {"pixel_values": make_pixel_values(), "input_ids": IDS}
    expected = model.generate(**inputs, max_new_tokens=4)
    parts = {"query_tokens": "cpu", "qformer": "cpu", "language_projection": "cpu", "language_model": "cpu"}
    for device_map in ("cpu", "auto", {**parts, "vision_model": "disk"}):
        loaded = Blip2ForConditionalGeneration.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
        ).eval()
        assert torch.equal(loaded.generate(**inputs, max_new_tokens=4), expected)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_round_trip(name, tmp_path):
    model = make_model(name)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is Blip2ForConditionalGeneration
    assert type(loaded.config) is Blip2Config
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    image_side = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(image_side) is Blip2Model
    assert torch.equal(image_side.query_tokens.weight, model.query_tokens.weight)


def test_config_round_trip():
    config = make_config("t5", vision_config=transformers.Dinov2Config(hidden_size=32), vision_feature_layer=-3)
    again = Blip2Config.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.is_encoder_decoder
    assert again.qformer_config.encoder_hidden_size == 32
    assert again.pad_token_id == config.text_config.pad_token_id
    assert make_config(None).text_config is None
    with pytest.raises(ValueError, match="model_type"):
        Blip2Config(text_config={"hidden_size": 3})


@pytest.mark.parametrize("transformers_compatible", [False, True])
def test_config_json_names_no_folder(transformers_compatible, tmp_path):
    model = make_model()
    vision, text = model.config.vision_config, model.config.text_config
    vision.name_or_path, text.name_or_path = "me/tower", str(tmp_path)
    model.save_pretrained(tmp_path / "model", transformers_compatible=transformers_compatible)
    assert (vision.name_or_path, text.name_or_path) == ("me/tower", str(tmp_path))
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()
    loaded = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "model").config
    assert loaded.text_config.name_or_path == ""
    assert loaded.vision_config.name_or_path == ("" if transformers_compatible else "me/tower")


def make_parts(folder, language_model="opt"):
    bert_config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    )
    randomize(transformers.BertModel(bert_config)).save_pretrained(folder / "bert")
    clip_config = transformers.CLIPConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
        },
        text_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4},
    )
    randomize(transformers.CLIPModel(clip_config)).save_pretrained(folder / "clip")
    config = LANGUAGE_MODELS[language_model]()
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    randomize(kind.from_config(config)).save_pretrained(folder / "lm")
    make_tokenizer().save_pretrained(folder / "lm")
    return {"vision_model": folder / "clip", "text_encoder": folder / "bert", "language_model": folder / "lm"}


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_from_pretrained_parts(name, tmp_path):
    parts = make_parts(tmp_path, name)
    model = Blip2ForConditionalGeneration.from_pretrained_parts(
        **parts, num_query_tokens=NUM_QUERIES, cross_attention_frequency=3, vision_feature_layer=-2
    )
    assert model.config.image_token_index == len(make_tokenizer()) == make_processor().image_token_id
    assert model.config.qformer_config.cross_attention_frequency == 3
    assert model.config.vision_feature_layer == -2
    clip = transformers.CLIPModel.from_pretrained(tmp_path / "clip")
    bert = transformers.BertModel.from_pretrained(tmp_path / "bert")
    assert torch.equal(
        model.vision_model.tower.state_dict()["embeddings.patch_embedding.weight"],
        clip.vision_model.embeddings.patch_embedding.weight,
    )
    layer, source = model.qformer.encoder.layer[1], bert.encoder.layer[1]
    assert torch.equal(layer.intermediate_query.dense.weight, source.intermediate.dense.weight)
    reloaded = type(model.language_model).from_pretrained(tmp_path / "lm").state_dict()
    assert all(torch.equal(reloaded[key], value) for key, value in model.language_model.state_dict().items())
    assert all(n.startswith(TRAINED) for n, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "blip2")
    assert str(tmp_path) not in (tmp_path / "blip2" / "config.json").read_text()
    loaded = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "blip2")
    pixel_values = make_pixel_values()
    expected = model.eval()(pixel_values=pixel_values, input_ids=IDS, labels=IDS).logits
    assert torch.equal(loaded.eval()(pixel_values=pixel_values, input_ids=IDS, labels=IDS).logits, expected)


def test_a_trained_qformer_moves_to_another_language_model(tmp_path):
    parts = make_parts(tmp_path)
    source = make_model("t5")
    source.save_pretrained(tmp_path / "source")
    for stage1 in (source, tmp_path / "source"):
        model = Blip2ForConditionalGeneration.from_pretrained_parts(stage1, parts["language_model"]).eval()
        assert not model.config.is_encoder_decoder
        pixel_values = make_pixel_values()
        expected = source.get_image_features(pixel_values).qformer_outputs.last_hidden_state
        actual = model.get_image_features(pixel_values).qformer_outputs.last_hidden_state
        torch.testing.assert_close(actual, expected)


def test_language_models_with_narrow_embeddings():
    text_config = LANGUAGE_MODELS["opt"]()
    text_config.word_embed_proj_dim = 16
    model = randomize(Blip2ForConditionalGeneration(make_config(text_config=text_config))).eval()
    pixel_values = make_pixel_values()
    features = model.get_image_features(pixel_values).pooler_output
    assert features.shape == (2, NUM_QUERIES, 16)
    assert torch.isfinite(model(pixel_values=pixel_values, input_ids=IDS, labels=IDS).loss)
    with pytest.raises(ValueError, match="32 wide, the language model's embeddings 16"):
        model(image_features=torch.zeros(2, NUM_QUERIES, 32), input_ids=IDS)
    with pytest.raises(ValueError, match="image_features of shape"):
        model(image_features=torch.zeros(2, 16), input_ids=IDS)


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama"])
def test_forward_with_a_cache_and_a_mask_of_the_whole_length(name):
    model = make_model(name)
    ids = torch.tensor([[0, 5, 6, 7, 8]])
    expected = model(input_ids=ids).logits[:, -1:]
    cache = model(input_ids=ids[:, :4], use_cache=True)[CACHE_NAME]
    mask = torch.ones(1, 5, dtype=torch.long)
    actual = model(input_ids=ids[:, 4:], attention_mask=mask, **{CACHE_NAME: cache}).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_features_of_no_image_change_nothing():
    model, input_ids = make_model(), torch.tensor([[2, 5, 6]])
    none = torch.empty(0, NUM_QUERIES, model.get_input_embeddings().embedding_dim)
    with torch.no_grad():
        actual, expected = model(input_ids=input_ids, image_features=none), model(input_ids=input_ids)
    torch.testing.assert_close(actual.logits, expected.logits)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_frozen_parts_are_in_eval_mode_from_the_start(name):
    model = Blip2ForConditionalGeneration(make_config(name))
    assert not any(m.training for part in model.frozen_parts() for m in part.modules())
    assert model.language_model in model.frozen_parts()


def test_labels_of_the_text_alone_are_understood_as_by_transformers():
    model, pixel_values = make_model("opt"), make_pixel_values()
    marked = torch.cat([torch.full((2, NUM_QUERIES), VOCAB_SIZE - 1), IDS], dim=1)
    whole = torch.cat([torch.full((2, NUM_QUERIES), -100), IDS], dim=1)
    expected = model(pixel_values=pixel_values, input_ids=marked, labels=whole).loss
    assert torch.equal(model(pixel_values=pixel_values, input_ids=marked, labels=IDS).loss, expected)


def test_labels_for_the_other_kind_of_language_model_are_an_error():
    pixel_values = make_pixel_values()
    with pytest.raises(ValueError, match="is_encoder_decoder must be False"):
        make_model("opt")(pixel_values=pixel_values, input_ids=IDS, labels=IDS[:, :2])


def test_later_tokens_do_not_change_earlier_logits(tmp_path):
    model = Blip2ForConditionalGeneration.from_pretrained_parts(**make_parts(tmp_path), num_query_tokens=4).eval()
    pixel_values, changed = make_pixel_values(), IDS.clone()
    changed[:, -1] = 11
    logits = [model(pixel_values=pixel_values, input_ids=ids).logits[:, :-1] for ids in (IDS, changed)]
    assert torch.equal(*logits)


def test_from_pretrained_parts_says_what_is_missing():
    with pytest.raises(ValueError, match="num_query_tokens: stage1 has its own"):
        Blip2ForConditionalGeneration.from_pretrained_parts(
            make_model(), make_model().language_model, num_query_tokens=3
        )

    with pytest.raises(ValueError, match="needs a language_model"):
        Blip2ForConditionalGeneration.from_pretrained_parts(vision_model="x", text_encoder="y")
    with pytest.raises(ValueError, match="Give either stage1, or"):
        Blip2ForConditionalGeneration.from_pretrained_parts(language_model="z", vision_model="x")


def test_qformer_that_reads_an_instruction():
    model = make_model("opt", qformer_config={**QFORMER, "use_qformer_text_input": True})
    pixel_values = make_pixel_values()
    plain = model.get_image_features(pixel_values).pooler_output
    instruction = torch.tensor([[3, 4, 5], [6, 7, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    features = model.get_image_features(
        pixel_values, qformer_input_ids=instruction, qformer_attention_mask=mask
    ).pooler_output
    assert features.shape == plain.shape
    assert not torch.allclose(features, plain, atol=1e-3)
    alone = model.get_image_features(pixel_values[1:], qformer_input_ids=instruction[1:, :2]).pooler_output
    torch.testing.assert_close(features[1:], alone, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="use_qformer_text_input"):
        make_model().get_image_features(pixel_values, qformer_input_ids=instruction)


@torch.no_grad()
@pytest.mark.parametrize("name", ["opt", "t5"])
def test_an_instruction_is_the_same_with_padding_on_either_side(name):
    model = make_model(name, qformer_config={**QFORMER, "use_qformer_text_input": True})
    pixel_values = make_pixel_values(2)
    alone = [
        model.get_image_features(pixel_values[row : row + 1], qformer_input_ids=torch.tensor([ids])).pooler_output
        for row, ids in enumerate([[3, 4, 5, 8], [6, 7]])
    ]
    right = {"qformer_input_ids": torch.tensor([[3, 4, 5, 8], [6, 7, 0, 0]])}
    right["qformer_attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    left = {name: torch.stack([row[0], row[1].roll(2)]) for name, row in right.items()}
    ids = IDS.repeat(2, 1)[:2]
    logits = [model(pixel_values, ids, labels=ids, **padded).logits for padded in (right, left)]
    torch.testing.assert_close(logits[1], logits[0])
    for padded in (right, left, {name: value.bool() if "mask" in name else value for name, value in left.items()}):
        features = model.get_image_features(pixel_values, **padded).pooler_output
        torch.testing.assert_close(features, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[2, 5, 3], [2, 5, 3]], [[1, 1, 1], [0, 0, 0]], "Row 1 of qformer_input_ids has 0 tokens"),
        ([[2, 5, 3], [2, 64, 3]], None, "Row 1 of qformer_input_ids .* token id 64, beyond its vocabulary of 64"),
        ([[2, 5, 3], [2, 5, 3]], [[1, 1], [1, 1]], r"mask of shape \(2, 2\) for qformer_input_ids of shape \(2, 3\)"),
        ([[5] * 41] * 2, None, "qformer_input_ids has 41 tokens, but the Q-Former has 40 positions"),
        ([[5] * 4 + [2, 6, 3]] * 2, None, "4 tokens of id 5 in front, which look like those of an image"),
    ],
)
def test_what_is_no_instruction(ids, mask, message):
    model = make_model("opt", qformer_config={**QFORMER, "use_qformer_text_input": True})
    mask = None if mask is None else torch.tensor(mask)
    with pytest.raises(ValueError, match=message):
        model.get_image_features(
            make_pixel_values(2), qformer_input_ids=torch.tensor(ids), qformer_attention_mask=mask
        )


def test_names_of_the_contract():
    for name in ("Blip2Config", "Blip2VisionConfig", "Blip2QFormerConfig", "Blip2VisionModel", "Blip2QFormerModel"):
        assert getattr(blip2_hf, name).__module__.startswith("blip2_hf.")
    assert Blip2Config.model_type == "blip2"
    assert blip2_hf.Blip2VisionConfig.model_type == "blip2_vision_model"
    assert blip2_hf.Blip2QFormerConfig.model_type == "blip2_qformer"
    assert set(blip2_hf.__all__) <= set(dir(blip2_hf))
    with pytest.raises(AttributeError, match="no attribute 'Blip3'"):
        blip2_hf.Blip3  # noqa: B018
    assert make_model().config.image_token_id == VOCAB_SIZE - 1
