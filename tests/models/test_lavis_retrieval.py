"""Retrieval against numbers that the authors' code computed, one pair at a time (random weights)."""

import pytest
import torch
from lavis_cases import FIXTURES, ITM, STAGE1, lavis_config, load, read, tensors
from transformers import BertTokenizerFast

from blip2_hf import Blip2ForImageTextRetrieval, load_lavis_checkpoint
from blip2_hf.evaluation import TwoStageRetrieval


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def stage1() -> Blip2ForImageTextRetrieval:
    """Without the language-modelling head, which tells stage 1 from retrieval."""
    weights = {k: v for k, v in tensors(STAGE1, "state_dict").items() if not k.startswith("Qformer.cls.")}
    return load_lavis_checkpoint(weights, config=lavis_config(STAGE1))


@pytest.fixture(scope="module")
def itm() -> Blip2ForImageTextRetrieval:
    # The file has a language-modelling head, which retrieval leaves
    return load(ITM, model_class=Blip2ForImageTextRetrieval)


def test_the_class_is_told_from_the_keys(stage1):
    assert type(stage1) is Blip2ForImageTextRetrieval
    assert stage1.temperature.weight.item() == pytest.approx(0.07)


def test_pairs_one_by_one_and_together(itm):
    inputs, expected = tensors(ITM, "inputs"), tensors(ITM, "outputs")
    with torch.no_grad():
        for i in range(4):
            batch = inputs["image"][i : i + 1], inputs[f"ids_{i}"], inputs[f"mask_{i}"]
            close(itm(*batch, use_image_text_matching_head=True).logits_per_image, expected[f"itm_{i}"])
            close(itm(*batch).logits_per_image, expected[f"itc_{i}"])
        batch = inputs["image"], inputs["ids_batch"], inputs["mask_batch"]
        matching = itm(*batch, use_image_text_matching_head=True).logits_per_image
        close(matching, expected["itm_batch_padded"])
        close(matching.softmax(1)[:, 1], expected["itm_prob_batch"])
        close(itm(*batch).logits_per_image.diagonal()[:, None], expected["itc_batch_padded"])


def test_features(stage1):
    expected, inputs = tensors(STAGE1, "eval_outputs"), tensors(STAGE1, "inputs")
    with torch.no_grad():
        images = stage1.get_image_features(pixel_values=inputs["image"])
        texts = stage1.get_text_features(expected["extract_text_input_ids"], expected["extract_text_attention_mask"])
        _, multimodal = stage1._match(
            expected["extract_text_input_ids"], expected["extract_text_attention_mask"], None, None, inputs["image"]
        )
    close(images.last_hidden_state, expected["extract_image_embeds"])
    close(images.pooler_output, expected["extract_image_embeds_proj"])
    close(texts.pooler_output, expected["extract_text_embeds_proj"][:, 0])
    close(multimodal.last_hidden_state, expected["extract_multimodal"])


def test_two_stages(stage1):
    """LAVIS's score matrices: ITM + ITC for the first k of each row by ITC, -100 elsewhere."""
    expected, settings = tensors(STAGE1, "eval_outputs"), read(STAGE1, "outputs")["retrieval"]
    tokenizer = BertTokenizerFast(str(FIXTURES / "tokenizers" / "bert" / "vocab.txt"))
    retrieval = TwoStageRetrieval(stage1, tokenizer, k=settings["k_test"], show_progress=False)
    image_embeds = stage1.get_image_embeds(tensors(STAGE1, "inputs")["image"])
    ranked = retrieval(image_embeds, settings["texts"])
    close(ranked.image_to_text.matrix(len(settings["texts"]), fill=-100.0), expected["retrieval_i2t"])
    close(ranked.text_to_image.matrix(len(image_embeds), fill=-100.0), expected["retrieval_t2i"])
