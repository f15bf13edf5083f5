"""
A GPU works through a queue, and a program that reads a value of a tensor waits until the queue is empty. So values are
read at the beginning of a step, before there is work in the queue.
"""

import warnings

import pytest
import torch
from device_reads import DeviceReads
from stage1 import STAGE1_QFORMER, make_inputs, make_retrieval, make_stage1
from tiny import DECODER_ONLY, LANGUAGE_MODELS, NUM_QUERIES, QFORMER, VOCAB_SIZE, make_model, make_pixel_values


TEXT = torch.tensor([[0, 5, 6, 7], [0, 8, 9, 2]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


def prompts(images: str) -> dict[str, torch.Tensor]:
    """Return texts of which one is padded, with placeholders of images or without."""
    if images == "in front":
        return {"input_ids": TEXT, "attention_mask": MASK}
    placeholders = torch.full((2, NUM_QUERIES), VOCAB_SIZE - 1)
    return {
        "input_ids": torch.cat([placeholders, TEXT], dim=1),
        "attention_mask": torch.cat([torch.ones_like(placeholders), MASK], dim=1),
    }


def test_the_recorder_finds_reads():
    weight = torch.randn(3, 3)
    with DeviceReads() as record:
        bool(weight.any())
        product = weight @ weight
        product[product > 0], product.nonzero(), product.argmax().item()
    assert [(read.operation, read.products_before) for read in record.reads] == [
        ("_local_scalar_dense", 0),
        ("index", 1),
        ("nonzero", 1),
        ("_local_scalar_dense", 1),
    ]


def test_the_recorder_hears_what_torch_says_of_a_gpu(monkeypatch):
    """The mode is on for a GPU alone, and first warns of itself."""
    about_itself = "Synchronization debug mode is a prototype and does not yet detect all synchronizing operations"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: warnings.warn(about_itself, stacklevel=1))
    with DeviceReads() as record:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    assert [read.operation for read in record.reads] == ["synchronize"] * 2


@pytest.mark.parametrize("images", ["pixel_values", "image_embeds"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_step_of_stage_1(chunk_size, images):
    model, inputs = make_stage1(qformer_dropout=0.1).train(), make_inputs()
    if chunk_size is not None:
        model.gradient_caching_enable(chunk_size)
    if images == "pixel_values":
        del inputs["image_embeds"]
        inputs["pixel_values"] = make_pixel_values(5)
    with DeviceReads() as record:
        model(**inputs, image_ids=torch.tensor([0, 1, 2, 3, 3])).loss.backward()
    assert record.products > 100
    assert record.reads
    assert record.late() == []


@pytest.mark.parametrize("images", ["placeholders", "in front"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_step_of_stage_2(name, images):
    model, inputs = make_model(name).train(), prompts(images)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == VOCAB_SIZE - 1, -100)
    with DeviceReads() as record:
        model(
            pixel_values=make_pixel_values(), labels=labels, num_items_in_batch=torch.tensor(6), **inputs
        ).loss.backward()
    assert record.products > 100
    assert record.late() == []
    # transformers' language models look for padding in the mask, to leave it out if there is none
    assert {read.place.split(":")[0] for read in record.reads if read.package == "transformers"} == {
        "transformers/masking_utils.py"
    }


def test_a_step_with_instructions():
    model = make_model("llama", qformer_config={**QFORMER, "use_qformer_text_input": True}).train()
    instructions = {"qformer_input_ids": TEXT, "qformer_attention_mask": MASK}
    with DeviceReads() as record:
        model(pixel_values=make_pixel_values(), labels=TEXT, **prompts("in front"), **instructions).loss.backward()
    assert record.late() == []


@pytest.mark.parametrize("name", DECODER_ONLY)
def test_a_step_of_generation(name):
    model = make_model(name)
    model.generation_config.eos_token_id = None

    def reads(num_tokens: int) -> int:
        with DeviceReads() as record:
            model.generate(pixel_values=make_pixel_values(), max_new_tokens=num_tokens, **prompts("placeholders"))
        return sum(read.package == "blip2_hf" for read in record.reads)

    assert reads(2) == reads(7)


def test_matching():
    model, inputs = make_retrieval(), make_inputs(4)
    del inputs["image_embeds"]
    with DeviceReads() as record, torch.no_grad():
        model.get_matching_logits(pixel_values=make_pixel_values(2), **inputs)
    assert record.products > 20
    assert record.late() == []


@pytest.fixture
def no_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def stage_1_step(lengths: tuple[int, ...], step) -> torch.Tensor:
    return step(**make_inputs(5, lengths)).loss


def stage_2_step(lengths: tuple[int, ...], step) -> torch.Tensor:
    length = max(lengths)
    input_ids = torch.full((2, NUM_QUERIES + length), 5)
    input_ids[:, :NUM_QUERIES] = VOCAB_SIZE - 1
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, NUM_QUERIES + min(lengths) :] = 0
    labels = input_ids.masked_fill((attention_mask == 0) | (input_ids != 5), -100)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    torch.manual_seed(0)
    return step(pixel_values=make_pixel_values(), num_items_in_batch=(labels != -100).sum(), **inputs).loss


@pytest.mark.usefixtures("no_compiled_code", "likeliest_negatives")
@pytest.mark.parametrize("stage", [stage_1_step, stage_2_step])
def test_a_compiled_step_is_not_compiled_again(stage):
    """The second step, of another length, is compiled for all lengths."""
    one_layer = {"num_hidden_layers": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if stage is stage_1_step:
        model = make_stage1(qformer_config={**STAGE1_QFORMER, **one_layer})
    else:
        model = make_model("llama", qformer_config={**QFORMER, **one_layer})
    step = torch.compile(model.train(), backend="eager")
    for lengths in [(7, 3, 9, 5, 4), (6, 3, 8, 5, 4)]:
        stage(lengths, step).backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for lengths in [(7, 3, 11, 5, 4), (5, 5, 6, 6, 6)]:
            torch.testing.assert_close(stage(lengths, step), stage(lengths, model))
