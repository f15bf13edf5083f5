"""What the tower sees of a picture: its values, whatever type they had, and the whole of it."""

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from stage1 import make_stage1
from tiny import (
    assert_sees_the_whole,
    columns_seen,
    make_cropping_image_processor,
    make_image,
    make_image_processor,
    make_model,
    make_processor,
)
from transformers import pipeline

from blip2_hf import Blip2Processor
from blip2_hf.capfilt import ModelCaptioner
from blip2_hf.captioning import caption_dataset, caption_images
from blip2_hf.data import ImageTextCollator, ImageTextPairs, LanguageModelCollator, cache_features, with_image_size
from blip2_hf.evaluation.benchmarks import evaluate_captioning
from blip2_hf.evaluation.samples import CaptionSample


FLOATS = torch.rand(3, 30, 40, generator=torch.Generator().manual_seed(0))
AS_THEY_ARE = {"do_rescale": False, "do_normalize": False, "do_resize": False}
KINDS = {
    "tensor": FLOATS,
    "channels last": FLOATS.permute(1, 2, 0).numpy(),
    "float64": FLOATS.double().numpy(),
    "bfloat16": FLOATS.bfloat16(),
    "grey": FLOATS[0],
    "grey in PIL": Image.fromarray(FLOATS[0].numpy()),
    "with a gradient": FLOATS.clone().requires_grad_(),
}


def make_unscaled(**kwargs) -> Blip2Processor:
    """A processor that was saved with do_rescale=False."""
    processor = make_processor()
    for name, value in {"do_rescale": False, **kwargs}.items():
        setattr(processor.image_processor, name, value)
    return processor


@pytest.mark.parametrize("kind", KINDS)
def test_floats_that_are_not_rescaled_stay_as_they_are(kind):
    inputs = make_processor()(images=[KINDS[kind], make_image(1)], return_tensors="pt", **AS_THEY_ARE)
    expected = FLOATS[:1].expand(3, -1, -1) if "grey" in kind else FLOATS
    expected = expected.bfloat16().float() if kind == "bfloat16" else expected
    assert torch.equal(torch.as_tensor(inputs["pixel_values"][0]), expected)
    # A picture of 8 bits next to it stays as it is too, as in transformers
    assert np.array_equal(inputs["pixel_values"][1], np.asarray(make_image(1)).transpose(2, 0, 1))
    again = make_unscaled(do_normalize=False, do_resize=False)(images=KINDS[kind], return_tensors="pt")
    assert torch.equal(again["pixel_values"][0], expected)


def test_floats_of_any_range_stay_as_they_are():
    normalized = FLOATS * 4 - 2
    inputs = make_processor()(images=normalized[None], return_tensors="pt", **AS_THEY_ARE)
    assert torch.equal(inputs["pixel_values"][0], normalized)


@pytest.mark.parametrize("processor", [make_processor(), make_unscaled()], ids=["rescales", "does not"])
@pytest.mark.parametrize("kwargs", [{}, {"images_kwargs": {"input_data_format": "channels_first"}}])
def test_the_tower_sees_the_same_of_floats_and_of_8_bits(processor, kwargs):
    """Also where the image processor says do_rescale=False, and the values are scaled to its size and normalised."""
    pixels = make_image(0)
    expected = make_processor()(images=pixels, return_tensors="pt")["pixel_values"]
    floats = np.asarray(pixels) / 255
    found = processor(images=floats, return_tensors="pt", **kwargs)["pixel_values"]
    # transformers scales floats by way of 8 bits, which it does not round; 0.26 is the smallest standard deviation
    torch.testing.assert_close(found, expected, rtol=0, atol=2 / 255 / 0.26)


def test_8_bits_that_are_not_rescaled():
    processor, picture = make_processor(), make_image(0)
    with pytest.raises(ValueError, match="image 2 of 2: values of 8 bits, 0 to 255, would reach .* do_rescale=False"):
        processor(images=[FLOATS, picture], do_rescale=False)
    with pytest.raises(ValueError, match="do_rescale=False"):
        make_unscaled()(images=picture)
    wanted = np.asarray(picture).transpose(2, 0, 1)
    raw = {"do_resize": False, "do_normalize": False, "return_tensors": "np"}
    for kwargs in ({"do_rescale": False}, {"rescale_factor": 1.0}):
        assert np.array_equal(processor(images=picture, **kwargs, **raw)["pixel_values"][0], wanted)
    # The mean of 0 to 255
    of_8_bits = {"do_rescale": False, "image_mean": [100.0] * 3, "image_std": [50.0] * 3, "do_resize": False}
    found = processor(images=picture, return_tensors="np", **of_8_bits)["pixel_values"][0]
    np.testing.assert_allclose(found, (wanted - 100.0) / 50, rtol=1e-6)


@pytest.mark.parametrize(
    "picture, message",
    [
        (torch.rand(4, 30, 40), "1 or 3 channels, these have 4"),
        (torch.full((3, 30, 40), float("nan")), "NaN or infinite"),
        (torch.rand(2, 3, 30, 40), "as a list"),
    ],
)
def test_floats_that_are_no_picture_are_refused(picture, message):
    with pytest.raises(ValueError, match=f"image 1 of 1 .*{message}"):
        make_processor()(images=[picture], do_rescale=False)


