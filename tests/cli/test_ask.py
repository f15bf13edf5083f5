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
