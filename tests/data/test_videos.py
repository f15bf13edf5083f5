"""Videos to learn from: as rows, in batches, as stored features, and by the commands."""

import json

import datasets
import numpy as np
import pytest
import torch
from instructblip_video import save_instructblip_video
from PIL import Image
from saved_models import save_captioner
from stage1 import Processor
from tiny import make_image, make_image_processor, make_model, make_processor
from videos import make_frames, numbers_of, write_video

from blip2_hf import Blip2ForConditionalGeneration, Blip2Processor
from blip2_hf.cli import main
from blip2_hf.data import (
    BadRowError,
    ImageTextCollator,
    ImageTextPairs,
    LanguageModelCollator,
    RandomResizedCropAndFlip,
    cache_features,
    load_cached_features,
    load_rows,
)
from blip2_hf.data.rows import seeded_generator
from blip2_hf.models.image_loading import load_image
from blip2_hf.models.video_loading import sample_frames
from blip2_hf.training.diversity import QueryDiversityLog


CAPTIONS = ["a dog", "a red bus near the street", "two people"]


@pytest.fixture
def clips(tmp_path):
    return [write_video(tmp_path / f"{i}.mp4", make_frames(first=9 * i)) for i in range(3)]


def make_rows(clips) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"video": [str(clip) for clip in clips], "caption": CAPTIONS})


