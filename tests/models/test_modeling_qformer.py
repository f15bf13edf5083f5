import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny import QFORMER, make_config, make_pixel_values, randomize
from torch.nn.utils import prune

from blip2_hf import Blip2Model, Blip2QFormerConfig, Blip2QFormerModel, block_attention_mask
from blip2_hf.models.image_states import Blip2ImageProjection, Blip2ImageStates
from blip2_hf.models.modeling_qformer import (
    Blip2TextEmbeddings,
    additive_mask,
    copy_bert_weights,
)


WIDTH = 24


def make_qformer(**kwargs) -> Blip2QFormerModel:
    fields = {**QFORMER, "encoder_hidden_size": WIDTH, "use_qformer_text_input": True}
    return randomize(Blip2QFormerModel(Blip2QFormerConfig(**(fields | kwargs)))).eval()


def make_bert(kind=transformers.BertModel, **kwargs):
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = transformers.BertConfig(**{name: QFORMER[name] for name in names}, max_position_embeddings=40, **kwargs)
    return randomize(kind(config)).eval()


def inputs(batch_size=2, query_length=4, text_length=5):
    queries, text = torch.randn(batch_size, query_length, 32), torch.randn(batch_size, text_length, 32)
    return queries, text, torch.randn(batch_size, 7, WIDTH)


