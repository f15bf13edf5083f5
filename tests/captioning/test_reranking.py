"""Best of several captions, by a model that matches pictures with texts."""

import json

import datasets
import pytest
import torch
from saved_models import save_captioner, save_stage1
from tiny import make_image, make_model, make_processor

from blip2_hf import Blip2ForConditionalGeneration, Blip2Processor
from blip2_hf.capfilt import RetrievalFilter
from blip2_hf.captioning import caption_dataset, caption_images
from blip2_hf.cli import main
from blip2_hf.retrieval import load_retrieval_model


SAMPLED = {"do_sample": True, "top_p": 0.9, "num_beams": 1, "max_new_tokens": 6, "seed": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    return str(save_captioner(folder / "captioner")), str(save_stage1(folder / "stage1"))


@pytest.fixture(scope="module")
def parts(folders):
    model = Blip2ForConditionalGeneration.from_pretrained(folders[0]).eval()
    return model, Blip2Processor.from_pretrained(folders[0])


@pytest.fixture(scope="module")
def matching(folders):
    return RetrievalFilter(*load_retrieval_model(folders[1]))


def test_the_best_of_several_captions_remains(parts, matching):
    images = [make_image(0), b"no picture", make_image(1), make_image(2)]
    options = {"num_captions": 8, "batch_size": 2, **SAMPLED}
    written = list(caption_images(*parts, images, with_confidence=True, **options))
    best = list(caption_images(*parts, images, with_confidence=True, rerank=matching, **options))
    assert "not an image" in best[1].error and best[1].texts == []
    places = []
    for number in (0, 2, 3):
        (scores,) = matching([images[number]], [written[number].texts])
        places.append(scores.index(max(scores)))
        assert best[number].texts == [written[number].texts[places[-1]]]
        assert best[number].confidences == [written[number].confidences[places[-1]]]
    assert any(places)


def test_a_collection_by_the_command(parts, matching, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for seed in range(3):
        make_image(seed).save(tmp_path / "photos" / f"{seed}.png")
    options = ["--model", folders[0], "--rerank", folders[1], "--max-new-tokens", "6", "--seed", "3"]
    main(["caption", "photos", *options, "--output", "captions.jsonl", "--captions-per-image", "4"])
    caption_dataset(*parts, "photos", "expected.jsonl", num_captions=4, rerank=matching, **SAMPLED)
    found, expected = ((tmp_path / f"{name}.jsonl").read_text() for name in ("captions", "expected"))
    assert found == expected and all(isinstance(json.loads(line)["caption"], str) for line in found.splitlines())
    settings = json.loads((tmp_path / "captions.jsonl.settings.json").read_text())
    assert settings["rerank"]["score"] == "sum" and settings["num_captions"] == 4
    with pytest.raises(SystemExit, match="rerank"):
        main(["caption", "photos", *options[:2], *options[4:], "--top-p", "0.9", "--output", "captions.jsonl"])
    capsys.readouterr()
    main(["caption", "photos/0.png", "photos/1.png", *options, "--captions-per-image", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["photos/0.png", "photos/1.png"]


def test_road_from_pictures_to_a_model_that_chooses(folders, tmp_path, monkeypatch, capsys):
    """Caption, keep what the model is sure of, learn from it, choose among answers, and score the choice."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "photos").mkdir()
    for seed in range(6):
        make_image(seed).save(tmp_path / "photos" / f"{seed}.png")
    device = ["--device", "cpu", "--num-workers", "0"]
    options = ["--model", folders[0], "--rerank", folders[1], "--confidence", "--max-new-tokens", "6", "--seed", "3"]
    main(["caption", "photos", *options, *device, "--output", "photos/metadata.jsonl"])
    path = tmp_path / "photos" / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    surest = sorted(rows, key=lambda row: -row["confidence"])[:4]
    path.write_text("".join(json.dumps(row) + "\n" for row in surest))
    steps = ["--max-steps", "2", "--batch-size", "2", "--held-out", "2", "--skip-bad-rows"]
    main(["finetune", "photos", "--model", folders[0], "--output", "tuned", *steps, *device])
    capsys.readouterr()
    choices = ["a dog", "the sky"]
    main(["ask", "photos/0.png", "what is it?", "--model", "tuned", "--choices", *choices, "--json", *device[:2]])
    (answer,) = json.loads(capsys.readouterr().out)
    row = {"image": "photos/0.png", "question": "what is it?", "choices": choices, "answer": answer["answer"]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row))
    main(
        ["evaluate", "multiple-choice", "--data", "questions.jsonl", "--model", "tuned", "--output", "scores", *device]
    )
    assert "| overall | 1 | 100.00 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-beams", "3"], "--rerank chooses among sampled captions"),
        (["--generate", "num_beams=3"], "--rerank chooses among sampled captions"),
        (["--generate", "do_sample=false"], "--rerank chooses among sampled captions"),
        (["--captions-per-image", "1"], "--captions-per-image 2 or more"),
    ],
)
def test_options_that_do_not_fit(folders, tmp_path, options, message):
    make_image().save(tmp_path / "a.png")
    with pytest.raises(SystemExit, match=message):
        main(["caption", str(tmp_path / "a.png"), "--model", folders[0], "--rerank", folders[1], *options])


def test_what_can_not_be_opened_twice_is_refused():
    parts, rerank = (make_model(), make_processor()), lambda pictures, texts: [[0.0] * len(own) for own in texts]
    with pytest.raises(ValueError, match="give the images as a list"):
        next(caption_images(*parts, iter([make_image()]), num_captions=2, rerank=rerank, **SAMPLED))
    with pytest.raises(ValueError, match="A video can't be re-ranked"):
        next(caption_images(*parts, [[make_image(0), make_image(1)]], num_captions=2, rerank=rerank, **SAMPLED))
