"""
Every family of language models in transformers: greedy generation is the argmax of forward, and scores of texts are
those of forward, in a batch as alone.
"""

import re

import pytest
import torch
import transformers
from language_models import CAUSAL, MOST_PARAMETERS, SEQ2SEQ, randomize_lightly, tiny_text_config
from packaging import version
from paths import DOCS
from scoring import pad_candidates, scores_by_forward
from tiny import NUM_QUERIES, VOCAB_SIZE, make_config

from blip2_hf import Blip2ForConditionalGeneration
from blip2_hf.models.backbones import language_model_class


IMAGE = VOCAB_SIZE  # beyond the vocabulary, so that no model writes it
ROWS = [[IMAGE] * NUM_QUERIES + [0, 5, 6, 7, 8, 9], [IMAGE] * NUM_QUERIES + [0, 30, 31]]
NEW = 6
CANDIDATES = [[10, 11, 12, 13], [20], [30, 31, 32]]
# What docs/python.md says of them: an error, because they read token ids alone, or no padding
REFUSED = {
    "cpmant",
    "deepseek_v4",
    "fsmt",
    "gemma4",
    "gemma4_text",
    "gemma4_unified",
    "openai-gpt",
    "prophetnet",
    "reformer",
    "xlm",
    "xlnet",
}
# These read padding, and take texts of one length
READ_PADDING = {"git", "recurrent_gemma", "roformer", "rwkv", "trocr"}
FAMILIES = sorted({*CAUSAL, *SEQ2SEQ})


def make_tiny(model_type: str) -> Blip2ForConditionalGeneration:
    """Skips a family whose configuration can't be made small by the names of its fields alone."""
    torch.manual_seed(0)
    try:
        config = tiny_text_config(model_type)
        with torch.device("meta"):
            language_model = language_model_class(config).from_config(config)
    except Exception as error:  # a family checks its configuration in its own way
        pytest.skip(f"no tiny configuration: {error}")
    if sum(parameter.numel() for parameter in language_model.parameters()) > MOST_PARAMETERS:
        pytest.skip("no tiny configuration: the model is too large")
    blip2 = Blip2ForConditionalGeneration(make_config(None, text_config=config, image_token_index=IMAGE))
    randomize_lightly(blip2).eval()
    ids = {"input_ids": torch.tensor([[0, 5, 6, 7, 8, 9]])}
    try:
        blip2.language_model(**ids, **({"decoder_input_ids": ids["input_ids"]} if config.is_encoder_decoder else {}))
    except Exception as error:  # numbers that do not go together
        pytest.skip(f"no tiny configuration: the language model alone says {error}")
    return blip2


@torch.no_grad()
def greedy_by_forward(model, pixel_values, row: list[int], start: list[int], count: int) -> list[int]:
    tokens = list(start)
    for _ in range(count):
        inputs = {"input_ids": [tokens]}
        if model.config.is_encoder_decoder:
            inputs = {"input_ids": [row], "decoder_input_ids": [tokens]}
        inputs = {name: torch.tensor(value) for name, value in inputs.items()}
        tokens.append(model(pixel_values, **inputs, use_cache=False).logits[0, -1].argmax().item())
    return tokens


def alone_and_together(model) -> tuple[list[list[int]], list[list[int]]]:
    """What is generated for each row alone, and for all of them in a padded batch."""
    greedy, pixel_values, alone = {"max_new_tokens": NEW, "do_sample": False}, torch.randn(2, 3, 28, 28), []
    for index, row in enumerate(ROWS):
        image = pixel_values[index : index + 1]
        generated = model.generate(image, torch.tensor([row]), **greedy)[0].tolist()
        start = generated[: 1 if model.config.is_encoder_decoder else len(row)]
        assert generated == greedy_by_forward(model, image, row, start, len(generated) - len(start))
        alone.append(generated[len(start) :])
    length, batch = max(map(len, ROWS)), padded_rows()
    if model.config.text_config.model_type in READ_PADDING:
        for call in (model, model.generate):
            with pytest.raises(ValueError, match="read the padding"):
                call(pixel_values, **batch)
        return alone, alone
    together = model.generate(pixel_values, **batch, **greedy).tolist()
    return alone, [row[1 if model.config.is_encoder_decoder else length :] for row in together]


def padded_rows() -> dict[str, torch.Tensor]:
    length = max(map(len, ROWS))
    return {
        "input_ids": torch.tensor([[1] * (length - len(row)) + row for row in ROWS]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ROWS]),
    }


def assert_scores_are_those_of_forward(model):
    pixel_values = torch.randn(2, 3, 28, 28)
    expected = scores_by_forward(model, pixel_values, ROWS, CANDIDATES)
    labels = pad_candidates(CANDIDATES)
    if model.config.text_config.model_type in READ_PADDING:
        rows = [
            model.score_texts(labels, pixel_values[number : number + 1], torch.tensor([row]))
            for number, row in enumerate(ROWS)
        ]
        actual = torch.cat(rows)
    else:
        actual = model.score_texts(labels, pixel_values, **padded_rows(), chunk_size=2)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_greedy_is_the_argmax_of_forward_alone_and_in_a_batch(model_type):
    model = make_tiny(model_type)
    if model_type in REFUSED:
        with pytest.raises((ValueError, TypeError, RuntimeError, AttributeError, IndexError)):
            alone_and_together(model)
        return
    alone, together = alone_and_together(model)
    assert together == alone


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted({*FAMILIES} - REFUSED))
def test_scores_of_texts_are_those_of_forward(model_type):
    assert_scores_are_those_of_forward(make_tiny(model_type))


# Before, these alone write something else than the argmax of their own forward
FIXED = pytest.mark.skipif(version.parse(transformers.__version__) < version.parse("5.24"), reason="transformers' own")


@pytest.mark.parametrize(
    "model_type",
    [
        "rwkv",
        "mamba",
        "minimax",
        "blenderbot",
        pytest.param("t5gemma", marks=FIXED),
        pytest.param("roformer", marks=FIXED),
    ],
)
def test_hooks_of_language_models_are_asked(model_type):
    """Of the slow test, those whose states or windows are kept in ways of their own."""
    model = make_tiny(model_type)
    alone, together = alone_and_together(model)
    assert together == alone
    assert_scores_are_those_of_forward(model)


def test_the_docs_list_what_does_not_work():
    page = (DOCS / "python.md").read_text(encoding="utf-8")
    section = page.partition("### Language models")[2].partition("\n## ")[0]
    assert set(re.findall("`([a-z0-9_-]+)`", section)) >= REFUSED | READ_PADDING
