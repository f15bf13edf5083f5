"""sentence-transformers opens models of stage 1 and of retrieval, and its MaxSim is the models' own similarity."""

import json
import os
import subprocess
import sys

import pytest
import torch
from saved_models import save_stage1
from tiny import CAPTIONS, make_image

from blip2_hf import Blip2ForImageTextRetrieval, Blip2ForPreTraining, Blip2Processor


sentence_transformers = pytest.importorskip("sentence_transformers")
if not hasattr(sentence_transformers, "MultiVectorEncoder"):
    pytest.skip("this sentence-transformers has no multi-vector models", allow_module_level=True)


@pytest.fixture(scope="module", params=["stage1", "retrieval"])
def folder(request, tmp_path_factory):
    stage1 = save_stage1(tmp_path_factory.mktemp("stage1"))
    if request.param == "stage1":
        return stage1
    retrieval = tmp_path_factory.mktemp("retrieval")
    Blip2ForImageTextRetrieval.from_pretrained(stage1).save_pretrained(retrieval)
    Blip2Processor.from_pretrained(stage1).save_pretrained(retrieval)
    return retrieval


@pytest.fixture(scope="module")
def encoder(folder):
    return sentence_transformers.MultiVectorEncoder(str(folder), trust_remote_code=True, device="cpu")


@pytest.fixture(scope="module")
def images():
    return [make_image(seed) for seed in range(3)]


def own_scores(folder, images) -> torch.Tensor:
    """`logits_per_text` of the model itself."""
    model, processor = (c.from_pretrained(folder) for c in (Blip2ForImageTextRetrieval, Blip2Processor))
    texts = processor.tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    pixel_values = processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model.eval()(pixel_values, texts.input_ids, texts.attention_mask).logits_per_text


def scores(encoder, images) -> torch.Tensor:
    return encoder.similarity(encoder.encode_query(CAPTIONS), encoder.encode_document(images))


def test_maxsim_is_the_models_own_similarity(encoder, folder, images):
    torch.testing.assert_close(scores(encoder, images), own_scores(folder, images), rtol=0, atol=1e-5)
    assert [len(vectors) for vectors in encoder.encode_query(CAPTIONS)] == [1] * len(CAPTIONS)
    num_queries = encoder[0].model.config.num_query_tokens
    assert {vectors.shape for vectors in encoder.encode_document(images)} == {
        (num_queries, encoder[0].get_embedding_dimension())
    }


def test_pictures_by_their_paths_and_in_dicts(encoder, images, tmp_path):
    images[0].save(tmp_path / "a.png")
    expected = encoder.encode_document(images[0])
    for given in (str(tmp_path / "a.png"), {"image": images[0]}):
        torch.testing.assert_close(encoder.encode_document([given])[0], expected)


def test_a_prompt_and_what_is_saved(encoder, folder, images, tmp_path):
    encoder.prompts = {**encoder.prompts, "query": "a photo of "}
    try:
        encoder.save_pretrained(str(tmp_path))
        prompted = encoder.encode_query(CAPTIONS)
    finally:
        encoder.prompts = {**encoder.prompts, "query": ""}
    again = sentence_transformers.MultiVectorEncoder(str(tmp_path), trust_remote_code=True, device="cpu")
    assert again.prompts["query"] == "a photo of "
    torch.testing.assert_close(again.encode_query(CAPTIONS), prompted)
    assert not torch.equal(prompted[0], encoder.encode_query(CAPTIONS)[0])
    # The folder stays one of this library
    torch.testing.assert_close(own_scores(tmp_path, images), own_scores(folder, images))


def test_texts_and_pictures_together_are_refused(encoder, images):
    with pytest.raises(ValueError, match="modalit"):
        encoder.encode([CAPTIONS[0], images[0]])


def test_a_picture_that_is_not_there_is_no_text(encoder):
    with pytest.raises(ValueError, match="There is no picture nope.png"):
        encoder.encode_document(["nope.png"])


def test_the_heads_learn(folder, images):
    encoder = sentence_transformers.MultiVectorEncoder(str(folder), trust_remote_code=True, device="cpu").train()
    parts = [encoder(encoder.preprocess(inputs)) for inputs in (CAPTIONS[:3], images)]
    text, image = (part["token_embeddings"] for part in parts)
    torch.einsum("tvd,iqd->tiq", text, image).amax(dim=-1).diagonal().sum().backward()
    assert encoder[0].model.text_projection.weight.grad.abs().sum() > 0
    assert encoder[0].model.vision_projection.weight.grad.abs().sum() > 0


def test_nothing_of_it_is_needed_to_save(tmp_path):
    """The files are written without sentence-transformers, and its import is left to it."""
    code = (
        "import sys; sys.modules['sentence_transformers'] = None\n"
        "from pathlib import Path; from saved_models import save_stage1; save_stage1(Path(sys.argv[1]))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    assert json.loads((tmp_path / "modules.json").read_text())[0]["type"] == "blip2_hf.multi_vector.ImageTextVectors"
    assert Blip2ForPreTraining.from_pretrained(tmp_path) is not None
