"""`blip2-hf ask`: answers of the pipeline, one pass over each picture, and what is no question."""

import json
from pathlib import Path

import pytest
import torch
from saved_models import save_captioner, save_stage1
from tiny import make_image, make_model, make_processor
from transformers import pipeline

from blip2_hf import Blip2ForConditionalGeneration, Blip2Processor
from blip2_hf.captioning import answer_questions
from blip2_hf.cli import main


QUESTIONS = ["What is it? (really)", "what colour is the bus?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_captioner(tmp_path_factory.mktemp("model"))


@pytest.fixture
def photos(tmp_path, monkeypatch):
    for seed, name in enumerate(["a.png", "b c.png"]):
        make_image(seed).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)


def expected_answers(parts, pictures, questions=("what is it? really", QUESTIONS[1]), template="Question: {} Answer:"):
    """What the pipeline says of each question alone, cleaned and within the prompt."""
    model, processor = parts
    captioner = pipeline("image-to-text", model=model, processor=processor, device="cpu")
    options = {"num_beams": 5, "length_penalty": -1.0, "max_new_tokens": 10}
    return [
        captioner(picture, prompt=template.replace("{}", question), **options)[0]["generated_text"]
        for picture in pictures
        for question in questions
    ]


@pytest.mark.parametrize("language_model", ["opt", "t5"])
def test_answers_are_those_of_the_pipeline(language_model):
    torch.manual_seed(0)
    is_t5 = language_model == "t5"
    parts = make_model(language_model).eval(), make_processor(is_encoder_decoder=is_t5)
    images = [make_image(0), b"no picture", make_image(1)]
    found = list(answer_questions(*parts, images, QUESTIONS, batch_size=3))
    template = "Question: {} Short answer:" if is_t5 else "Question: {} Answer:"
    expected = expected_answers(parts, [images[0], images[2]], template=template)
    assert [text for answers in found for text in answers.texts] == expected
    assert [answers.index for answers in found] == [0, 1, 2]
    assert "image 2 of 3" in found[1].error and found[1].texts == []


def test_a_picture_goes_through_the_tower_once():
    torch.manual_seed(0)
    model, seen = make_model().eval(), []
    model.vision_model.register_forward_hook(lambda module, inputs, output: seen.append(len(output.last_hidden_state)))
    list(
        answer_questions(
            model, make_processor(), [make_image(0), make_image(1)], QUESTIONS * 2, num_beams=2, max_new_tokens=4
        )
    )
    assert sum(seen) == 2


@pytest.mark.parametrize(
    ("questions", "prompt", "message"),
    [
        (["..."], None, "'...' is empty, or has no words"),
        (["is it <image>?"], None, "has '<image>', a special token"),
        (["what?"], "Question:", "has no {}"),
        ([], None, "A list of questions"),
        ("what?", None, "A list of questions"),
    ],
)
def test_questions_that_do_not_fit(questions, prompt, message):
    with pytest.raises(ValueError, match=message):
        next(answer_questions(make_model(), make_processor(), [make_image(0)], questions, prompt))


@pytest.mark.parametrize("language_model", ["opt", "t5"])
@pytest.mark.parametrize("normalization", ["sum", "mean", "relative"])
def test_choices_have_the_probabilities_of_their_scores(language_model, normalization):
    torch.manual_seed(0)
    is_t5 = language_model == "t5"
    model, processor = make_model(language_model), make_processor(is_encoder_decoder=is_t5)
    images, choices = [make_image(0), b"no picture", make_image(1)], ["a dog", "two people", "the sky"]
    found = list(
        answer_questions(
            model, processor, images, QUESTIONS, batch_size=3, choices=choices, normalization=normalization
        )
    )
    assert found[1].probabilities == [] and "not an image" in found[1].error
    template = "Question: {} Short answer:" if is_t5 else "Question: {} Answer:"
    for answers in (found[0], found[2]):
        for question, text, own in zip(
            ("what is it? really", QUESTIONS[1]), answers.texts, answers.probabilities, strict=True
        ):
            prompt = template.replace("{}", question)
            inputs = processor(images=images[answers.index], text=prompt, candidates=choices, return_tensors="pt")
            scores = model.score_texts(**inputs, normalization=normalization)[0]
            assert own == pytest.approx(scores.softmax(dim=0).tolist(), abs=1e-5)
            assert text == choices[scores.argmax()]


