"""Captions of videos, and answers about them: those of their frames in a row."""

import json
from unittest import mock

import datasets
import pytest
import torch
from instructblip_video import save_instructblip_video
from PIL import Image
from saved_models import save_captioner
from tiny import make_image, make_model, make_processor
from videos import make_frames, write_video

from blip2_hf import Blip2ForConditionalGeneration, Blip2Processor
from blip2_hf.captioning import answer_questions, caption_dataset, caption_images
from blip2_hf.cli import main
from blip2_hf.models.generation_presets import generation_preset
from blip2_hf.models.video_loading import sample_frames


QUESTIONS = ["what is it", "what colour is the bus"]


def written(model, processor, video, prompt, num_frames=4, **kwargs) -> str:
    """What the model writes about one video, or picture, that the processor is given."""
    frames = sample_frames(video, num_frames) if not isinstance(video, type(make_image())) else [video]
    inputs = processor(images=[frames], text=prompt, return_tensors="pt")
    tokens = model.generate(**inputs, **kwargs)
    return processor.post_process_image_text_to_text(tokens, inputs["input_ids"])[0]


@pytest.fixture
def clips(tmp_path):
    paths = [tmp_path / "a.mp4", tmp_path / "b.mkv"]
    return [write_video(path, make_frames(first=9 * i)) for i, path in enumerate(paths)]


@pytest.mark.parametrize("language_model", ["opt", "t5"])
def test_captions_of_videos_and_pictures_together(language_model, clips):
    torch.manual_seed(0)
    model, processor = make_model(language_model), make_processor(is_encoder_decoder=language_model == "t5")
    pictures = [clips[0], make_image(), str(clips[1]), list(make_frames(3)), b"no picture", make_image(1)]
    found = list(caption_images(model, processor, pictures, "a photo of", max_new_tokens=5, batch_size=4))
    readable = [pictures[i] for i in (0, 1, 2, 3, 5)]
    expected = [written(model, processor, picture, "a photo of", max_new_tokens=5) for picture in readable]
    assert [caption.text for caption in found if caption.error is None] == expected
    assert "image 5 of 6" in found[4].error
    streamed = list(caption_images(model, processor, iter(pictures), "a photo of", max_new_tokens=5))
    assert [caption.texts for caption in streamed] == [caption.texts for caption in found]
    processor.frames_per_video = 2
    (two,) = caption_images(model, processor, clips[:1], "a photo of", max_new_tokens=5)
    assert two.text == written(model, processor, clips[0], "a photo of", 2, max_new_tokens=5)


def test_answers_about_videos_and_pictures_together(clips):
    torch.manual_seed(0)
    model, processor = make_model(), make_processor()
    pictures = [clips[0], clips[0].with_name("none.mp4"), make_image(), clips[1]]
    found = list(answer_questions(model, processor, pictures, QUESTIONS))
    options = generation_preset("vqa", model.config).generate_kwargs
    prompts = [f"Question: {question} Answer:" for question in QUESTIONS]
    assert [answers.texts for answers in found] == [
        [] if i == 1 else [written(model, processor, picture, prompt, **options) for prompt in prompts]
        for i, picture in enumerate(pictures)
    ]
    assert "none.mp4'): no such file" in found[1].error


def test_choices_and_confidence_of_videos_and_pictures_together(clips):
    torch.manual_seed(0)
    model, processor, choices = make_model(), make_processor(), ["a dog", "the sky"]
    pictures = [clips[0], make_image(), clips[1]]
    found = list(answer_questions(model, processor, pictures, QUESTIONS, choices=choices))
    captions = list(caption_images(model, processor, pictures, "a photo of", max_new_tokens=5, with_confidence=True))

    def scores(picture, prompt, candidates, normalization="sum"):
        kind = "images" if picture is pictures[1] else "videos"
        inputs = processor(**{kind: [picture]}, text=prompt, candidates=candidates, return_tensors="pt")
        if normalization == "mean":
            inputs["candidate_labels"] = inputs["candidate_labels"][..., :5]  # of what was cut off
        return model.score_texts(**inputs, normalization=normalization)[0]

    for picture, answers, caption in zip(pictures, found, captions, strict=True):
        expected = [scores(picture, f"Question: {text} Answer:", choices).softmax(0).tolist() for text in QUESTIONS]
        assert answers.probabilities == [pytest.approx(own, abs=1e-5) for own in expected]
        mean = scores(picture, "a photo of", caption.texts, "mean").exp().item()
        assert caption.confidences == pytest.approx([mean], rel=1e-4)


