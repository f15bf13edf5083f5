import importlib.util
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from paths import FIXTURES
from transformers import EvalPrediction

from blip2_hf.evaluation import retrieval_recall
from blip2_hf.evaluation.metrics import (
    METRICS,
    bleu,
    caption_metrics,
    chair,
    choose_vqa_protocol,
    cider_d,
    cider_d_scores,
    find_objects,
    gqa_accuracy,
    load_metric,
    normalize_vqa_answer,
    pope,
    ptb_tokenize,
    rouge_l,
    rouge_l_scores,
    tokenize_captions,
    vqa_accuracy,
    vqa_accuracy_scores,
)


FIXTURE = json.loads((FIXTURES / "captions_pycocoevalcap.json").read_text(encoding="utf-8"))
CAPTIONS = FIXTURE["captions"]
PREDICTIONS = [item["prediction"] for item in CAPTIONS]
REFERENCES = [item["references"] for item in CAPTIONS]
NO_NETWORK = """
import socket
def refuse(*args, **kwargs):
    raise AssertionError("a socket was opened")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
"""


# captions


def test_fixture_is_awkward_enough():
    texts = "\n".join([*PREDICTIONS, *(text for own in REFERENCES for text in own)])
    assert len(CAPTIONS) >= 200
    assert {len(own) for own in REFERENCES} == {1, 2, 3, 4, 5}
    assert "" in PREDICTIONS
    for sign in ("n't", "’s", "1,000", "“", "``", "-in-", "é", "東", "😀", "1/2", "\n", "a`b", "\x07"):
        assert sign in texts


def test_tokens_are_those_of_pycocoevalcap():
    for item in CAPTIONS:
        assert " ".join(ptb_tokenize(item["prediction"])) == item["prediction_tokens"], item["prediction"]
        for text, tokens in zip(item["references"], item["references_tokens"], strict=True):
            assert " ".join(ptb_tokenize(text)) == tokens, text


