"""Videos in calls of the processor and in chats, and InstructBLIP-Video."""

import numpy as np
import pytest
import torch
from instructblip_video import save_instructblip_video
from PIL import Image
from tiny import NUM_QUERIES, make_image, make_model, make_processor
from transformers import pipeline
from videos import make_frames, write_video

from blip2_hf import Blip2ForConditionalGeneration, Blip2Processor, ImageLoadError


NUMBERS = [0, 2, 4, 6]


@pytest.fixture
def processor():
    return make_processor()


def make_clip(first: int = 0) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in make_frames(first=first)]


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("text", ["what is it?", ["what is it?"], None])
@pytest.mark.parametrize("num_query_tokens", [NUM_QUERIES, None])
def test_a_video_is_its_frames_in_a_row(text, num_query_tokens):
    processor = make_processor(num_query_tokens=num_query_tokens)
    clip = make_clip()
    expected = processor(images=[[clip[n] for n in NUMBERS]], text=text, return_tensors="pt")
    for videos in (clip, [clip], make_frames(), make_frames()[None]):
        assert_same(processor(videos=videos, text=text, return_tensors="pt"), expected)
    two = processor(videos=clip, text=text, num_frames=2, return_tensors="pt")
    assert_same(two, processor(images=[[clip[0], clip[4]]], text=text, return_tensors="pt"))
    assert_same(processor(videos=clip, text=text, videos_kwargs={"num_frames": 2}, return_tensors="pt"), two)
    every = processor(videos=clip, text=text, do_sample_frames=False, return_tensors="pt")
    assert_same(every, processor(images=[clip], text=text, return_tensors="pt"))