@pytest.mark.parametrize("case", ["queries", "text", "both"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_equals_transformers(case, attn):
    ours = make_qformer()
    ours.set_attn_implementation(attn)
    fields = {**QFORMER, "encoder_hidden_size": WIDTH, "use_qformer_text_input": True}
    theirs = transformers.Blip2QFormerModel(transformers.models.blip_2.Blip2QFormerConfig(**fields)).eval()
    theirs.load_state_dict(ours.state_dict())
    queries, text, image = inputs()
    mask = torch.ones(2, {"queries": 4, "text": 5, "both": 9}[case])
    if case != "queries":
        mask[0, -2:] = 0
    embeds = {"queries": queries, "text": text, "both": torch.cat([queries, text], dim=1)}[case]
    kwargs = {"query_embeds": embeds, "query_length": 0 if case == "text" else 4, "attention_mask": mask}
    if case != "text":
        kwargs["encoder_hidden_states"] = image
    expected = theirs(**kwargs).last_hidden_state
    actual = ours(**kwargs).last_hidden_state
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)


def test_block_mask_is_three_passes_in_one():
    qformer = make_qformer()
    queries, text, image = inputs()
    dec_text = torch.randn_like(text)
    tokens = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    one_pass = qformer(
        query_embeds=torch.cat([queries, text, dec_text], dim=1),
        query_length=4,
        attention_mask=block_attention_mask(4, tokens),
        encoder_hidden_states=image,
    ).last_hidden_state

    expected = qformer(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
    torch.testing.assert_close(one_pass[:, :4], expected)

    expected = qformer(query_embeds=text, query_length=0, attention_mask=tokens).last_hidden_state
    torch.testing.assert_close(one_pass[:, 4:9][tokens.bool()], expected[tokens.bool()])

    causal = torch.ones(5, 5).tril() * tokens[:, None, :]
    mask = torch.zeros(2, 9, 9)
    mask[:, :, :4] = 1
    mask[:, 4:, 4:] = causal
    expected = qformer(
        query_embeds=torch.cat([queries, dec_text], dim=1),
        query_length=4,
        attention_mask=mask,
        encoder_hidden_states=image,
    ).last_hidden_state[:, 4:]
    torch.testing.assert_close(one_pass[:, 9:][tokens.bool()], expected[tokens.bool()])


def test_block_mask_by_hand():
    mask = block_attention_mask(1, torch.tensor([[1, 1, 0]]))[0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 1, 1, 0],
    ]


def test_image_is_projected_once():
    qformer = make_qformer()
    queries, text, image = inputs()
    key_values = qformer.project_image(image)
    assert len(key_values) == 2  # layers 0 and 2 of 3
    assert key_values[0][0].shape == (2, 4, 7, 8)
    embeds = torch.cat([queries, text], dim=1)
    expected = qformer(query_embeds=embeds, query_length=4, encoder_hidden_states=image).last_hidden_state
    actual = qformer(query_embeds=embeds, query_length=4, encoder_key_values=key_values).last_hidden_state
    assert torch.equal(actual, expected)
    swapped = tuple((key.flip(0), value.flip(0)) for key, value in key_values)
    actual = qformer(query_embeds=embeds, query_length=4, encoder_key_values=swapped).last_hidden_state
    expected = qformer(query_embeds=embeds, query_length=4, encoder_hidden_states=image.flip(0)).last_hidden_state
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("mask_dims", [2, 3, 4])
def test_fewer_outputs_than_inputs(attn, mask_dims):
    qformer = make_qformer()
    qformer.set_attn_implementation(attn)
    queries, text, image = inputs()
    mask = torch.ones(2, 9, 9).tril()
    mask = {2: mask[:, -1] * torch.arange(9).lt(7), 3: mask, 4: mask[:, None]}[mask_dims]
    given = {
        "query_embeds": torch.cat([queries, text], dim=1),
        "query_length": 4,
        "attention_mask": mask,
        "encoder_hidden_states": image,
    }
    expected = qformer(**given).last_hidden_state
    for length in (4, 6):
        actual = qformer(**given, output_length=length).last_hidden_state
        torch.testing.assert_close(actual, expected[:, :length])


@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_cross_attention_frequency(frequency):
    qformer = make_qformer(cross_attention_frequency=frequency)
    found = [index for index, layer in enumerate(qformer.encoder.layer) if layer.has_cross_attention]
    assert found == list(range(0, 3, frequency))


def test_padded_image_features_are_not_seen():
    qformer = make_qformer()
    queries, _, image = inputs()
    mask = torch.ones(2, 7)
    mask[:, 5:] = 0
    expected = qformer(query_embeds=queries, encoder_hidden_states=image[:, :5]).last_hidden_state
    actual = qformer(query_embeds=queries, encoder_hidden_states=image, encoder_attention_mask=mask).last_hidden_state
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kind", [transformers.BertModel, transformers.BertForMaskedLM])
@pytest.mark.parametrize("reads_text", [True, False])
def test_starts_from_any_bert(kind, reads_text, tmp_path):
    bert = make_bert(kind)
    bert.save_pretrained(tmp_path)
    qformer = Blip2QFormerModel.from_bert_pretrained(
        str(tmp_path), encoder_hidden_size=WIDTH, use_qformer_text_input=reads_text
    )
    source = getattr(bert, "bert", bert)
    for ours, theirs in zip(qformer.encoder.layer, source.encoder.layer, strict=True):
        assert torch.equal(ours.attention.attention.query.weight, theirs.attention.self.query.weight)
        assert torch.equal(ours.intermediate_query.dense.weight, theirs.intermediate.dense.weight)
        assert torch.equal(ours.output_query.LayerNorm.weight, theirs.output.LayerNorm.weight)
        assert hasattr(ours, "intermediate") is reads_text
        if ours.has_cross_attention:
            assert abs(ours.crossattention.attention.key.weight.std().item() - 0.02) < 0.002
            assert not ours.crossattention.attention.key.bias.any()


def test_text_alone_is_bert_without_token_types():
    bert = make_bert()
    with torch.no_grad():
        bert.embeddings.token_type_embeddings.weight.zero_()
    qformer = Blip2QFormerModel.from_bert_pretrained(bert, encoder_hidden_size=WIDTH, use_qformer_text_input=True)
    embeddings = Blip2TextEmbeddings(qformer.config)
    copy_bert_weights(bert, qformer, embeddings)
    input_ids, mask = torch.randint(2, 60, (2, 6)), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    expected = bert(input_ids=input_ids, attention_mask=mask).last_hidden_state
    actual = qformer.eval()(query_embeds=embeddings(input_ids), query_length=0, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()])


def test_queries_start_from_a_normal_distribution():
    model = Blip2Model(make_config(None, num_query_tokens=32, qformer_config={**QFORMER, "hidden_size": 256}))
    assert abs(model.query_tokens.weight.std().item() - 0.02) < 0.001
    assert model.query_tokens.weight[0].unique(dim=0).shape[0] == 32


