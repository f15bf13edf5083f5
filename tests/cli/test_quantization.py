"""Models that commands quantise while they load them."""

import json
from pathlib import Path

import pytest
import torch
from saved_models import save_captioner, save_stage1
from tiny import make_image
from transformers import BitsAndBytesConfig

from blip2_hf import Blip2ForConditionalGeneration, Blip2Processor
from blip2_hf.captioning import answer_questions, caption_images
from blip2_hf.cli import main


FAST = ["--model", "captioner", "--device", "cpu", "--max-new-tokens", "4", "--load-in-8bit"]


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_captioner(tmp_path / "captioner")
    save_stage1(tmp_path / "stage1")
    make_image().save("cat.png")
    return tmp_path


@pytest.fixture
def quantized(work):
    """The model in 8 bits, loaded by hand, and its processor."""
    pytest.importorskip("bitsandbytes")
    bits = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "dtype": torch.bfloat16}
    model = Blip2ForConditionalGeneration.from_pretrained("captioner", **bits, device_map={"": "cpu"})
    kinds = {n.partition(".")[0] for n, m in model.named_modules() if type(m).__name__ == "Linear8bitLt"}
    assert kinds == {"vision_model", "language_model"}
    return model, Blip2Processor.from_pretrained("captioner")


def test_a_caption_and_an_answer_are_those_of_the_quantized_model(quantized, capsys):
    main(["caption", "cat.png", *FAST])
    (caption,) = caption_images(*quantized, ["cat.png"], max_new_tokens=4)
    assert capsys.readouterr().out.split() == caption.text.split()
    main(["ask", "cat.png", "what is it?", *FAST, "--num-beams", "1"])
    (answers,) = answer_questions(*quantized, ["cat.png"], ["what is it?"], max_new_tokens=4, num_beams=1)
    assert capsys.readouterr().out.split() == answers.texts[0].split()


def test_captions_in_8_bits_are_not_mixed_with_others(quantized):
    whole = [word for word in FAST if word != "--load-in-8bit"]
    main(["caption", "cat.png", "--output", "captions.jsonl", *FAST])
    with pytest.raises(SystemExit, match="captions.jsonl"):
        main(["caption", "cat.png", "--output", "captions.jsonl", *whole])


def test_an_evaluation_in_8_bits(quantized):
    Path("photos").mkdir()
    make_image().save("photos/a.png")
    Path("photos/a.txt").write_text("a dog")
    main(
        ["evaluate", "caption", "--data", "photos", "--output", "results", *FAST[:4], *FAST[6:], "--num-workers", "0"]
    )
    assert json.loads(Path("results/results.json").read_text())["num_scored"] == {"overall": 1}


def test_a_quantized_folder_is_a_model_for_what_reads_it(quantized, capsys):
    for part in quantized:
        part.save_pretrained("small")
    main(["caption", "cat.png", "--model", "small", *FAST[2:6]])
    (caption,) = caption_images(*quantized, ["cat.png"], max_new_tokens=4)
    assert capsys.readouterr().out.split() == caption.text.split()
    for line, message in (
        ("caption cat.png --model small --load-in-8bit", "small was saved in 4 or 8 bits. It keeps its precision"),
        ("ask cat.png what? --model small --dtype float32", "small was saved in 4 or 8 bits. It keeps its precision"),
        ("finetune photos --model small --output tuned", "Give the model that it was made of"),
        ("export small --output small.pt2", "Give the model that it was made of"),
    ):
        Path("photos").mkdir(exist_ok=True)
        make_image().save("photos/a.png")
        Path("photos/a.txt").write_text("a dog")
        with pytest.raises(SystemExit, match=message):
            main(line.split())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("caption cat.png --model captioner --load-in-4bit --load-in-8bit", "give one of the two"),
        ("ask cat.png what? --model captioner --load-in-4bit", "the vision tower is 32 wide, and 64 are needed"),
        ("evaluate retrieval --data x.parquet --model stage1 --output o --load-in-8bit", "retrieval has no use for"),
    ],
)
def test_what_does_not_go_together(work, line, message):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(SystemExit, match=message):
        main(line.split())