def test_files(processor, tmp_path):
    path = write_video(tmp_path / "clip.mp4")
    both = processor(videos=[path, make_clip()], text="a dog", return_tensors="pt")
    assert both["pixel_values"].shape == (8, 3, 28, 28)
    assert (both["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [4 * NUM_QUERIES] * 2
    # The codec rounds, and its colours are not those of RGB
    torch.testing.assert_close(both["pixel_values"][:4], both["pixel_values"][4:], atol=0.2, rtol=0)
    with pytest.raises(ImageLoadError, match=r"video 2 of 2 \('.*none.mp4'\): no such file"):
        processor(videos=[path, tmp_path / "none.mp4"], text="a dog")


def test_texts_to_learn(processor):
    clips = [make_clip(), make_clip(9)]
    actual = processor(videos=clips, text="a photo of", text_target=["a dog", "grass"], return_tensors="pt")
    groups = [[clip[n] for n in NUMBERS] for clip in clips]
    expected = processor(images=groups, text="a photo of", text_target=["a dog", "grass"], return_tensors="pt")
    assert_same(actual, expected)


def test_marks(processor):
    clips, picture = [make_clip(), make_clip(9)], make_image()
    frames = [[clip[n] for n in NUMBERS] for clip in clips]
    row = "<image>" * 4
    texts = ["first: <video>?", "second: <video>"]
    expected = [text.replace("<video>", row) for text in texts]
    assert_same(
        processor(videos=clips, text=texts, return_tensors="pt"),
        processor(images=frames, text=expected, return_tensors="pt"),
    )
    # Two in a text, and pictures between them
    assert_same(
        processor(images=picture, videos=clips, text="<video> then <image> and <video>", return_tensors="pt"),
        processor(
            images=[[*frames[0], picture, *frames[1]]], text=f"{row} then <image> and {row}", return_tensors="pt"
        ),
    )
    # In different texts
    assert_same(
        processor(images=[picture], videos=clips[:1], text=["<image> a", "<video> b"], return_tensors="pt"),
        processor(images=[[picture], frames[0]], text=["<image> a", f"{row} b"], return_tensors="pt"),
    )
    # Marks of the frames, as apply_chat_template writes them
    assert_same(
        processor(videos=clips[:1], text=f"{row}what?", return_tensors="pt"),
        processor(images=frames[:1], text=f"{row}what?", return_tensors="pt"),
    )


def test_what_does_not_fit_is_told(processor):
    clip = make_clip()
    with pytest.raises(ValueError, match=r"2 `<video>` and 0 `<image>` marks, but there are 1 videos and 0 images"):
        processor(videos=[clip], text="<video><video>")
    with pytest.raises(ValueError, match=r"0 `<video>` and 0 `<image>` marks, but there are 1 videos and 1 images"):
        processor(videos=[clip], images=[make_image()], text="a")
    with pytest.raises(ValueError, match="for 2 texts"):
        processor(videos=[clip], text=["a", "b"])
    with pytest.raises(ValueError, match="num_frames=-1: a whole number of at least 1"):
        processor(videos=[clip], text="a", num_frames=-1)
    with pytest.raises(TypeError, match="was given fps, and takes images, text, videos, num_frames"):
        processor(videos=[clip], text="a", fps=2)
    with pytest.raises(TypeError, match="was given fps"):
        processor(videos=[clip], text="a", videos_kwargs={"fps": 2})
    # Generic callers give options of videos with pictures
    processor(images=make_image(), text="a", fps=2)
    without = make_processor(num_query_tokens=None)
    with pytest.raises(ValueError, match="has no num_query_tokens"):
        without(videos=[clip], text="<video>")
    # The model would share the frames out evenly
    with pytest.raises(ValueError, match=r"The texts have \[8, 3\] images or frames"):
        without(videos=[clip, clip[:3]], text="a", do_sample_frames=False)


def test_the_processor_keeps_its_number_of_frames(tmp_path):
    make_processor().save_pretrained(tmp_path / "default")
    assert "frames_per_video" not in (tmp_path / "default" / "processor_config.json").read_text()
    make_processor(frames_per_video=3).save_pretrained(tmp_path / "three")
    processor = Blip2Processor.from_pretrained(tmp_path / "three")
    assert processor(videos=make_clip(), text="a", return_tensors="pt")["pixel_values"].shape[0] == 3


def test_chats(processor):
    clip, picture = make_clip(), make_image()
    frames = [clip[n] for n in NUMBERS]

    def chat(*parts):
        return [{"role": "user", "content": [*parts, {"type": "text", "text": "what is it?"}]}]

    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    images = [{"type": "image", "image": image} for image in (picture, *frames)]
    video = {"type": "video", "video": clip}
    text = processor.apply_chat_template(chat(video))
    assert text == "<image>" * 4 + "Question: what is it? Answer:"
    actual = processor.apply_chat_template(chat(images[0], video), **options)
    assert_same(actual, processor.apply_chat_template(chat(*images), **options))
    assert_same(
        processor(videos=clip, text=text, return_tensors="pt"), processor.apply_chat_template(chat(video), **options)
    )
    for place in ({"num_frames": 2}, {"processor_kwargs": {"num_frames": 2}}):
        two = processor.apply_chat_template(chat(video), **options, **place)
        assert_same(two, processor.apply_chat_template(chat(images[1], images[3]), **options))
    assert processor.apply_chat_template(chat({"type": "video"}), num_frames=1).startswith("<image>Question")


def test_the_pipeline_of_chats(processor, tmp_path):
    path, model = write_video(tmp_path / "clip.mp4"), make_model()
    chat = [{"role": "user", "content": [{"type": "video", "path": str(path)}, {"type": "text", "text": "what?"}]}]
    pipe = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    (answer,) = pipe(chat, max_new_tokens=4, return_full_text=False)
    inputs = processor(videos=path, text="Question: what? Answer:", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=4)
    assert [answer["generated_text"].strip()] == processor.post_process_image_text_to_text(tokens, inputs["input_ids"])


def test_chats_with_files(processor, tmp_path):
    path = write_video(tmp_path / "clip.mp4")
    expected = processor(videos=path, text="<video>Question: what? Answer:", return_tensors="pt")
    for key in ("video", "path", "url"):
        chat = [{"role": "user", "content": [{"type": "video", key: str(path)}, {"type": "text", "text": "what?"}]}]
        actual = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        assert_same(actual, expected)


@torch.no_grad()
@pytest.mark.parametrize("language_model", ["opt", "t5"])
def test_instructblip_video_answers_the_same(language_model, tmp_path):
    theirs = save_instructblip_video(tmp_path, language_model)
    ours = Blip2ForConditionalGeneration.from_pretrained(tmp_path).eval()
    processor = Blip2Processor.from_pretrained(tmp_path)
    assert processor.image_token_id == ours.config.image_token_index == theirs.config.video_token_index
    assert processor.image_processor.size == {"height": 28, "width": 28}
    clips = [make_clip(), make_clip(9)]
    batch = processor(videos=clips, text=["what is it?", "where is the red bus?"], return_tensors="pt")
    assert batch["pixel_values"].shape == (8, 3, 28, 28)
    # Their inputs: a row of frames, and one instruction, for each text
    of_theirs = {**batch, "pixel_values": batch["pixel_values"].unflatten(0, (2, 4))}
    for name in ("qformer_input_ids", "qformer_attention_mask"):
        of_theirs[name] = batch[name][::4]
    if language_model == "t5":
        targets = torch.tensor([[5, 6, 7], [8, 9, 2]])
        batch, of_theirs = ({**inputs, "labels": targets} for inputs in (batch, of_theirs))
    # What is computed at padding is of no use
    attended = batch["attention_mask"].bool() if language_model == "opt" else torch.ones(2, 3).bool()
    expected = theirs(**of_theirs).logits[attended]
    for inputs in (batch, of_theirs):
        torch.testing.assert_close(ours(**inputs).logits[attended], expected, atol=1e-5, rtol=0)
    # Stored features of frames too take one instruction for each text
    stored = {name: value for name, value in of_theirs.items() if name != "pixel_values"}
    stored["image_embeds"] = ours.get_image_embeds(batch["pixel_values"]).unflatten(0, (2, 4))
    torch.testing.assert_close(ours(**stored).logits[attended], expected, atol=1e-5, rtol=0)
    for inputs in (batch, of_theirs):
        inputs.pop("labels", None)
    written = [
        processor.post_process_image_text_to_text(
            model.generate(**inputs, max_new_tokens=5, do_sample=False), batch["input_ids"]
        )
        for model, inputs in ((ours, batch), (theirs, of_theirs))
    ]
    assert written[0] == written[1]


def test_instructblip_video_is_saved_as_ours_and_marks_mean_the_same(tmp_path):
    save_instructblip_video(tmp_path / "theirs")
    first = Blip2Processor.from_pretrained(tmp_path / "theirs")
    first.save_pretrained(tmp_path / "ours")
    second = Blip2Processor.from_pretrained(tmp_path / "ours")
    clip = make_clip()
    for text in ("what?", "<video>what?", "see <video>", second.image_token * 4 + "what?"):
        expected = first(videos=[clip], text=text, return_tensors="pt")
        assert (expected["input_ids"] == first.image_token_id).sum() == 4 * NUM_QUERIES
        assert_same(second(videos=[clip], text=text, return_tensors="pt"), expected)
    chat = [{"role": "user", "content": [{"type": "video", "video": clip}, {"type": "text", "text": "what?"}]}]
    inputs = second.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert inputs["pixel_values"].shape[0] == 4


def test_a_model_writes_about_videos(processor):
    model = make_model()
    batch = processor(videos=[make_clip(), make_clip(9)], text="a photo of", return_tensors="pt")
    expected = processor(
        images=[[np.asarray(clip[n]) for n in NUMBERS] for clip in (make_clip(), make_clip(9))],
        text="a photo of",
        return_tensors="pt",
    )
    first, second = (model.generate(**inputs, max_new_tokens=4) for inputs in (batch, expected))
    assert torch.equal(first, second)


def test_what_a_chat_would_drop_is_refused():
    processor = make_processor()
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what?"}]}]
    for options, message in (
        ({"videos": ["clip.mp4"]}, "images or videos were given beside a chat"),
        ({"images": [make_image()]}, "images or videos were given beside a chat"),
        ({"do_sample_frames": False}, "do_sample_frames=False: give num_frames"),
        ({"num_frames": 0}, None),
    ):
        options = {"tokenize": True, "return_dict": True, **options}
        if message is None:
            chat[0]["content"][0]["video"] = np.zeros((4, 28, 28, 3), dtype=np.uint8)
            message = "num_frames=0: a whole number"
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(chat, **options)
