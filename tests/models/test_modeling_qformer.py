import contextlib
from unittest import mock

import pytest
import torch
import transformers
from tiny import QFORMER, make_config, randomize

from blip2_hf import Blip2Model, Blip2QFormerConfig, Blip2QFormerModel, block_attention_mask
from blip2_hf.models.modeling_qformer import (
    Blip2TextEmbeddings,
    FoldedLinear,
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


def make_layernorm(dtype: torch.dtype) -> torch.nn.LayerNorm:
    norm = torch.nn.LayerNorm(WIDTH).to(dtype)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    return norm


def folds(qformer: Blip2QFormerModel, image: torch.Tensor, norm: torch.nn.LayerNorm, monkeypatch) -> bool:
    """Whether the projections of an image are given the weight and the bias of the LayerNorm."""
    given, forward = [], FoldedLinear.forward
    monkeypatch.setattr(FoldedLinear, "forward", lambda self, *args: given.append(len(args)) or forward(self, *args))
    qformer.project_image(image, norm)
    monkeypatch.undo()
    assert len(given) == 4 and len(set(given)) == 1  # keys and values of two layers
    return given[0] == 3


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_folded_layernorm_equals_layernorm_and_projection(monkeypatch, dtype, tolerance):
    qformer, norm = make_qformer().to(dtype).train(), make_layernorm(dtype)
    assert qformer.config.attention_probs_dropout_prob > 0
    queries, _, image = (x.to(dtype) for x in inputs())
    parameters = {**dict(qformer.named_parameters()), "scale": norm.weight, "shift": norm.bias}
    assert folds(qformer, image, norm, monkeypatch)

    def step(**images):
        torch.manual_seed(0)
        output = qformer(query_embeds=queries, query_length=4, **images).last_hidden_state
        gradients = torch.autograd.grad(output.sin().sum(), list(parameters.values()), allow_unused=True)
        return output, {name: x for name, x in zip(parameters, gradients, strict=True) if x is not None}

    expected, expected_gradients = step(encoder_hidden_states=norm(image))
    actual, gradients = step(encoder_key_values=qformer.project_image(image, norm))
    assert {"scale", "shift"} <= gradients.keys()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradients, expected_gradients, rtol=tolerance, atol=100 * tolerance)


def test_layernorm_is_folded_only_if_nothing_but_it_is_trained(monkeypatch):
    qformer, norm, (_, _, image) = make_qformer(), make_layernorm(torch.float32), inputs()
    assert folds(qformer, image, norm, monkeypatch)
    # A tower that is trained wants a gradient into its features
    assert not folds(qformer, image.clone().requires_grad_(), norm, monkeypatch)
    with torch.no_grad():
        assert not folds(qformer, image, norm, monkeypatch)
    assert not folds(qformer, image, norm.requires_grad_(False), monkeypatch)


def test_layernorm_is_not_folded_into_an_adapter():
    qformer, norm, (_, _, image) = make_qformer(), make_layernorm(torch.float32), inputs()
    attention = qformer.encoder.layer[0].crossattention.attention
    expected = qformer.project_image(norm(image))
    attention.key = torch.nn.Sequential(attention.key)
    torch.testing.assert_close(qformer.project_image(image, norm), expected)


def test_rows_are_divided_among_sets_of_images():
    qformer = make_qformer()
    queries, _, image = inputs()
    sets = [qformer.project_image(image), qformer.project_image(image.flip(1) * 2)]
    rows = torch.cat([queries, queries])
    actual = qformer(query_embeds=rows, encoder_key_values=sets).last_hidden_state
    expected = [qformer(query_embeds=queries, encoder_key_values=images).last_hidden_state for images in sets]
    torch.testing.assert_close(actual, torch.cat(expected))


def test_an_image_serves_several_rows():
    qformer = make_qformer()
    queries, _, image = inputs()
    rows = torch.cat([queries, queries.flip(0), -queries])
    actual = qformer(query_embeds=rows, encoder_key_values=qformer.project_image(image)).last_hidden_state
    expected = qformer(query_embeds=rows, encoder_hidden_states=image.repeat_interleave(3, dim=0)).last_hidden_state
    torch.testing.assert_close(actual, expected)
    with pytest.raises(ValueError, match="one image for each row"):
        qformer(
            query_embeds=rows,
            encoder_key_values=qformer.project_image(image),
            encoder_attention_mask=torch.ones(6, image.shape[1]),
        )
    with pytest.raises(ValueError, match="5 rows were given with 2 images: the same number of rows"):
        qformer(query_embeds=rows[:5], encoder_key_values=qformer.project_image(image))
    sets = [qformer.project_image(image)] * 2
    with pytest.raises(ValueError, match="encoder_attention_mask was given with 2 sets of images"):
        qformer(query_embeds=rows[:4], encoder_key_values=sets, encoder_attention_mask=torch.ones(4, image.shape[1]))


def test_dropout_of_adapters_is_the_same_when_states_are_computed_again():
    """The backward pass computes the second half of a feed-forward network again, and adapters in it with it."""
    from peft import LoraConfig, inject_adapter_in_model

    def step(computes_again: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        config = LoraConfig(target_modules=["output_query.dense"], lora_dropout=0.5, init_lora_weights=False)
        qformer = inject_adapter_in_model(config, make_qformer(hidden_dropout_prob=0.0)).train()
        queries, _, image = inputs()
        with contextlib.ExitStack() as stack:
            if not computes_again:
                plainly = lambda function, *args, use_reentrant, **kwargs: function(*args, **kwargs)  # noqa: E731
                stack.enter_context(mock.patch("blip2_hf.models.modeling_qformer.checkpoint", plainly))
            output = qformer(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
            trained = [p for name, p in qformer.named_parameters() if "lora_" in name]
            return torch.autograd.grad(output.sin().sum(), trained)

    torch.testing.assert_close(step(True), step(False))