def test_corpus_scores_are_those_of_pycocoevalcap():
    scores = caption_metrics(PREDICTIONS, REFERENCES)
    assert list(scores) == ["CIDEr-D", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"]
    assert scores == pytest.approx(FIXTURE["scores"], abs=1e-6, rel=0)
    assert all(type(score) is float for score in scores.values())


def test_scores_of_each_caption_are_those_of_pycocoevalcap():
    words = tokenize_captions(PREDICTIONS, REFERENCES)
    cider, rouge = cider_d_scores(*words), rouge_l_scores(*words)
    for index, item in enumerate(CAPTIONS):
        one = bleu([words[0][index]], [words[1][index]])
        scores = {**one, "ROUGE-L": rouge[index], "CIDEr-D": cider[index]}
        assert scores == pytest.approx(item["scores"], abs=1e-6, rel=0), item["prediction"]


@pytest.mark.parametrize(
    "caption, tokens",
    [
        ("A man doesn't ride.", "a man does n't ride"),
        ("I can't; we cannot, they're gonna", "i ca n't we can not they 're gon na"),
        ("the dogs' ball, James's bat", "the dogs ball james 's bat"),
        ("a “don’t walk” sign", "a do n't walk sign"),
        ("a black-and-white t-shirt - old -- new", "a black-and-white t-shirt old new"),
        ("$5.00, 1,000 at 3:45pm for 50%", "$ 5.00 1,000 at 3:45 pm for 50 %"),
        ("a cup 1 1/2 full (half)", "a cup 1\xa01/2 full -lrb- half -rrb-"),
        ("Mr. Smith at 5 p.m. in the U.S.", "mr. smith at 5 p.m. in the u.s."),
        ("plan B. The man", "plan b the man"),
        ("wait... what?! no…", "wait what ?! no"),
        ("crème brûlée 😀 👍🏽 in 東京", "crème brûlée in 東京"),
        ("two\nlines", "two lines"),
        ("a dog\x07house \x00 and\x1bcats\x7f", "a dog house and cats"),
        ("1\x011/2 plan B.\x01The man", "1 1/2 plan b. the man"),  # skipped, but no space
        ("see www.foo\x01😀.com", "see www.foo\x01😀.com"),
        ("o`clock d`Angelo don`t rock`n`roll", "o`clock d`angelo do n`t rock n`roll"),
        ("a`b ma`am Ta'u HE'S HE`S o’reilly", "a b ma`am ta'u he 's he`s o’reilly"),
        ("a-b.c x-U.S. EU-U.S", "a-b c x-u.s. eu-u.s"),
        ("", ""),
        ("\t.!", ""),
    ],
)
def test_tokenizer_by_example(caption, tokens):
    assert ptb_tokenize(caption) == (tokens.split(" ") if tokens else [])


@pytest.mark.parametrize("unit", ["a", "a-", "a.", "<a ", "'", "1,", "@", "a@", "a b=", "5 ", "$a", "(", "a!"])
def test_tokenizer_keeps_what_repeats_without_end(unit):
    tokens = "".join(ptb_tokenize(unit * 500)).replace("\xa0", "").replace("-lrb-", "(")
    for character in set(unit) - set(" '-.,!"):
        assert tokens.count(character) == 500


@pytest.mark.parametrize(
    "unit", ["_\u0301", "-\u0301", "½.", "-1", "~\\", ",z", "*.", "a,", "5.", "a!", "a@.", "<!a", "1a.", '<a b="']
)
def test_the_time_of_the_tokenizer_grows_as_the_text(unit):
    times = []
    for length in (2_000, 8_000):
        start = time.process_time()
        ptb_tokenize((unit * length)[:length])
        times.append(time.process_time() - start)
    # 4 times the length; a rule that reads on to the end from each token takes 16 times as long
    assert times[1] < 10 * times[0]


def test_bleu_is_its_definition():
    prediction = ["a", "cat", "on", "a", "a", "mat"]
    references = [["a", "cat", "on", "the", "mat"], ["there", "is", "a", "cat"]]
    scores = bleu([prediction], [references])
    assert scores["BLEU-1"] == pytest.approx(4 / 6)  # a, cat, on, mat: `a` once, as often as any reference has it
    assert scores["BLEU-2"] == pytest.approx(math.sqrt(4 / 6 * 2 / 5))
    short = bleu([["a", "cat"]], [[["a", "cat", "on", "the", "mat"]]])
    assert short["BLEU-1"] == pytest.approx(math.exp(1 - 5 / 2))


def test_rouge_l_is_its_definition():
    def subsequence(first, second):
        table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
        for i, a in enumerate(first):
            for j, b in enumerate(second):
                table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
        return table[-1][-1]

    generator = random.Random(0)
    for _ in range(200):
        first, second = ([generator.choice("abcde") for _ in range(generator.randint(1, 90))] for _ in range(2))
        common = subsequence(first, second)
        precision, recall = common / len(first), common / len(second)
        wanted = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision) if common else 0
        assert rouge_l([first], [[second]])["ROUGE-L"] == pytest.approx(wanted)


def test_cider_d_is_its_definition():
    predictions = [["a", "cat", "sat"], ["a", "dog"], ["two", "dogs"]]
    references = [[["a", "cat", "sat", "here"], ["a", "cat"]], [["the", "dog"]], [["two", "dogs", "two", "dogs"]]]

    def ngrams(words, n):
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    def weights(words, n):
        pictures = {g: sum(any(g in ngrams(r, n) for r in own) for own in references) for g in ngrams(words, n)}
        return {g: count * math.log(3 / max(1, pictures[g])) for g, count in ngrams(words, n).items()}

    def norm(vector):
        return math.sqrt(sum(value**2 for value in vector.values())) or 1

    for prediction, own, score in zip(predictions, references, cider_d_scores(predictions, references), strict=True):
        total = 0
        for reference in own:
            for n in range(1, 5):
                mine, other = weights(prediction, n), weights(reference, n)
                shared = sum(min(mine[g], other[g]) * other[g] for g in mine if g in other)
                pairs = max(len(prediction) - 1, 0) - max(len(reference) - 1, 0)
                total += shared / norm(mine) / norm(other) * math.exp(-(pairs**2) / (2 * 6**2))
        assert score == pytest.approx(10 * total / 4 / len(own))
    assert cider_d(predictions, references)["CIDEr-D"] == pytest.approx(cider_d_scores(predictions, references).mean())


