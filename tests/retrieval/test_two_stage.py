"""Retrieval in two stages, against one pair at a time."""

import datasets
import pytest
import torch
from stage1 import RETRIEVAL_QFORMER, make_retrieval, one_by_one
from tiny import (
    make_config,
    make_image,
    make_image_processor,
    make_tokenizer,
)

from blip2_hf import Blip2ForPreTraining
from blip2_hf.data import cache_features, load_cached_features
from blip2_hf.evaluation import TwoStageRetrieval, retrieval_recall
from blip2_hf.retrieval import two_stage


TEXTS = ["a red bus", "two", "a photo of a cat on a bench", "a dog", "one bus of many colours", "the cat sat", "x y z"]


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def model():
    return make_retrieval()


def make_bert_tokenizer():
    tokenizer = make_tokenizer(eos=True)
    tokenizer.model_max_length = 40
    return tokenizer


def expected_scores(model, image_embeds, input_ids) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and matching logits of all pairs, each alone."""
    ids = [torch.tensor(row) for row in input_ids]
    mask = [torch.ones_like(row) for row in ids]
    contrast = one_by_one(model, image_embeds, ids, mask, matching=False)
    return contrast, one_by_one(model, image_embeds, ids, mask, matching=True)[..., 1]


@pytest.fixture(scope="module")
def collection(model):
    generator = torch.Generator().manual_seed(1)
    image_embeds = torch.randn(5, 5, 32, generator=generator)
    tokenizer = make_bert_tokenizer()
    with torch.no_grad():
        scores = expected_scores(model, image_embeds, tokenizer(TEXTS)["input_ids"])
    return image_embeds, tokenizer, *scores


@pytest.mark.parametrize("k", [1, 3, 7, 100])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_two_stages_are_pair_by_pair(model, collection, k, batch_size):
    image_embeds, tokenizer, contrast, matching = collection
    retrieval = TwoStageRetrieval(model, tokenizer, k=k, batch_size=batch_size, show_progress=False)
    rankings = retrieval(image_embeds, TEXTS)
    directions = (rankings.image_to_text, contrast, matching), (rankings.text_to_image, contrast.T, matching.T)
    for ranking, cosines, logits in directions:
        count = min(k, cosines.shape[1])
        candidates = cosines.topk(count, dim=1).indices
        scores = (cosines + logits).gather(1, candidates)
        order = scores.argsort(dim=1, descending=True)
        assert torch.equal(ranking.index, candidates.gather(1, order))
        close(ranking.scores, scores.gather(1, order))
        full = ranking.matrix(cosines.shape[1])
        assert torch.equal(full.isfinite().sum(1), torch.full((len(full),), count))


def test_a_text_that_spells_a_special_token_is_text(model, collection):
    tokenizer = make_bert_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    encoded = TwoStageRetrieval(model, tokenizer, show_progress=False).encode_texts(["a <image> </s>", *TEXTS])
    assert collection[1].decode(encoded.input_ids[0]) == "<s>a <image> </s></s>"
    assert encoded.input_ids[0].count(tokenizer.eos_token_id) == 1


def test_contrast_alone_ranks_all(model, collection):
    image_embeds, tokenizer, contrast, _ = collection
    rankings = TwoStageRetrieval(model, tokenizer, k=0, show_progress=False)(image_embeds, TEXTS)
    close(rankings.image_to_text.matrix(len(TEXTS)), contrast)
    close(rankings.text_to_image.matrix(len(image_embeds)), contrast.T)
    assert torch.equal(rankings.image_to_text.index[:, 0], contrast.argmax(1))


def test_an_image_is_projected_once(model, collection, monkeypatch):
    image_embeds, tokenizer, *_ = collection
    projected = []
    project = type(model).get_image_key_values
    monkeypatch.setattr(
        type(model), "get_image_key_values", lambda self, x: projected.append(len(x)) or project(self, x)
    )
    TwoStageRetrieval(model, tokenizer, k=3, batch_size=2, show_progress=False)(image_embeds, TEXTS)
    # Once for contrast, and once for all of its candidates
    assert sum(projected) == 2 * len(image_embeds)


def test_features_in_memory_on_the_disk_and_of_stage_1(model, collection, tmp_path):

    _, tokenizer, *_ = collection
    pictures = datasets.Dataset.from_list([{"image": make_image(i)} for i in range(4)])
    cache_features(pictures, model, make_image_processor(), tmp_path / "features", dtype="float32")
    stored = load_cached_features(tmp_path / "features")
    pixel_values = make_image_processor()(images=[make_image(i) for i in range(4)], return_tensors="pt")[
        "pixel_values"
    ]
    image_embeds = model.get_image_embeds(pixel_values)
    retrieval = TwoStageRetrieval(model, tokenizer, k=2, show_progress=False)
    expected = retrieval(image_embeds, TEXTS)
    for images in (stored, list(image_embeds.numpy())):
        rankings = retrieval(images, TEXTS)
        assert torch.equal(rankings.image_to_text.index, expected.image_to_text.index)
        close(rankings.text_to_image.scores, expected.text_to_image.scores)
    stage1 = Blip2ForPreTraining(make_config(None, qformer_config=RETRIEVAL_QFORMER, image_token_index=None)).eval()
    stage1.load_state_dict(model.state_dict(), strict=False)
    of_stage1 = TwoStageRetrieval(stage1, tokenizer, k=2, show_progress=False)(image_embeds, TEXTS)
    close(of_stage1.image_to_text.scores, expected.image_to_text.scores)


def test_recall(model, collection):
    image_embeds, tokenizer, contrast, _ = collection
    is_match = torch.rand(contrast.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    is_match[:, 0] = is_match[0] = True
    rankings = TwoStageRetrieval(model, tokenizer, k=0, show_progress=False)(image_embeds, TEXTS)
    assert rankings.recall(is_match) == retrieval_recall(contrast, is_match)
    few = TwoStageRetrieval(model, tokenizer, k=0, show_progress=False)
    rankings = few.compare(few.encode_images(image_embeds), few.encode_texts(TEXTS).features, k=5)
    expected = retrieval_recall(contrast, is_match)
    # Five of seven texts were ranked, and all five images
    assert rankings.recall(is_match) == {
        name: value for name, value in expected.items() if name != "image_to_text_r10"
    }


def test_recall_by_the_number_of_each_text_s_image(model, collection):
    """That is a number a text, in place of a row of the matrix; image 3 has no text."""
    image_embeds, tokenizer, *_ = collection
    owners = torch.tensor([0, 2, 1, 1, 4, 2, 0])
    is_match = torch.arange(5)[:, None] == owners
    for k in (1, 3, 0):
        rankings = TwoStageRetrieval(model, tokenizer, k=k, show_progress=False)(image_embeds, TEXTS)
        recall = rankings.recall(owners, (1, 2, 3, 5, 7))
        assert recall == rankings.recall(is_match, (1, 2, 3, 5, 7))
    assert len(recall) == 10 and 0 < recall["image_to_text_r2"] < 1


def test_recall_of_texts_without_an_image(model, collection):
    image_embeds, tokenizer, *_ = collection
    owners = torch.tensor([0, -1, 1, 1, 2, 2, -1])
    rankings = TwoStageRetrieval(model, tokenizer, k=3, show_progress=False)(image_embeds, TEXTS)
    recall = rankings.recall(owners, (1, 2, 3))
    assert recall == rankings.recall(torch.arange(5)[:, None] == owners, (1, 2, 3))
    assert recall["image_to_text_r3"] > 0 and recall["text_to_image_r3"] > 0


def test_contrast_does_not_hold_all_cosines(model, collection, monkeypatch):
    """The best of blocks of images are the best of all, and a block is as large as memory allows."""
    retrieval = TwoStageRetrieval(model, collection[1], k=3, batch_size=4, show_progress=False)
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(100, 2, 16, generator=generator), torch.randn(20, 16, generator=generator)
    cosines = (images @ texts.T).amax(dim=1)
    best, sizes = two_stage._best, []
    monkeypatch.setattr(two_stage, "_best", lambda scores, count: sizes.append(scores.numel()) or best(scores, count))
    for limit, largest in ((2**25, 2000), (160, 160), (1, 120)):
        monkeypatch.setattr(two_stage, "_COSINES", limit)
        sizes.clear()
        found = retrieval.compare(images, texts)
        assert max(sizes) == largest
        for ranking, scores in ((found.image_to_text, cosines), (found.text_to_image, cosines.T)):
            expected = scores.topk(3, dim=1)
            assert torch.equal(ranking.index, expected.indices)
            close(ranking.scores, expected.values)


@pytest.mark.parametrize(("limit", "expected"), [(2**25, 4), (200, 2), (1, 1)])
def test_contrast_does_not_hold_the_cosines_of_many_queries(model, collection, monkeypatch, limit, expected):
    """An image has as many cosines with a text as it has queries."""
    sizes = []

    def compare(images, texts):
        sizes.append(len(images))
        return (images @ texts.T).amax(dim=1)

    monkeypatch.setattr(two_stage, "_COSINES", limit)
    monkeypatch.setattr(two_stage, "image_text_similarity", compare)
    retrieval = TwoStageRetrieval(model, collection[1], k=3, batch_size=4, show_progress=False)
    found = retrieval.compare(torch.randn(12, 5, 16), torch.randn(20, 16))
    assert max(sizes) == expected and sum(sizes) == 12
    assert found.image_to_text.index.shape == (12, 3) and found.text_to_image.index.shape == (20, 3)


def test_the_model_is_left_as_it_was(model, collection):
    image_embeds, tokenizer, *_ = collection
    retrieval = TwoStageRetrieval(model.train(), tokenizer, k=2, show_progress=False)
    retrieval(image_embeds, TEXTS)
    assert model.training and not model.vision_model.encoder.training
    features = retrieval.encode_images(image_embeds)
    model.eval()
    # No inference tensors: they can go into a graph
    (torch.nn.Parameter(torch.ones(16)) * features).sum().backward()


def test_settings_and_input_that_do_not_fit(model, collection):
    image_embeds, tokenizer, *_ = collection
    with pytest.raises(ValueError, match="batch_size=0"):
        TwoStageRetrieval(model, tokenizer, batch_size=0)
    retrieval = TwoStageRetrieval(model, tokenizer, k=2, show_progress=False)
    with pytest.raises(ValueError, match="list of texts.*'a cat'"):
        retrieval(image_embeds, "a cat")
    with pytest.raises(ValueError, match="list of texts"):
        retrieval(image_embeds, [])
    with pytest.raises(ValueError, match="no images"):
        retrieval(image_embeds[:0], TEXTS)
    with pytest.raises(ValueError, match="image_features has 3 rows; 5 were expected"):
        retrieval(image_embeds, TEXTS, image_features=retrieval.encode_images(image_embeds[:3]))
    with pytest.raises(ValueError, match="0 to 4"):
        retrieval.match(image_embeds, [[2, 3]], torch.tensor([[-1, 0]]))
    with pytest.raises(ValueError, match="Features of images are not finite"):
        retrieval(torch.full_like(image_embeds, float("nan")), TEXTS)
    small = make_retrieval(qformer_config={**RETRIEVAL_QFORMER, "vocab_size": 40})
    with pytest.raises(ValueError, match="vocabulary of 40"):
        TwoStageRetrieval(small, tokenizer, show_progress=False)(image_embeds, TEXTS)