def test_errors_say_what_is_missing():
    queries, text, image = inputs()
    with pytest.raises(ValueError, match="no image"):
        make_qformer()(query_embeds=queries)
    with pytest.raises(ValueError, match="use_qformer_text_input=True"):
        make_qformer(use_qformer_text_input=False)(query_embeds=text, query_length=0)
    with pytest.raises(ValueError, match="A Q-Former starts from a BERT"):
        Blip2QFormerModel.from_bert_pretrained(
            transformers.ViTModel(transformers.ViTConfig(hidden_size=32, num_hidden_layers=1)), encoder_hidden_size=24
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_half_precision_has_no_nan_even_where_all_is_masked(dtype, attn):
    qformer = make_qformer().to(dtype)
    qformer.set_attn_implementation(attn)
    queries, text, image = (x.to(dtype) for x in inputs())
    mask = torch.ones(2, 9)
    mask[1] = 0
    outputs = qformer(
        query_embeds=torch.cat([queries, text], dim=1),
        query_length=4,
        attention_mask=mask,
        encoder_hidden_states=image,
    )
    assert torch.isfinite(outputs.last_hidden_state).all()


def test_additive_mask_shapes():
    for shape, expected in {(2, 3): (2, 1, 1, 3), (2, 4, 3): (2, 1, 4, 3), (2, 1, 4, 3): (2, 1, 4, 3)}.items():
        assert additive_mask(torch.ones(shape).bool(), torch.float32).shape == expected
    assert additive_mask(None, torch.float32) is None


def test_flex_attention_equals_eager():
    model = randomize(Blip2Model(make_config(None))).eval()
    pixel_values = make_pixel_values()
    expected = model(pixel_values).last_hidden_state
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


NARROW = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}


def record_projections(monkeypatch) -> list[torch.nn.Module]:
    """Which projections of the image are called from now on."""
    called, forward = [], Blip2ImageProjection.forward
    monkeypatch.setattr(
        Blip2ImageProjection, "forward", lambda self, *args: called.append(self) or forward(self, *args)
    )
    return called


@pytest.mark.parametrize("text_length", [0, 3])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_scores_without_keys_equal_attention_to_keys(monkeypatch, dtype, tolerance, text_length):
    """Where a head has fewer queries than channels, a step on a CPU makes no keys of frozen features."""
    qformer = make_qformer(**NARROW, use_qformer_text_input=text_length > 0).to(dtype).train()
    assert qformer.config.attention_probs_dropout_prob > 0
    norm = torch.nn.LayerNorm(WIDTH).to(dtype)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    queries, image = torch.randn(2, 32 + text_length, 256, dtype=dtype), torch.randn(2, 257, WIDTH, dtype=dtype)
    parameters = {**dict(qformer.named_parameters()), "scale": norm.weight, "shift": norm.bias}
    called = record_projections(monkeypatch)
    key = qformer.encoder.layer[0].crossattention.attention.key

    def step(states):
        torch.manual_seed(0)
        output = qformer(query_embeds=queries, query_length=32, encoder_hidden_states=states).last_hidden_state
        gradients = torch.autograd.grad(output.sin().sum(), list(parameters.values()))
        return output, dict(zip(parameters, gradients, strict=True))

    # A gradient into the features needs their keys
    expected, expected_gradients = step(norm(image.clone().requires_grad_()))
    assert key in called
    called.clear()
    actual, gradients = step(Blip2ImageStates.after_layernorm(image, norm))
    assert called and key not in called
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradients, expected_gradients, rtol=tolerance, atol=100 * tolerance)
    # Shifts all scores of a query alike; it has a gradient all the same, for DDP waits for one
    assert gradients["encoder.layer.0.crossattention.attention.key.bias"].eq(0).all()


KEYS_ARE_MADE = {
    "eval": lambda qformer, key: qformer.eval(),
    "layer in eval": lambda qformer, key: qformer.encoder.layer[0].crossattention.eval(),
    "checkpointing": lambda qformer, key: qformer.gradient_checkpointing_enable(),
    "frozen": lambda qformer, key: key.requires_grad_(False),
    "hook": lambda qformer, key: key.register_forward_hook(lambda *args: None),
    "pruned": lambda qformer, key: prune.random_unstructured(key, "weight", 0.5),
    "accelerate": lambda qformer, key: add_hook_to_module(key, AlignDevicesHook()),
    "eager": lambda qformer, key: qformer.set_attn_implementation("eager"),
}


@pytest.mark.parametrize("change", ["nothing", "mask", "more rows", "many queries", *KEYS_ARE_MADE])
def test_keys_are_made_where_they_are_needed(monkeypatch, change):
    qformer = make_qformer(**NARROW).train()
    key = qformer.encoder.layer[0].crossattention.attention.key
    called = record_projections(monkeypatch)
    if change in KEYS_ARE_MADE:
        KEYS_ARE_MADE[change](qformer, key)
    rows, query_length = (4 if change == "more rows" else 2), (200 if change == "many queries" else 32)
    qformer(
        query_embeds=torch.randn(rows, query_length, 256),
        encoder_hidden_states=torch.randn(2, 257, WIDTH),
        encoder_attention_mask=torch.ones(2, 257) if change == "mask" else None,
    ).last_hidden_state.sin().sum().backward()
    assert (key in called) == (change != "nothing")
    weight = key.weight_orig if change == "pruned" else key.weight
    assert change == "frozen" or weight.grad.abs().sum() > 0