def test_the_command_with_choices(photos, model, capsys):
    parts = Blip2ForConditionalGeneration.from_pretrained(model), Blip2Processor.from_pretrained(model)
    choices = ["a dog", "the sky"]
    found = list(answer_questions(*parts, ["a.png", "b c.png"], QUESTIONS, choices=choices))
    options = ["--choices", *choices, "--model", str(model), "--device", "cpu"]
    main(["ask", "a.png", QUESTIONS[0], *options])
    own = dict(zip(choices, found[0].probabilities[0], strict=True))
    best = sorted(choices, key=own.get, reverse=True)
    assert capsys.readouterr().out.splitlines() == [f"{text}\t{own[text]:.1%}" for text in best]
    main(["ask", "a.png", "b c.png", *QUESTIONS, *options])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[2] for line in lines] == [text for answers in found for text in answers.texts]
    assert all(line[3].endswith("%") for line in lines) and len(lines) == 4
    main(["ask", "a.png", QUESTIONS[0], "--json", *options])
    (row,) = json.loads(capsys.readouterr().out)
    with pytest.raises(SystemExit, match="has 604 tokens|tokens, and image and prompt have .* 128 positions"):
        main(["ask", "a.png", QUESTIONS[0], *options[:-4], "--choices", "yes", "very long " * 90, *options[-4:]])
    assert row["answer"] == best[0] and row["probabilities"] == pytest.approx(own, abs=1e-4)


@pytest.mark.parametrize(
    ("choices", "kwargs", "message"),
    [
        (["a dog"], {}, "at least two different answers"),
        (["a dog", "a dog"], {}, "at least two different answers"),
        ("a dog", {}, "at least two different answers"),
        (["a dog", "a <image>"], {}, "has '<image>', a special token"),
        (["a dog", " "], {}, "a string that is not empty"),
        (["a dog", "the sky"], {"num_beams": 2}, "num_beams: nothing is generated"),
        (["a dog", "the sky"], {"normalization": "max"}, "one of sum, mean, relative"),
    ],
)
def test_choices_that_do_not_fit(choices, kwargs, message):
    with pytest.raises(ValueError, match=message):
        next(answer_questions(make_model(), make_processor(), [make_image(0)], ["what?"], choices=choices, **kwargs))


def test_the_command(photos, model, capsys):
    parts = Blip2ForConditionalGeneration.from_pretrained(model), Blip2Processor.from_pretrained(model)
    expected = [" ".join(text.split()) for text in expected_answers(parts, ["a.png", "b c.png"])]
    options = ["--model", str(model), "--device", "cpu"]
    main(["ask", "a.png", QUESTIONS[0], *options])
    assert capsys.readouterr().out == f"{expected[0]}\n"
    main(["ask", *QUESTIONS, "*.png", "a.png", *options])
    pairs = [(picture, question) for picture in ("a.png", "b c.png") for question in QUESTIONS]
    table = [f"{picture}\t{question}\t{text}" for (picture, question), text in zip(pairs, expected, strict=True)]
    assert capsys.readouterr().out.splitlines() == table
    main(["ask", "a.png", *QUESTIONS, "--json", "--num-beams", "1", "--max-new-tokens", "2", *options])
    rows = json.loads(capsys.readouterr().out)
    assert [(row["picture"], row["question"]) for row in rows] == pairs[:2] and all(row["answer"] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.png"], "a question is missing"),
        (["what is it?"], "a picture is missing"),
        (["a.png", "cat.jgp"], "cat.jgp is neither a picture that is there nor a question"),
        (["a.png", "photos/cat"], "photos/cat is neither"),
        (["a.png", "../cat"], "../cat is neither"),
        (["why/how", "is it cat.jpg?", "indoors/outdoors?", "who/what?"], "a picture is missing"),
        (["a.png", "my cat.jpg", "what?"], "no picture my cat.jpg"),
        (["a.png", "x*.png", "what?"], r"no picture x\*.png"),
        ([".", "what?"], "is a folder. Give its pictures"),
        (["a.png", ""], "An empty argument"),
        (["a.png", "what?", "--max-new-tokens", "3000"], "has 128 positions"),
        (["a.png", "what?", "--generate", "num_beam=2"], "Did you mean num_beams"),
        (["a.png", "what?", "--choices", "yes"], "--choices yes: at least two different answers"),
        (["a.png", "what?", "--choices", "yes", "no", "--num-beams", "2"], "--num-beams: nothing is generated"),
        (["a.png", "what?", "--normalization", "mean"], "--normalization is for --choices"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(photos, model, monkeypatch, arguments, message):
    monkeypatch.setattr("blip2_hf.cli.ask.load_captioner", lambda *_: pytest.fail("the model was loaded"))
    Path("photos").mkdir()
    with pytest.raises(SystemExit, match=f"^blip2-hf: .*{message}"):
        main(["ask", *arguments, "--model", str(model)])


def test_a_model_that_answers_nothing_and_a_picture_that_is_none(photos, model, tmp_path, capsys):
    save_stage1(tmp_path / "stage1")
    with pytest.raises(SystemExit, match="has no language model"):
        main(["ask", "a.png", "what?", "--model", "stage1"])
    (tmp_path / "notes.md").write_text("no picture")
    with pytest.raises(SystemExit) as stopped:
        main(["ask", "notes.md", "a.png", "what?", "--model", str(model)])
    printed = capsys.readouterr()
    assert stopped.value.code == 1 and printed.out.startswith("a.png\twhat?\t")
    assert "('notes.md'): not an image" in printed.err
