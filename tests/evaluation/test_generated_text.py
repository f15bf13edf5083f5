"""Fine-tuning is validated with all that people wrote, and asks questions as evaluation does."""

import runpy

import datasets
import numpy as np
import pytest
from paths import EXAMPLES
from tiny import make_image, make_processor
from transformers.trainer_utils import EvalPrediction

from blip2_hf.data import ImageTextPairs, clean_question
from blip2_hf.evaluation import GeneratedTextMetrics, exact_match, score_answers, word_f1
from blip2_hf.evaluation.metrics import caption_metrics


PROMPT = {"prompt": "Question: {} Answer:", "prompt_column": "question"}
ANSWERS = ["3.5", "10:30 a.m.", "T-shirt (red)", "U.S."]
QUESTIONS = ["What TIME is it?", "How much, in $?", "Who's *this*?", 'What does the "sign" say...']


def make_pairs(column: str, values: list, **kwargs) -> ImageTextPairs:
    rows = {"image": [make_image(i) for i in range(len(values))], column: values}
    rows["question"] = [QUESTIONS[i % 4] for i in range(len(values))]
    return ImageTextPairs(datasets.Dataset.from_dict(rows), text_column=column, train=False, **kwargs)


def predict(processor, pairs: ImageTextPairs, texts: list[str]) -> EvalPrediction:
    """What `Trainer` hands over: padded tokens, and labels of the first reference alone."""
    tokens = [processor.tokenizer(text, padding="longest")["input_ids"] for text in texts]
    labels = [processor.tokenizer(pairs[i]["text"])["input_ids"] for i in range(len(pairs))]
    width = max(map(len, [*tokens, *labels]))
    padded = [np.array([row + [-100] * (width - len(row)) for row in rows]) for rows in (tokens, labels)]
    return EvalPrediction(*padded)


def test_all_annotators_count():
    """The first one says yes and nine say no: a model that says no is right."""
    processor = make_processor()
    annotators = [["yes"] + ["no"] * 9, ["red"] * 10, ["left", *["the left"] * 9]]
    pairs = make_pairs("answers", annotators, **PROMPT)
    answers = predict(processor, pairs, ["no", "red", "the left"])
    metrics = GeneratedTextMetrics(processor, pairs, score_answers)(answers)
    assert metrics == {"exact_match": 1.0, "word_f1": 1.0, "vqa_accuracy": 1.0}
    assert GeneratedTextMetrics(processor)(answers)["exact_match"] == pytest.approx(1 / 3)
    # One of ten is no consensus: 0 of 3 without that one, 1 of 3 with it
    alone = GeneratedTextMetrics(processor, pairs, score_answers)(predict(processor, pairs, ["yes", "blue", "right"]))
    assert alone["vqa_accuracy"] == pytest.approx((9 / 10 / 3) / 3)


def test_any_accepted_answer_counts_where_there_are_no_ten():
    processor = make_processor()
    pairs = make_pairs("answers", [["sofa", "couch"], ["two"]], **PROMPT)
    metrics = GeneratedTextMetrics(processor, pairs, score_answers)
    assert metrics(predict(processor, pairs, ["couch", "2"]))["vqa_accuracy"] == 1.0


def test_all_captions_count_as_they_are_written():
    processor = make_processor()
    captions = [["A dog runs.", "The dog: brown, on grass!"], ["Two (2) people", "People at 10:30 a.m."]]
    pairs = make_pairs("caption", captions)
    texts = ["the dog brown, on grass", "people"]
    metrics = GeneratedTextMetrics(processor, pairs, caption_metrics)(predict(processor, pairs, texts))
    assert metrics["CIDEr-D"] == caption_metrics(texts, captions)["CIDEr-D"] > 0
    # With what is learned, the nearest caption
    assert metrics["word_f1"] == pytest.approx((1 + 2 / 4) / 2)
    assert metrics["exact_match"] == 0.5


def test_rows_that_are_left_out_have_no_references():
    processor = make_processor()
    pairs = make_pairs("caption", [["a dog"], ["a cat", "a red cat"], ["a bus"]]).without([0])
    assert pairs.references() == [["a cat", "a red cat"], ["a bus"]]
    metrics = GeneratedTextMetrics(processor, pairs)
    assert metrics(predict(processor, pairs, ["a red cat", "a bus"]))["exact_match"] == 1.0
    whole = make_pairs("caption", ["a dog", "a cat", "a bus"])
    with pytest.raises(ValueError, match="3 predictions, but 2 rows"):
        metrics(predict(processor, whole, ["a", "b", "c"]))
    with pytest.raises(ValueError, match="needs all references"):
        GeneratedTextMetrics(processor, score=caption_metrics)
    with pytest.raises(ValueError, match="Row 1 has '' in column 'caption'|Row 1 has an empty text"):
        make_pairs("caption", ["a dog", "", "a bus"]).references()


def test_several_references_of_words():
    assert exact_match(["A  dog", "cat"], [["a cat", "a dog"], ["bird"]]) == 0.5
    assert word_f1(["a dog", "two"], [["a bus", "dog"], ["two"]]) == pytest.approx((2 / 3 + 1) / 2)


def test_fine_tuning_asks_what_evaluation_asks_and_learns_answers_as_they_are(tmp_path):
    script = runpy.run_path(str(EXAMPLES / "finetune_vqa.py"))
    rows = {"image": [make_image(i) for i in range(4)], "question": QUESTIONS, "answer": ANSWERS}
    features = {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    path = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)
    options = script["VQAArguments"](model="", data=path, validation=path)
    pairs = script["make_data"](options, seed=0)["validation"]
    assert [pairs[i]["text"] for i in range(4)] == ANSWERS
    asked = [f"Question: {clean_question(question)} Answer:" for question in QUESTIONS]
    assert [pairs[i]["prompt"] for i in range(4)] == asked
    assert asked[3] == "Question: what does the sign say Answer:"
    assert pairs.references() == [[answer] for answer in ANSWERS]
    # Captions are cleaned, as LAVIS does
    assert make_pairs("caption", ANSWERS)[0]["text"] == "3 5"