def test_rows_of_every_kind(clips):
    expected = [load_image(frame) for frame in sample_frames(clips[0])]
    data = clips[0].read_bytes()
    whole = [Image.fromarray(frame) for frame in make_frames()]
    for value in (str(clips[0]), {"bytes": data, "path": "a.mp4"}, {"bytes": None, "path": str(clips[0])}):
        (item,) = ImageTextPairs([{"video": value, "caption": "a dog"}], image_column="video")
        assert item["image"] == expected
    (item,) = ImageTextPairs([{"image": whole, "caption": "a dog"}], num_frames=3)
    assert numbers_of(item["image"]) == [0, 2, 5]
    features = datasets.Features({"video": datasets.Video(), "caption": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"video": [str(clips[0])], "caption": ["a dog"]}, features=features)
    assert ImageTextPairs(rows, image_column="video")[0]["image"] == expected
    lists = datasets.Features({"image": datasets.List(datasets.Image()), "caption": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": [whole], "caption": ["a dog"]}, features=lists)
    assert numbers_of(ImageTextPairs(rows)[0]["image"]) == [0, 2, 4, 6]


def test_what_can_not_be_read_names_the_row(clips):
    rows = [{"video": str(clips[0].with_name("none.mp4")), "caption": "a"}, {"video": None, "caption": "a"}]
    rows += [{"video": ["https://example.com/a.png"] * 2, "caption": "a"}]
    pairs = ImageTextPairs(rows, image_column="video")
    with pytest.raises(BadRowError, match=r"row 0 \(.*none.mp4.*no such file"):
        pairs[0]
    with pytest.raises(BadRowError, match="Row 1 has no picture in column 'video'"):
        pairs[1]
    with pytest.raises(BadRowError, match="a URL in a row of a dataset is fetched only if that is asked for"):
        pairs[2]


def test_all_frames_get_the_same_crop(clips):
    transform = RandomResizedCropAndFlip(28)
    pairs = ImageTextPairs(make_rows(clips), image_column="video", transform=transform, seed=3)
    frames = [load_image(frame) for frame in sample_frames(clips[1])]
    expected = [transform(frame, seeded_generator(3, 0, 1)) for frame in frames]
    for actual, one in zip(pairs[1]["image"], expected, strict=True):
        assert np.array_equal(np.asarray(actual), np.asarray(one))


@pytest.mark.parametrize("num_query_tokens", [4, None])
@pytest.mark.parametrize("language_model", ["opt", "t5"])
def test_a_batch_is_what_the_processor_makes(language_model, num_query_tokens, clips):
    is_t5 = language_model == "t5"
    processor = make_processor(is_encoder_decoder=is_t5, num_query_tokens=num_query_tokens)
    model = make_model(language_model, **({} if num_query_tokens else {"image_token_index": None}))
    pairs = ImageTextPairs(make_rows(clips), image_column="video", prompt="a photo of", num_frames=3)
    batch = LanguageModelCollator(processor)([pairs[i] for i in range(3)])
    assert batch["pixel_values"].shape == (3, 3, 3, 28, 28)
    expected = processor(
        videos=clips, num_frames=3, text="a photo of", text_target=[pairs[i]["text"] for i in range(3)],
        return_tensors="pt",
    )  # fmt: skip
    assert torch.equal(batch["pixel_values"].flatten(0, 1), expected["pixel_values"])
    torch.testing.assert_close(model(**batch).loss, model(**expected).loss)


def test_the_qformer_reads_the_prompt_with_each_frame(clips, tmp_path):
    torch.manual_seed(0)
    save_instructblip_video(tmp_path / "model")
    model = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    processor = Blip2Processor.from_pretrained(tmp_path / "model")
    pairs = ImageTextPairs(make_rows(clips), image_column="video", prompt="a photo of")
    batch = LanguageModelCollator(processor)([pairs[i] for i in range(3)])
    texts = [pairs[i]["text"] for i in range(3)]
    expected = processor(videos=clips, text="a photo of", text_target=texts, return_tensors="pt")
    assert len(batch["qformer_input_ids"]) == 3 and len(expected["qformer_input_ids"]) == 12
    torch.testing.assert_close(model(**batch).loss, model(**expected).loss)
    log = QueryDiversityLog()
    log.keep(batch)
    kept = log.inputs
    assert len(kept["pixel_values"]) == len(kept["qformer_input_ids"])
    assert torch.equal(kept["qformer_input_ids"], expected["qformer_input_ids"][: len(kept["pixel_values"])])


def test_batches_that_do_not_fit_are_told(clips):
    collator = LanguageModelCollator(make_processor(), max_positions=20)
    video = {"image": [make_image()] * 4, "text": "a dog"}
    with pytest.raises(ValueError, match=r"Rows of a batch have .*4 frames.* Give pictures and videos as two"):
        collator([video, {"image": make_image(), "text": "a dog"}])
    with pytest.raises(BadRowError, match="takes .* positions, but the model has 20"):
        collator([{"image": [make_image()] * 6, "text": "a dog"}])
    with pytest.raises(ValueError, match="Videos go with a language model"):
        ImageTextCollator(Processor())([video | {"image_id": 0}])


@pytest.mark.parametrize("views", [1, 2])
def test_stored_features_are_those_of_the_frames(views, clips, tmp_path):
    torch.manual_seed(0)
    model, transform = make_model().eval(), RandomResizedCropAndFlip(28)
    processor, rows = make_processor(), make_rows(clips)
    options = {"views": views, "transform": transform, "dtype": "float32", "num_frames": 3, "batch_size": 2}
    cache_features(rows, model, processor, tmp_path / "features", "video", **options)
    cached = load_cached_features(tmp_path / "features")
    frames = [load_image(frame) for frame in sample_frames(clips[2], 3)]
    for view in range(views):
        seen = [transform(frame, seeded_generator(0, 2, view)) for frame in frames] if view else frames
        pixel_values = processor.image_processor(images=seen, return_tensors="pt")["pixel_values"]
        stored = np.frombuffer(cached[2]["image_embeds"], np.float32).reshape(cached[2]["image_embeds_shape"])
        torch.testing.assert_close(torch.tensor(stored[view]), model.get_image_embeds(pixel_values))
    batches = [
        LanguageModelCollator(processor)([pairs[i] for i in range(3)])
        for pairs in (
            ImageTextPairs(cached, train=False, prompt="a photo of"),
            ImageTextPairs(rows, image_column="video", train=False, prompt="a photo of", num_frames=3),
        )
    ]
    assert batches[0]["image_embeds"].shape[:2] == (3, 3)
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    torch.testing.assert_close(model(**batches[0]).loss, model(**batches[1]).loss)
    assert ImageTextPairs(cached).frames_per_video == 3


def test_pictures_and_videos_are_not_stored_together(clips, tmp_path):
    make_image().save(tmp_path / "a.png")
    rows = datasets.Dataset.from_dict({"image": [str(clips[0]), str(tmp_path / "a.png")]})
    with pytest.raises(ValueError, match="Row 1 has a picture, the first row a video"):
        cache_features(rows, make_model().eval(), make_image_processor(), tmp_path / "features")


@pytest.mark.parametrize("kind", ["folder", "table", "features"])
def test_from_videos_to_a_fine_tuned_model_that_answers(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    save_captioner(tmp_path / "model")
    (tmp_path / "clips").mkdir()
    for i in range(6):
        write_video(tmp_path / "clips" / f"{i}.mp4", make_frames(4, 9 * i))
        (tmp_path / "clips" / f"{i}.txt").write_text(CAPTIONS[i % 3])
    lines = [{"video": f"clips/{i}.mp4", "caption": CAPTIONS[i % 3]} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = "clips" if kind == "folder" else "rows.jsonl"
    column = "image" if kind == "folder" else "video"
    assert numbers_of(ImageTextPairs(load_rows(data), image_column=column, num_frames=2)[0]["image"]) == [0, 2]
    frames = ["--num-frames", "2"]
    if kind == "features":
        main(
            ["cache-features", data, "--model", "model", "--output", "features", "--size", "28", "--device", "cpu"]
            + ["--num-workers", "0", *frames]
        )
        data = "features"
        frames = []  # as many as the features are of
    steps = ["--max-steps", "2", "--batch-size", "2", "--held-out", "2", "--num-workers", "0", "--device", "cpu"]
    main(["finetune", data, "--model", "model", "--output", "tuned", *steps, *frames])
    assert Blip2Processor.from_pretrained("tuned").frames_per_video == 2
    capsys.readouterr()
    main(["ask", "clips/0.mp4", "what is it?", "--model", "tuned", "--device", "cpu"])
    first = capsys.readouterr().out
    main(["ask", "clips/0.mp4", "what is it?", "--model", "tuned", "--device", "cpu", "--num-frames", "2"])
    assert capsys.readouterr().out == first
    if kind == "features":
        with pytest.raises(SystemExit, match="--num-frames 4: features has stored features, of 2 frames each"):
            main(["finetune", data, "--model", "model", "--output", "other", *steps, "--num-frames", "4"])


def test_videos_that_are_gone_are_told_before_the_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_captioner(tmp_path / "model")
    write_video(tmp_path / "0.mp4")
    lines = [{"video": f"{i}.mp4", "caption": "a dog"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SystemExit, match=r"The pictures of 3 of 4 rows of rows.jsonl are not there"):
        main(["finetune", "rows.jsonl", "--model", "model", "--output", "tuned", "--device", "cpu"])
