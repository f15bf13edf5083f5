"""How queries start: as words of BERT, or from a normal distribution."""

import copy

import pytest
import torch
import transformers
from stage1 import make_inputs
from tiny import LANGUAGE_MODELS

from blip2_hf import Blip2ForConditionalGeneration, Blip2ForPreTraining
from blip2_hf.models.bert_weights import start_queries_from_words


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def tower():
    return transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, patch_size=14, image_size=28))


def make_bert(vocab_size: int = 64, positions: int = 40) -> transformers.BertModel:
    return transformers.BertModel(
        transformers.BertConfig(
            **SIZES, vocab_size=vocab_size, intermediate_size=64, max_position_embeddings=positions
        )
    )


def make(tower, bert, seed: int = 0, num_query_tokens: int = 6, **kwargs) -> Blip2ForPreTraining:
    torch.manual_seed(seed)
    ids = {"bos_token_id": bert.config.vocab_size, "vocab_size": bert.config.vocab_size + 1}
    return Blip2ForPreTraining.from_encoders_pretrained(
        tower, bert, num_query_tokens=num_query_tokens, **ids, **kwargs
    )


def words_of(bert, queries: torch.Tensor) -> list[int]:
    """Return the word of each query, which is the only one whose embedding is the query without its position."""
    embeddings = bert.embeddings
    positions = embeddings.position_embeddings.weight
    distances = [
        (query - positions[index % len(positions)] - embeddings.word_embeddings.weight).norm(dim=1)
        for index, query in enumerate(queries)
    ]
    assert all((distance < 1e-4).sum() == 1 for distance in distances)
    return [int(distance.argmin()) for distance in distances]


def test_queries_start_as_different_words_in_their_places(tower):
    bert = make_bert()
    words = words_of(bert, make(tower, bert).query_tokens.weight[0].detach())
    # Neither special tokens, which are at the beginning of a vocabulary, nor added ones, at its end
    assert len(set(words)) == 6 and all(16 <= word < 48 for word in words)


def test_the_words_go_by_the_seed(tower):
    bert = make_bert()
    first, again, other = (make(tower, bert, seed).query_tokens.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_words_change_nothing_but_the_queries(tower):
    bert = make_bert()
    words, state = make(tower, bert), torch.get_rng_state()
    normal = make(tower, bert, query_initialization="normal")
    assert torch.equal(torch.get_rng_state(), state)
    expected = normal.state_dict()
    differing = [name for name, weight in words.state_dict().items() if not torch.equal(weight, expected[name])]
    assert differing == ["query_tokens.weight"]


def test_normal_is_the_start_of_a_model_that_is_made_from_a_configuration(tower):
    normal = make(tower, make_bert(), query_initialization="normal")
    torch.manual_seed(0)
    plain = Blip2ForPreTraining(copy.deepcopy(normal.config), vision_model=tower)
    assert torch.equal(normal.query_tokens.weight, plain.query_tokens.weight)
    assert 0.015 < plain.query_tokens.weight.std() < 0.025


@pytest.mark.parametrize(("vocab_size", "positions", "count"), [(64, 4, 6), (8, 40, 6), (3, 4, 6), (64, 40, 1)])
def test_more_queries_than_words_or_positions(vocab_size, positions, count):
    bert, queries = make_bert(vocab_size, positions), torch.empty(1, count, 32)
    start_queries_from_words(bert, queries)
    words = words_of(bert, queries[0])
    assert len(set(words)) == min(count, vocab_size - 2 * (vocab_size // 4))


def test_queries_keep_their_dtype():
    bert, queries = make_bert().to(torch.bfloat16), torch.nn.Parameter(torch.empty(1, 6, 32))
    start_queries_from_words(bert, queries)
    assert queries.dtype == torch.float32 and queries.requires_grad and queries.isfinite().all()


def test_another_name_is_refused(tower):
    with pytest.raises(ValueError, match="""query_initialization is 'word': "words" or "normal" was expected"""):
        make(tower, make_bert(), query_initialization="word")


def test_the_start_is_saved_and_not_drawn_again(tower, tmp_path):
    model = make(tower, make_bert(), cross_attention_frequency=1).eval()
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    loaded = Blip2ForPreTraining.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.query_tokens.weight, model.query_tokens.weight)
    inputs = make_inputs(2)
    torch.testing.assert_close(
        loaded(**inputs, return_loss=False).image_features, model(**inputs, return_loss=False).image_features
    )


def test_stage_2_without_stage_1(tower, tmp_path):
    bert = make_bert()
    language_model = transformers.AutoModelForCausalLM.from_config(LANGUAGE_MODELS["opt"]())

    def join(stage1=None, **kwargs):
        torch.manual_seed(0)
        return Blip2ForConditionalGeneration.from_pretrained_parts(stage1, language_model, **kwargs)

    parts = {"vision_model": tower, "text_encoder": bert, "num_query_tokens": 6}
    assert len(set(words_of(bert, join(**parts).query_tokens.weight[0].detach()))) == 6
    assert 0.015 < join(**parts, query_initialization="normal").query_tokens.weight.std() < 0.025
    with pytest.raises(ValueError, match="query_initialization: stage1 has its own"):
        join(make(tower, bert), query_initialization="words")