def test_pipelines_leave_floats_as_they_are():
    model = make_model()
    seen = []
    model.vision_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append([*args, *kwargs.values()][0]), with_kwargs=True
    )
    processor = make_unscaled(do_normalize=False, do_resize=False)
    floats = FLOATS[:, :28, :28]
    pipeline("image-to-text", model=model, processor=processor, device="cpu")(floats, max_new_tokens=2)
    oracle = pipeline("visual-question-answering", model=model, processor=processor, device="cpu")
    oracle({"image": floats.numpy(), "question": "what is it?"}, max_new_tokens=2)
    list(caption_images(model, processor, [floats], max_new_tokens=2))
    assert len(seen) == 3 and all(torch.equal(pixel_values[0], floats) for pixel_values in seen)


def test_zero_shot_pipeline_leaves_floats_as_they_are():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "the", "bus"]
    tokenizer = transformers.BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    parts = {"model": make_stage1(), "tokenizer": tokenizer, "device": "cpu"}
    task, labels = "zero-shot-image-classification", ["a dog", "the bus"]
    picture = make_image(0)
    expected = pipeline(task, image_processor=make_image_processor(), **parts)(picture, labels)
    unscaled = make_unscaled().image_processor
    found = pipeline(task, image_processor=unscaled, **parts)(np.asarray(picture) / 255, labels)
    assert [row["label"] for row in found] == [row["label"] for row in expected]
    np.testing.assert_allclose([r["score"] for r in found], [r["score"] for r in expected], atol=0.02)


def test_an_image_processor_that_does_not_rescale_is_refused_for_data(tmp_path):
    """Rows and files are read as 8 bits: what the image processor takes for 1 would be 255."""
    rows = datasets.Dataset.from_dict({"image": [make_image(0)], "caption": ["a dog"]})
    model, refused = make_model(), pytest.raises(ValueError, match="Pictures of a dataset .* do_rescale=False")
    for kwargs in ({}, {"do_normalize": False}):
        processor = make_unscaled(**kwargs)
        pairs = ImageTextPairs([{"image": FLOATS, "caption": "a dog"}])
        for collator in (LanguageModelCollator(processor), ImageTextCollator(processor)):
            with refused:
                collator([pairs[0]])
        with refused:
            cache_features(rows, model, processor, tmp_path / "features")
        with refused:
            caption_dataset(model, processor, rows, tmp_path / "captions.jsonl")
        with refused:
            evaluate_captioning(model, processor, [CaptionSample(FLOATS, 0, ["a dog"])], tmp_path / "results")
        with refused:
            ModelCaptioner(model, processor)([make_image(0)])
    assert not (tmp_path / "captions.jsonl").exists()
    of_8_bits = make_unscaled(image_mean=[100.0] * 3, image_std=[50.0] * 3)
    assert LanguageModelCollator(of_8_bits)([pairs[0]])["pixel_values"].abs().max() <= 3.2


class TimmImageProcessor:
    """What `with_image_size` reads of transformers' TimmWrapperImageProcessor, which needs timm and torchvision."""

    def to_dict(self):
        config = {"input_size": (3, 28, 28), "crop_pct": 0.9, "interpolation": "bicubic"}
        return {"data_config": {**config, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}}


IMAGE_PROCESSORS = {
    "CLIP": lambda: transformers.CLIPImageProcessorPil(),
    "DINOv2": lambda: make_cropping_image_processor(),
    "SigLIP": lambda: transformers.SiglipImageProcessorPil(),
    "ViT": lambda: transformers.ViTImageProcessorPil(),
    "BLIP": lambda: transformers.BlipImageProcessorPil(),
    "longest edge": lambda: transformers.DetrImageProcessorPil(),
    "no scaling": lambda: transformers.ViTImageProcessorPil(do_resize=False),
    "padded to a square": lambda: transformers.LlavaImageProcessorPil(do_pad=True),
    "DeiT": lambda: transformers.DeiTImageProcessorPil(),
    "ConvNeXt": lambda: transformers.ConvNextImageProcessorPil(size={"shortest_edge": 224}),
    "timm": TimmImageProcessor,
}


@pytest.mark.parametrize("name", IMAGE_PROCESSORS)
@pytest.mark.parametrize("size", [28, 400])
def test_a_square_of_any_size_shows_the_whole_picture(name, size, tmp_path):
    own = IMAGE_PROCESSORS[name]()
    before = own.to_dict()
    sized = with_image_size(own, size)
    assert own.to_dict() == before and type(sized.to_dict()["size"]) is dict
    assert_sees_the_whole(sized, size)
    kept = ("image_mean", "image_std", "resample", "rescale_factor")
    if name == "timm":
        assert sized.image_mean == (0.1, 0.2, 0.3) and sized.resample == Image.Resampling.BICUBIC
    else:
        assert [getattr(sized, setting) for setting in kept] == [getattr(own, setting) for setting in kept]
    Blip2Processor(sized, make_processor().tokenizer, num_query_tokens=4).save_pretrained(tmp_path)
    assert_sees_the_whole(Blip2Processor.from_pretrained(tmp_path).image_processor, size)


@pytest.mark.parametrize("name", ["Sam", "Siglip2", "Qwen2VL"])  # Idefics3 needs torchvision in transformers 5.17
def test_an_image_processor_that_makes_no_squares_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}.* can't be set to scale whole pictures to 28x28"):
        with_image_size(getattr(transformers, f"{name}ImageProcessorPil")(), 28)
    with pytest.raises(ValueError, match="image_size=0"):
        with_image_size(make_image_processor(), 0)


def test_a_processor_without_a_size_stays():
    assert with_image_size(own := make_cropping_image_processor(), None) is own
    assert columns_seen(own)[0] > 50