def test_one_picture_has_no_cider_d_and_empty_captions_are_legal():
    assert caption_metrics(["a cat"], [["a cat"]])["CIDEr-D"] == 0
    scores = caption_metrics(["", "a cat"], [["a dog"], ["a cat", ""]])
    assert all(0 <= score <= 10 for score in scores.values())
    assert caption_metrics(["", "x"], [[""], ["y"]])["BLEU-4"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "predictions, references, message",
    [
        (["a"], [["a"], ["b"]], "1 predictions but 2 lists"),
        ([], [], "no predictions"),
        (["a"], [[]], "prediction 0 has no references"),
        (["a", "b"], [["a"], "b"], "references of prediction 1 are a list"),
        ("a", [["a"]], "not one text"),
        ([None], [["a"]], "a caption is None"),
        ([["a"]], [["a"]], "a caption is \\['a'\\]"),
    ],
)
def test_bad_captions_are_refused(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        caption_metrics(predictions, references)


def test_untokenized_captions_are_refused():
    for metric in (bleu, cider_d, rouge_l):
        with pytest.raises(ValueError, match="a caption is a list of words"):
            metric(["a cat"], [[["a", "cat"]]])
        with pytest.raises(ValueError, match="a caption is a list of words"):
            metric([["a", "cat"]], [["a cat"]])


# answers


@pytest.mark.parametrize(
    "answer, normalized",
    [
        ("The Dogs", "dogs"),
        ("an apple a day", "apple day"),
        ("none", "0"),
        ("Ten", "10"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("somebody'd", "somebodyd"),
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),  # a comma in a number: every sign goes
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("red, dark-blue", "red dark blue"),  # the comma stands beside a space, the hyphen does not
        ("a-b - c", "ab c"),  # a hyphen beside a space anywhere: all hyphens go
        ("u.s.", "us"),
        ("3.5", "3.5"),
        ("3. 5", "3 5"),
        ("yes\tno\n", "yes no"),
        ("it's", "it's"),
        ("", ""),
    ],
)
def test_answers_are_normalized_as_officially(answer, normalized):
    assert normalize_vqa_answer(answer) == normalized


@pytest.mark.parametrize("matches, wanted", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
@pytest.mark.parametrize("protocol", ["official", "lavis"])
def test_vqa_accuracy_leaves_one_annotator_out(matches, wanted, protocol):
    answers = ["cat"] * matches + [f"other{index}" for index in range(10 - matches)]
    assert vqa_accuracy(["cat"], [answers], protocol=protocol)["vqa_accuracy"] == pytest.approx(wanted)
    subsets = [answers[:index] + answers[index + 1 :] for index in range(10)]
    assert wanted == pytest.approx(sum(min(1, subset.count("cat") / 3) for subset in subsets) / 10)


@pytest.mark.parametrize("answer", ["New York", "T-shirt", "the dog", "two", "u.s."])
def test_the_answer_of_all_annotators_counts_one(answer):
    assert vqa_accuracy_scores([answer, f" {answer}\n"], [[answer] * 10, [f"{answer}\t"] * 10]) == [1, 1]
    assert vqa_accuracy_scores([answer], [[answer] * 10], protocol="exact") == [1]


def test_where_annotators_agree_answers_are_compared_as_they_are():
    assert vqa_accuracy_scores(["yes.", "Yes", "2"], [["yes"] * 10, ["yes"] * 10, ["two"] * 10]) == [0, 0, 0]


def test_where_annotators_differ_both_sides_are_normalized():
    assert vqa_accuracy_scores(["the left"], [["the left"] * 9 + ["left"]]) == [1]
    assert vqa_accuracy_scores(["2"], [["two"] * 3 + ["Two!"] * 6 + ["three"]]) == [1]
    # The ends go first: these annotators agree
    assert vqa_accuracy_scores(["Yes"], [["yes"] * 5 + [" yes\n"] * 5]) == [0]


def official_accuracy(prediction, answers):
    """The steps of GT-Vision-Lab/VQA, one after another, for people with names."""
    signs = ';/[]"{}()=+\\_-><@`,?!'
    numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    numbers = {word: str(number) for number, word in enumerate(numbers)} | {"none": "0"}

    def clean(text):
        found = text
        for sign in signs:
            goes = sign + " " in text or " " + sign in text or re.search("[0-9],[0-9]", text)
            found = found.replace(sign, "" if goes else " ")
        found = re.sub(r"[.](?![0-9])", "", found)
        words = [numbers.get(word, word) for word in found.lower().split()]
        return " ".join({"dont": "don't"}.get(word, word) for word in words if word not in ("a", "an", "the"))

    prediction, answers = (
        prediction.replace("\n", " ").replace("\t", " ").strip(),
        {name: text.replace("\n", " ").replace("\t", " ").strip() for name, text in enumerate(answers)},
    )
    if len({*answers.values()}) > 1:
        prediction, answers = clean(prediction), {name: clean(text) for name, text in answers.items()}
    scores = []
    for left_out in answers:
        matches = [name for name in answers if name != left_out and answers[name] == prediction]
        scores.append(min(1, len(matches) / 3))
    return sum(scores) / len(scores)


def test_official_accuracy_is_its_procedure():
    generator = random.Random(0)
    parts = ["two", "2", "the", "a", "left", "Left", "T-shirt", "t", "shirt", "u.s.", "us", "3.5", "1,000", "1000"]
    parts += ["dont", "don't", "none", "0", "red/blue", "red", ",", "!", "?", "-", "ten"]

    def answer():
        text = generator.choice([" ", " ", "-", "\n", ""]).join(generator.choices(parts, k=generator.randint(1, 3)))
        return generator.choice(["", "", " ", "\t"]) + text + generator.choice(["", "", ".", "\n"])

    predictions, references = [], []
    for _ in range(3000):
        given = [answer() for _ in range(generator.randint(1, 3))]
        references.append(generator.choices(given, k=10))
        predictions.append(generator.choice([*given, answer(), given[0].lower(), given[0].strip()]))
    scores = vqa_accuracy_scores(predictions, references)
    wanted = [official_accuracy(*pair) for pair in zip(predictions, references, strict=True)]
    assert scores == pytest.approx(wanted, abs=1e-12)
    assert 500 < sum(score == 0 for score in scores) < 2000 and sum(0 < score < 1 for score in scores) > 50
    # The protocols differ, so the comparison can tell one from another
    for protocol in ("lavis", "exact"):
        others = vqa_accuracy_scores(predictions, references, protocol)
        assert sum(abs(a - b) > 0.01 for a, b in zip(scores, others, strict=True)) > 300


def test_lavis_protocol_normalizes_the_prediction_alone():
    def scores(prediction, answers):
        return vqa_accuracy_scores([prediction], [answers], protocol="lavis")

    assert scores("u.s.", ["u.s."] * 10) == [0]  # they agree: left as they are; the prediction is not
    assert scores("u.s.", ["u.s."] * 9 + ["usa"]) == [1]
    assert scores("Cat.", ["cat"] * 10) == [1]
    assert scores("two", ["two"] * 9 + ["2"]) == [pytest.approx(0.3)]  # their numbers stay words
    assert scores("the cat", ["The cat"] * 9 + ["cat"]) == [pytest.approx(0.3)]


def test_exact_protocol_takes_any_number_of_accepted_answers():
    predictions = ["A sofa.", "sofas", "two", "1,000", "T-Shirt", "b"]
    references = [["couch", "sofa"], ["couch", "sofa", "settee"], ["2"], ["1000"], ["t-shirt"] * 12, ["A", "B"]]
    scores = vqa_accuracy_scores(predictions, references, protocol="exact")
    assert scores == [1, 0, 1, 1, 1, 1]
    assert vqa_accuracy(predictions, references, protocol="exact") == {"vqa_accuracy": pytest.approx(5 / 6)}
    # An answer of an article or a sign alone is not an empty one
    assert vqa_accuracy_scores(["", "A.", "the", "-"], [["a"], ["a"], ["a"], ["+"]], protocol="exact") == [0, 1, 0, 0]


def test_the_data_choose_the_protocol():
    assert choose_vqa_protocol([["yes"] * 10, ["yes"] * 9 + ["no"]]) == "official"
    assert choose_vqa_protocol([["yes"] * 10, ["yes"] * 9]) == "exact"
    assert choose_vqa_protocol([["yes"]]) == choose_vqa_protocol([]) == "exact"
    with pytest.raises(ValueError, match="question 0 are a list, not the text 'basketball'"):
        choose_vqa_protocol(["basketball"])


@pytest.mark.parametrize("protocol", ["official", "lavis"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_too_few_annotators_are_refused(protocol, number):
    # Not even the answer of all would count 1
    with pytest.raises(ValueError, match=rf"question 1 has too few answers \({number}\): .*Give protocol='exact'"):
        vqa_accuracy(["a", "b"], [["a"] * 10, ["b"] * number], protocol=protocol)
    assert vqa_accuracy(["b"], [["b"] * 4], protocol=protocol) == {"vqa_accuracy": 1}
    with pytest.raises(ValueError, match="protocol='gqa': one of official, lavis, exact was expected"):
        vqa_accuracy(["a"], [["a"] * 10], protocol="gqa")


def test_vqa_accuracy_by_type():
    result = vqa_accuracy(
        ["yes", "no", "2"],
        [["yes"] * 10, ["yes"] * 10, ["2"] * 10],
        answer_types=["yes/no", "yes/no", "number"],
        question_types=["is", "is", "how many"],
    )
    assert result["vqa_accuracy"] == pytest.approx(2 / 3)
    assert result["per_answer_type"] == {"yes/no": 0.5, "number": 1.0}
    assert result["per_question_type"] == {"is": 0.5, "how many": 1.0}
    with pytest.raises(ValueError, match="1 types for 2 questions"):
        vqa_accuracy(["a", "b"], [["a"] * 10, ["b"] * 10], answer_types=["other"])


def test_gqa_accuracy():
    pairs = {"a table": "table", "yes.": "yes", "two": "2", "Yes": "yes", " table ": "table", "t-shirt": "t-shirt"}
    wrong = {"tables": "table", "": "a", "no": "yes"}
    answers = [*pairs, *wrong], [*pairs.values(), *wrong.values()]
    assert gqa_accuracy(*answers) == gqa_accuracy(*answers, protocol="normalized") == {"gqa_accuracy": 6 / 9}
    assert gqa_accuracy(*answers, protocol="strict") == {"gqa_accuracy": 1 / 9}
    with pytest.raises(ValueError, match="protocol='lavis': one of normalized, strict was expected"):
        gqa_accuracy(*answers, protocol="lavis")
    with pytest.raises(ValueError, match="2 predictions but 1 references"):
        gqa_accuracy(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="lists of texts"):
        gqa_accuracy(["a"], [["a"]])
    with pytest.raises(ValueError, match="no predictions"):
        gqa_accuracy([], [])


# what is not there


@pytest.mark.parametrize(
    ("answer", "is_yes", "is_unclear"),
    [
        ("yes", True, False),
        ("Yes, there is no doubt", False, False),  # as the authors' rule has it
        ("No", False, False),
        ("no, it is a cat", False, False),
        ("there is not", False, False),
        ("A bus. There is no dog.", True, True),  # the first sentence counts
        ("Yes! It is.", True, False),
        ("NO", True, True),
        ("there isn't", True, True),
        ("no!", True, True),
        ("nothing", True, True),
        ("eyes", True, True),
        ("", True, True),
    ],
)
def test_how_pope_reads_an_answer(answer, is_yes, is_unclear):
    for label in ("yes", "no"):
        scores = pope([answer], [label])
        assert scores["accuracy"] == (is_yes == (label == "yes"))
        assert (scores["yes_ratio"], scores["unclear_ratio"]) == (is_yes, is_unclear)


def test_pope():
    """Three answers of yes are right and one is wrong; two of no are right, and two are wrong."""
    answers = ["yes", "Yes.", "a bus", "yes", "no", "No, none.", "no", "not any"]
    labels = ["yes", "Yes", "yes", "no", "no", "No", "yes", "yes"]
    assert pope(answers, labels) == pytest.approx(
        {
            "accuracy": 5 / 8,
            "precision": 3 / 4,
            "recall": 3 / 5,
            "f1": 2 / 3,
            "yes_ratio": 1 / 2,
            "unclear_ratio": 1 / 8,
        }
    )
    # Ratios of nothing
    never = pope(["no", "no"], ["yes", "no"])
    assert (never["accuracy"], never["precision"], never["recall"], never["f1"]) == (0.5, 0, 0, 0)
    assert pope(["no"], ["no"])["recall"] == 0
    with pytest.raises(ValueError, match="reference 1 is 'maybe': yes or no was expected"):
        pope(["yes", "no"], ["yes", "maybe"])
    with pytest.raises(ValueError, match="2 predictions but 1 references"):
        pope(["yes", "no"], ["yes"])
    with pytest.raises(ValueError, match="no predictions"):
        pope([], [])
    with pytest.raises(ValueError, match="predictions are a list of texts.* not None"):
        pope([None], ["yes"])


SYNONYMS = [
    ["person", "man", "woman", "baby", "adult", "child", "children", "policeman", "passenger"],
    ["dog", "puppy"],
    ["bear"],
    ["teddy bear", "teddybear"],
    ["hot dog"],
    ["knife"],
    ["bus", "minibus"],
    ["bench"],
    ["bird", "goose"],
    ["chair", "seat"],
    ["toilet"],
    ["wine glass"],
    ["skis", "ski"],
    ["airplane", "jet"],
    ["cell phone", "iPhone"],
    ["oven", "stove", "stove top oven"],
    ["clock"],
    ["plate", "dish"],
    ["scissors"],
    ["sports ball", "ball"],
]


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("Two puppies and a dog's bone", ["dog", "dog"]),
        ("a man eats a hot dog", ["person", "hot dog"]),
        ("it is hot, dog", ["dog"]),
        ("hot-dog", []),
        ("Teddy bears and bears.", ["teddy bear", "bear"]),
        ("women, men, policemen and children", ["person"] * 4),
        ("knives, buses, benches, geese and wine glasses", ["knife", "bus", "bench", "bird", "wine glass"]),
        ("a man on skis with a ski", ["person", "skis", "skis"]),
        ("an adult dog with baby birds", ["dog", "bird"]),
        ("a baby with a bird", ["person", "bird"]),
        ("a baby bear and a baby animal", ["bear"]),
        ("passenger jets of a passenger", ["airplane", "person"]),
        ("a toilet seat", ["toilet"]),
        ("the seat of a toilet", ["toilet"]),
        ("the seat of a bus", ["chair", "bus"]),
        ("a ball on the home plate near a plate", ["sports ball", "plate"]),
        ("a stove top oven, sports balls and IPHONES", ["oven", "sports ball", "cell phone"]),
        ("it is ten o'clock", []),
        ("glasses, a glass and scissors", ["scissors"]),
        ("", []),
    ],
)
def test_objects_that_captions_name(caption, objects):
    assert find_objects([caption], SYNONYMS) == [objects]


def test_phrases_of_ones_own_go_before_those_of_chair():
    synonyms = [["cub", "baby bear"], ["bear"], ["big red london bus"], ["bus"]]
    assert find_objects(["baby bears, a big red london bus and a big red bus"], synonyms) == [
        ["cub", "big red london bus", "bus"]
    ]


def test_chair():
    captions = ["A man and two dogs.", "a puppy, a dog and a bus", "a tree", "a bench with a woman"]
    objects = [["person"], ["puppy", "knife"], ["bench"], ["person", "bench", "Bus"]]
    # Invented: the dogs of the first and the bus of the second, of seven that are named. Of seven objects in the
    # pictures, four are named: the person; the dog, which is named twice; the person and the bench
    assert chair(captions, objects, SYNONYMS) == pytest.approx(
        {"CHAIRs": 2 / 4, "CHAIRi": 2 / 7, "object_recall": 4 / 7}
    )
    assert chair(["a tree"], [[]], SYNONYMS) == {"CHAIRs": 0, "CHAIRi": 0, "object_recall": 0}
    assert chair(["a bus"], [[]], SYNONYMS) == {"CHAIRs": 1, "CHAIRi": 1, "object_recall": 0}
    with pytest.raises(ValueError, match="picture 0 has the object 'tree', which the synonyms lack"):
        chair(["a tree"], [["tree"]], SYNONYMS)
    with pytest.raises(ValueError, match="the objects of picture 0 are a list, not 'dog'"):
        chair(["a dog"], ["dog"], SYNONYMS)
    with pytest.raises(ValueError, match="the synonyms have 'Dog' twice: for 'dog' and for 'pet'"):
        chair(["a dog"], [["dog"]], [["dog"], ["pet", "Dog"]])
    with pytest.raises(ValueError, match="lists of words, one list for each object, but one is 'dog'"):
        find_objects(["a dog"], ["dog"])
    with pytest.raises(ValueError, match="captions are a list of texts, but one is None"):
        find_objects([None], SYNONYMS)
    with pytest.raises(ValueError, match="captions are a list of texts, not one text"):
        find_objects("a dog", SYNONYMS)
    with pytest.raises(ValueError, match="2 predictions but 1 lists of objects"):
        chair(["a", "b"], [[]], SYNONYMS)
    with pytest.raises(ValueError, match="no predictions"):
        chair([], [], SYNONYMS)


# modules of evaluate


def test_modules_give_what_the_functions_give():
    words = tokenize_captions(PREDICTIONS, REFERENCES)
    captions = {"predictions": PREDICTIONS, "references": REFERENCES}
    assert load_metric("caption_metrics").compute(**captions) == caption_metrics(PREDICTIONS, REFERENCES)
    for name, function in (("bleu_coco", bleu), ("cider_d", cider_d), ("rouge_l", rouge_l)):
        assert load_metric(name).compute(**captions) == function(*words)

    answers = {"predictions": ["two", "no"], "references": [["2"] * 10, ["no"] * 2 + ["yes"] * 8]}
    accuracies = {"official": 0.3, "lavis": 0.8, "exact": 1}
    for protocol, accuracy in accuracies.items():
        found = load_metric("vqa_accuracy").compute(**answers, protocol=protocol)
        assert found == vqa_accuracy(**answers, protocol=protocol) == {"vqa_accuracy": pytest.approx(accuracy)}
    types = {"answer_types": ["number", "yes/no"]}
    assert load_metric("vqa_accuracy").compute(**answers, **types) == vqa_accuracy(**answers, **types)
    assert vqa_accuracy(**answers)["vqa_accuracy"] == pytest.approx(accuracies["official"])
    answers = {"predictions": ["Yes"], "references": ["yes"]}
    assert load_metric("gqa_accuracy").compute(**answers) == {"gqa_accuracy": 1.0}
    assert load_metric("gqa_accuracy").compute(**answers, protocol="strict") == {"gqa_accuracy": 0.0}

    answers = {"predictions": ["yes", "no"], "references": ["yes", "yes"]}
    assert load_metric("pope").compute(**answers) == pope(**answers)
    objects = {"predictions": ["a dog", "a bus"], "references": [["dog"], []]}
    assert load_metric("chair").compute(**objects, synonyms=SYNONYMS) == chair(**objects, synonyms=SYNONYMS)

    similarity = torch.rand(4, 6, generator=torch.manual_seed(0))
    is_match = torch.arange(6) % 4 == torch.arange(4)[:, None]
    recall = load_metric("retrieval_recall").compute(predictions=similarity, references=is_match, k=(1, 2))
    assert recall == retrieval_recall(similarity, is_match, k=(1, 2))


def test_batches_are_gathered():
    metric = load_metric("caption_metrics")
    for start in range(0, len(CAPTIONS), 50):
        part = slice(start, start + 50)
        metric.add_batch(predictions=PREDICTIONS[part], references=REFERENCES[part])
    assert metric.compute() == caption_metrics(PREDICTIONS, REFERENCES)


def test_module_serves_as_compute_metrics():
    vocabulary, metric = ["a", "dog", "runs", "cat"], load_metric("caption_metrics")

    def compute_metrics(prediction):
        texts, labels = ([" ".join(vocabulary[i] for i in row) for row in rows] for rows in prediction)
        return metric.compute(predictions=texts, references=[[label] for label in labels])

    rows = np.array([[0, 1, 2], [0, 3, 2]])
    for _ in range(2):  # each evaluation starts anew
        scores = compute_metrics(EvalPrediction(predictions=rows, label_ids=rows))
        assert scores["BLEU-2"] == pytest.approx(1)


def test_unknown_module_is_refused():
    with pytest.raises(ValueError, match="no metric 'spice'; there are bleu_coco"):
        load_metric("spice")


def test_each_metric_is_a_module_that_says_what_it_takes():
    from blip2_hf.evaluation.metrics.evaluate_module import MODULES

    assert tuple(MODULES) == METRICS
    for name in METRICS:
        metric = load_metric(name)
        assert metric.name == name and metric.description and metric.citation
        for word in ("Args:", "Returns:", *metric.features):
            assert word in metric.inputs_description, name


def test_processes_gather_what_each_has_seen(tmp_path):
    predictions, references = ["a dog", "a cat"], [["a dog"], ["a cat", "cats"]]

    def compute(rank):
        metric = load_metric("cider_d", num_process=2, process_id=rank, cache_dir=str(tmp_path))
        metric.add_batch(predictions=[predictions[rank]], references=[references[rank]])
        return metric.compute()

    with ThreadPoolExecutor(2) as ranks:
        first, second = ranks.map(compute, (0, 1))
    assert first == cider_d(*tokenize_captions(predictions, references)) and second is None


def test_modules_load_without_a_network(tmp_path):
    code = f"""{NO_NETWORK}
from blip2_hf.evaluation.metrics import METRICS, load_metric
loaded = [load_metric(name) for name in METRICS]
print(load_metric("cider_d").compute(predictions=["a dog", "a cat"], references=[["a dog"], ["a cat"]]))
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("{'CIDEr-D': ")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None or shutil.which("java") is None,
    reason="needs pycocoevalcap 1.2 and Java",
)
def test_agreement_with_pycocoevalcap_on_thousands_of_captions():
    from make_caption_fixture import add_scores, make_captions

    captions = make_captions(number=5000, seed=1)
    reference = add_scores(captions)
    for item in captions:
        own = [" ".join(ptb_tokenize(text)) for text in (item["prediction"], *item["references"])]
        assert own == [item["prediction_tokens"], *item["references_tokens"]]
    scores = caption_metrics([item["prediction"] for item in captions], [item["references"] for item in captions])
    assert scores == pytest.approx(reference["scores"], abs=1e-6, rel=0)
