"""Every family of language models in transformers: greedy generation is the argmax of forward, in a batch as alone."""

import pytest
import torch
from language_models import CAUSAL, MOST_PARAMETERS, SEQ2SEQ, randomize_lightly, tiny_text_config
from tiny import NUM_QUERIES, VOCAB_SIZE, make_config

from blip2_hf import Blip2ForConditionalGeneration
from blip2_hf.parts import language_model_class


IMAGE = VOCAB_SIZE  # beyond the vocabulary, so that no model writes it
ROWS = [[IMAGE] * NUM_QUERIES + [0, 5, 6, 7, 8, 9], [IMAGE] * NUM_QUERIES + [0, 30, 31]]
NEW = 6
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
    return randomize_lightly(blip2).eval()


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


def new_tokens(model, pixel_values) -> tuple[list[list[int]], list[list[int]]]:
    """What is generated for each row alone, and for all of them in a padded batch."""
    greedy = {"max_new_tokens": NEW, "do_sample": False}
    alone = []
    for index, row in enumerate(ROWS):
        image = pixel_values[index : index + 1]
        generated = model.generate(image, torch.tensor([row]), **greedy)[0].tolist()
        start = generated[: 1 if model.config.is_encoder_decoder else len(row)]
        assert generated == greedy_by_forward(model, image, row, start, len(generated) - len(start))
        alone.append(generated[len(start) :])
    length = max(map(len, ROWS))
    ids = torch.tensor([[1] * (length - len(row)) + row for row in ROWS])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ROWS])
    together = model.generate(pixel_values, ids, mask, **greedy).tolist()
    return alone, [row[1 if model.config.is_encoder_decoder else length :] for row in together]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_greedy_is_the_argmax_of_forward_alone_and_in_a_batch(model_type):
    model = make_tiny(model_type)
    alone, together = new_tokens(model, torch.randn(2, 3, 28, 28))
    assert together == alone