def test_the_qformer_reads_the_question_with_each_frame(clips, tmp_path):
    torch.manual_seed(0)
    save_instructblip_video(tmp_path / "model")
    model = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    processor = Blip2Processor.from_pretrained(tmp_path / "model")
    (found,) = answer_questions(model, processor, clips[:1], QUESTIONS, max_new_tokens=5)
    prompts = [f"Question: {question} Answer:" for question in QUESTIONS]
    assert found.texts == [written(model, processor, clips[0], prompt, max_new_tokens=5) for prompt in prompts]
    (caption,) = caption_images(model, processor, clips[:1], "a photo of", max_new_tokens=5)
    assert caption.text == written(model, processor, clips[0], "a photo of", max_new_tokens=5)


def test_a_folder_of_videos_and_rows(clips, tmp_path):
    torch.manual_seed(0)
    model, processor = make_model(), make_processor()
    (tmp_path / "notes.mp4.txt").write_text("no video")
    counts = caption_dataset(model, processor, tmp_path, tmp_path / "captions.jsonl", max_new_tokens=5)
    assert (counts.pictures, counts.captioned, counts.broken) == (2, 2, 0)
    lines = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    expected = [written(model, processor, clip, "", max_new_tokens=5) for clip in clips]
    assert lines == [{"file": clip.name, "caption": text} for clip, text in zip(clips, expected, strict=True)]
    # Another number of frames is another setting
    processor.frames_per_video = 2
    with pytest.raises(ValueError, match="num_frames"):
        caption_dataset(model, processor, tmp_path, tmp_path / "captions.jsonl", max_new_tokens=5)
    processor.frames_per_video = 4
    lists = datasets.Features({"video": datasets.List(datasets.Image())})
    frames = [list(map(Image.fromarray, sample_frames(clip, 8))) for clip in clips]
    for rows in (
        datasets.Dataset.from_dict({"video": frames}, features=lists),
        datasets.Dataset.from_dict(
            {"video": list(map(str, clips))}, features=datasets.Features({"video": datasets.Video()})
        ),
    ):
        caption_dataset(model, processor, rows, tmp_path / "rows.jsonl", max_new_tokens=5, overwrite=True)
        lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
        assert lines == [{"row": row, "caption": text} for row, text in enumerate(expected)]
    rows = datasets.Dataset.from_dict({"image": [str(clip) for clip in clips]})
    caption_dataset(model, processor, rows, tmp_path / "paths.jsonl", max_new_tokens=5)
    lines = [json.loads(line) for line in (tmp_path / "paths.jsonl").read_text().splitlines()]
    assert lines == [{"row": row, "caption": text} for row, text in enumerate(expected)]


def test_videos_beside_pictures_are_passed_over(clips, tmp_path):
    make_image().save(tmp_path / "a.png")  # as telephones do: a.mp4 is there, too
    with mock.patch("blip2_hf.jobs.picture_files.logger.warning") as warning:
        counts = caption_dataset(make_model(), make_processor(), tmp_path, max_new_tokens=2)
    assert "2 videos are passed over, because there are pictures" in warning.call_args[0][0]
    assert counts.pictures == 1 and (tmp_path / "a.txt").exists()


def test_commands(clips, tmp_path, monkeypatch, capsys):
    model = str(save_captioner(tmp_path / "model"))
    parts = Blip2ForConditionalGeneration.from_pretrained(model).eval(), Blip2Processor.from_pretrained(model)
    monkeypatch.chdir(tmp_path)
    options = ["--model", model, "--device", "cpu", "--num-frames", "3"]
    capsys.readouterr()
    main(["ask", "a.mp4", "what is it?", *options, "--json"])
    (answer,) = json.loads(capsys.readouterr().out)
    preset = generation_preset("vqa", parts[0].config)
    prompt = preset.prompt.replace("{}", "what is it?")
    expected = written(*parts, clips[0], prompt, 3, **preset.generate_kwargs)
    assert answer == {"picture": "a.mp4", "question": "what is it?", "answer": expected}
    main(["caption", "*.m[pk]?", *options])
    captions = [written(*parts, clip, "", 3, max_new_tokens=30) for clip in clips]
    assert capsys.readouterr().out.splitlines() == [
        f"{clip.name}\t{' '.join(text.split())}".rstrip("\t") for clip, text in zip(clips, captions, strict=True)
    ]
    (tmp_path / "clips").mkdir()
    for clip in clips:
        clip.rename(tmp_path / "clips" / clip.name)
    (tmp_path / "clips" / "c.mp4").write_bytes(b"no video")
    main(["caption", "clips", *options, "--num-workers", "0"])
    assert [(tmp_path / "clips" / f"{name}.txt").read_text() for name in "ab"] == [f"{text}\n" for text in captions]
    assert "no video that pyav can read" in (tmp_path / "clips" / "captions.broken.jsonl").read_text()
    with pytest.raises(SystemExit, match=r"There is no video clips/d.mp4"):
        main(["ask", "clips/d.mp4", "what is it?", *options])
    with pytest.raises(SystemExit, match="positions, and .* are taken.* fewer --num-frames"):
        main(["ask", "clips/a.mp4", "what?", "--model", model, "--device", "cpu", "--num-frames", "32"])
