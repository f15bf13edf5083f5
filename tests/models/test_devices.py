"""What models compute on a device, and where: the same as on the CPU. A device can be pretended, or a GPU."""

import copy

import pytest
import torch
from pretend_device import pretend_device
from stage1 import assert_same, gradients, make_inputs, make_retrieval, make_stage1
from stage2 import make_batch
from tiny import make_image, make_model, make_pixel_values, make_processor

from blip2_hf.captioning import caption_images
from blip2_hf.evaluation import TwoStageRetrieval


# Sums are in another order on a GPU
TOLERANCE = 1e-4


@pytest.fixture(params=["pretend", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "pretend":
        with pretend_device():
            yield request.param
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    # By default convolutions round to TF32
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield request.param


def move(inputs: dict, device: str) -> dict:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def copy_to(model, device: str):
    there = copy.deepcopy(model).to(device)
    # A pretended tensor becomes a new parameter, not the data of the one that two modules share
    there.tie_weights()
    return there


def on_both(model, call, inputs: dict, device: str):
    """Return what a call returns on the CPU and on the device, of equal models, in tensors of the CPU."""
    there = copy_to(model, device)
    assert all(parameter.device.type == device for parameter in there.parameters())
    expected, actual = call(model, inputs), call(there, move(inputs, device))
    assert all(tensor.device.type == device for tensor in actual.values())
    return move(actual, "cpu"), expected


def learn(model, inputs: dict) -> dict[str, torch.Tensor]:
    # Without dropout
    loss = model.eval()(**inputs).loss
    return gradients(model, loss) | {"loss": loss.detach()}


def tokens(**options):
    return lambda model, inputs: {"tokens": model.generate(**inputs, **options)}


def test_tensors_of_two_devices_are_an_error(device):
    there = torch.ones(3, device=device)
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.ones(3)
    assert torch.equal((there + there).cpu(), torch.full((3,), 2.0))


@pytest.mark.usefixtures("likeliest_negatives")
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("image", ["image_embeds", "pixel_values"])
def test_stage_1(device, chunk_size, image):
    model = make_stage1()
    if chunk_size is not None:
        model.gradient_caching_enable(chunk_size)
    inputs = make_inputs(4) | {"image_ids": torch.tensor([1, 2, 1, 3])}
    if image == "pixel_values":
        inputs = inputs | {"image_embeds": None, "pixel_values": make_pixel_values(4)}
    actual, expected = on_both(model, learn, inputs, device)
    assert len(expected) > 50
    assert_same(actual, expected, TOLERANCE)


@pytest.mark.parametrize("name", ["opt", "t5"])
@pytest.mark.parametrize("skip_logits", [False, True])
def test_stage_2(device, name, skip_logits):
    actual, expected = on_both(make_model(name), learn, make_batch(name) | {"skip_logits": skip_logits}, device)
    assert len(expected) > 50
    assert_same(actual, expected, TOLERANCE)


@pytest.mark.parametrize("elsewhere", [None, "lm_head", "model.decoder.layers.1"])
def test_an_index_of_labels_serves_a_language_model_on_several_devices(device, elsewhere):
    """The head alone does not tell where the hidden states are: it may share its weight with the embeddings."""
    model = copy_to(make_model("opt"), device)
    if elsewhere is not None:
        part = model.language_model.get_submodule(elsewhere)
        part.load_state_dict({name: weight.cpu() for name, weight in part.state_dict().items()}, assign=True)
    labels = torch.tensor([[-100, 5, 6]]).to(device)
    shifted, of_head = model._shift_labels(labels, None, skip_logits=True)
    assert shifted.device.type == device and shifted.tolist() == [[5, 6]]
    assert of_head["logits_to_keep"].tolist() == [-3, -2]
    assert of_head["logits_to_keep"].device.type == (device if elsewhere is None else "cpu")


@pytest.mark.parametrize("name", ["opt", "t5"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation(device, name, num_beams):
    inputs = {name: value for name, value in make_batch(name).items() if name != "labels"}
    actual, expected = on_both(make_model(name), tokens(max_new_tokens=5, num_beams=num_beams), inputs, device)
    assert torch.equal(actual["tokens"], expected["tokens"])


def test_generation_without_a_prompt(device):
    actual, expected = on_both(make_model(), tokens(max_new_tokens=5), {"pixel_values": make_pixel_values()}, device)
    assert torch.equal(actual["tokens"], expected["tokens"])


def test_captions_of_stage_1(device):
    inputs = {"pixel_values": make_pixel_values(2)}
    actual, expected = on_both(make_stage1(), tokens(max_new_tokens=5, num_beams=2), inputs, device)
    assert torch.equal(actual["tokens"], expected["tokens"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["opt", "t5"])
def test_scores_of_texts(device, name):
    inputs = {name: value for name, value in make_batch(name).items() if name != "labels"}
    inputs["candidate_labels"] = torch.tensor([[5, 6, 7], [8, 9, -100]])
    actual, expected = on_both(
        make_model(name), lambda model, inputs: {"scores": model.score_texts(**inputs)}, inputs, device
    )
    assert expected["scores"].shape == (4, 2)
    assert_same(actual, expected, TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("matching", [False, True])
def test_retrieval(device, matching):
    inputs = make_inputs(3) | {"use_image_text_matching_head": matching}
    actual, expected = on_both(
        make_retrieval(), lambda model, inputs: {"scores": model(**inputs).logits_per_image}, inputs, device
    )
    assert_same(actual, expected, TOLERANCE)


@torch.no_grad()
def test_two_stages_of_retrieval(device):
    """Images and texts come from the CPU, and scores go back there."""
    model, images = make_retrieval(), torch.randn(3, 5, 32)
    texts, pairs = [[2, 10, 3], [2, 11, 12, 3]], torch.cartesian_prod(torch.arange(3), torch.arange(2))
    scores = [
        TwoStageRetrieval(each, None, show_progress=False).match(images.to(each.device), texts, pairs)
        for each in (model, copy_to(model, device))
    ]
    assert scores[1].device.type == "cpu"
    torch.testing.assert_close(scores[1], scores[0], rtol=TOLERANCE, atol=TOLERANCE)


def test_captioning_of_pictures(device):
    model, processor = make_model(), make_processor()
    pictures = [make_image(seed) for seed in range(3)]
    texts = [
        [caption.text for caption in caption_images(each, processor, pictures, max_new_tokens=4, batch_size=2)]
        for each in (model, copy_to(model, device))
    ]
    assert texts[1] == texts[0]
    assert all(texts[0])
