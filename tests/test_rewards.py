"""Rewards of captions: those of the metrics and of the filter, in the form that TRL calls them in."""

import pytest
from saved_models import save_stage1
from tiny import CAPTIONS, make_image

from blip2_hf.capfilt import RetrievalFilter
from blip2_hf.evaluation.metrics import cider_d_scores, tokenize_captions
from blip2_hf.retrieval import load_retrieval_model
from blip2_hf.rewards import CiderReward, RetrievalReward, completion_texts


REFERENCES = [[caption, f"there is {caption}"] for caption in CAPTIONS]


def said(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def test_cider_of_the_corpus_itself_is_that_of_the_metric():
    captions = CAPTIONS[1:] + CAPTIONS[:1]
    expected = cider_d_scores(*tokenize_captions(captions, REFERENCES))
    reward = CiderReward(REFERENCES)
    assert reward(completions=captions, references=REFERENCES) == pytest.approx(expected.tolist())
    # One picture alone has the same score, because the rarity of words is that of the corpus
    alone = reward(completions=[said(CAPTIONS[1])], references=REFERENCES[1:2])
    assert alone == reward(completions=[CAPTIONS[1]], references=REFERENCES[1:2])
    assert alone[0] > reward(completions=["grass"], references=REFERENCES[1:2])[0]


@pytest.mark.parametrize("score", ["itm", "itc"])
def test_retrieval_reward_is_the_score_of_the_filter(score, tmp_path):
    model, processor = load_retrieval_model(save_stage1(tmp_path), "cpu")
    pictures = [make_image(seed) for seed in range(2)]
    texts = [CAPTIONS[:2], CAPTIONS[2:4]]
    expected = RetrievalFilter(model, processor, score=score)(pictures, texts)
    reward = RetrievalReward(model, processor, score=score)
    assert reward.__name__ == score
    images = [[picture.copy()] for picture in pictures for _ in range(2)]
    sizes = []
    model.vision_model.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    rewards = reward(completions=[said(text) for own in texts for text in own], image=images, other=[1] * 4)
    assert rewards == pytest.approx(expected[0] + expected[1])
    # Each picture goes through the tower once
    assert sizes == [2]


def test_texts_of_completions():
    parts = [{"role": "assistant", "content": [{"type": "text", "text": " a"}, {"type": "text", "text": " dog "}]}]
    assert completion_texts([" a dog\n", said("a dog "), parts]) == ["a dog"] * 3


def test_a_missing_column_is_named():
    reward = CiderReward(REFERENCES)
    with pytest.raises(ValueError, match="no column 'references'"):
        reward(completions=["a dog"])
    with pytest.raises(ValueError, match="two at least"):
        CiderReward(REFERENCES[:1])
