import json

import pytest
import torch
import transformers
from lavis_cases import FIXTURES, STAGE1, load
from safetensors.torch import load_file
from stage1 import make_stage1
from tiny import NUM_QUERIES, make_pixel_values


CAPTIONS = json.loads((FIXTURES / "captions" / "case0" / "outputs.json").read_text())
SOUND = ["greedy_min1_max12", "greedy_min10_max30_repetition_arg", "beam3_shimmed", "beam5_shimmed"]


@pytest.mark.parametrize("name", SOUND)
def test_captions_of_lavis(name):
    model = load(STAGE1)
    image = load_file(FIXTURES / "captions" / "case0" / "inputs.safetensors")["image"]
    expected = CAPTIONS[name]
    generated = model.generate(pixel_values=image, **expected["args"])
    rows = [row[: row.index(3) + 1] if 3 in row else [t for t in row if t != 0] for row in expected["sequences"]]
    actual = [row[: row.index(3) + 1] if 3 in row else [t for t in row if t != 0] for row in generated.tolist()]
    assert actual == rows


def caption(model, pixel_values, **kwargs):
    return model.generate(pixel_values=pixel_values, **{"max_new_tokens": 8, "min_new_tokens": 8, **kwargs})


@pytest.mark.usefixtures("likeliest_negatives")
def test_each_token_is_the_likeliest_of_the_training_pass():
    model, pixel_values = make_stage1().eval(), make_pixel_values(3)
    generated = caption(model, pixel_values)
    assert generated[:, 0].tolist() == [model.config.qformer_config.bos_token_id] * 3
    logits = model(pixel_values=pixel_values, input_ids=generated).itg_logits.view(3, 8, -1)
    logits[:, :, 3] = -torch.inf  # [SEP] is kept out by min_new_tokens
    assert torch.equal(logits.argmax(-1), generated[:, 1:])


def test_without_a_cache():
    model, pixel_values = make_stage1().eval(), make_pixel_values(3)
    assert torch.equal(caption(model, pixel_values, use_cache=False), caption(model, pixel_values))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_prompts_of_different_lengths(num_beams):
    model, pixel_values = make_stage1().eval(), make_pixel_values(2)
    prompts = [[2, 10, 11, 12, 3], [2, 20, 3]]
    alone = [
        caption(model, pixel_values[i : i + 1], input_ids=torch.tensor([prompt]), num_beams=num_beams)[0].tolist()
        for i, prompt in enumerate(prompts)
    ]
    assert alone[0][:4] == [63, 10, 11, 12] and alone[1][-10:-8] == [63, 20]
    input_ids, mask = torch.tensor([[2, 10, 11, 12, 3], [2, 20, 3, 0, 0]]), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    together = caption(model, pixel_values, input_ids=input_ids, attention_mask=mask, num_beams=num_beams)
    assert [row[-8:] for row in together.tolist()] == [row[-8:] for row in alone]


def test_prompts_padded_on_either_side_and_with_placeholders():
    model, pixel_values = make_stage1().eval(), make_pixel_values(2)
    ids, mask = torch.tensor([[2, 10, 11, 12, 3], [2, 20, 3, 0, 0]]), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    expected = caption(model, pixel_values, input_ids=ids, attention_mask=mask)
    left_ids, left_mask = (torch.stack([x[0], x[1].roll(2)]) for x in (ids, mask))
    assert torch.equal(caption(model, pixel_values, input_ids=left_ids, attention_mask=left_mask), expected)
    placeholders = torch.full((2, NUM_QUERIES), 61)
    with_image = {
        "input_ids": torch.cat([placeholders, ids], 1),
        "attention_mask": torch.cat([torch.ones_like(placeholders), mask], 1),
    }
    with pytest.raises(ValueError, match="4 tokens of id 61 in front"):
        caption(model, pixel_values, **with_image)
    model.config.image_token_index = 61
    assert torch.equal(caption(model, pixel_values, **with_image), expected)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[2, 10, 3], [2, 10, 3]], [[1, 1, 1], [0, 0, 0]], "Row 1 of input_ids has 0 tokens"),
        ([[2, 10, 3], [3, 3, 3]], [[1, 1, 1], [1, 1, 0]], "Prompt 1 has no token except the one that ends a text"),
        ([[2, 10, 3], [2, 10, 3]], [[1, 1], [1, 1]], r"attention_mask of shape \(2, 2\)"),
    ],
)
def test_prompts_without_tokens_are_refused(ids, mask, message):
    with pytest.raises(ValueError, match=message):
        caption(
            make_stage1().eval(),
            make_pixel_values(2),
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
        )


def test_stored_features_and_training_mode():
    model, pixel_values = make_stage1().train(), make_pixel_values(2)
    stored = model.generate(image_embeds=model.get_image_embeds(pixel_values), max_new_tokens=8, min_new_tokens=8)
    assert torch.equal(stored, caption(model, pixel_values))
    assert model.qformer.training and not model.vision_model.encoder.training


def test_options_of_generation():
    model, pixel_values = make_stage1().eval(), make_pixel_values(2)
    expected = caption(model, pixel_values)
    config = transformers.GenerationConfig(max_new_tokens=8, min_new_tokens=8)
    assert torch.equal(model.generate(pixel_values=pixel_values, generation_config=config), expected)
    prompt = torch.tensor([[2, 10, 3], [2, 11, 3]])
    expected = caption(model, pixel_values, input_ids=prompt)
    assert torch.equal(caption(model, pixel_values, input_ids=prompt, eos_token_id=[3, 3]), expected)
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        caption(model, pixel_values, input_ids=prompt[:1])


def test_what_ends_a_text_must_be_known():
    model = make_stage1()
    model.config.qformer_config.eos_token_id = None
    with pytest.raises(ValueError, match="sep_token_id"):
        caption(model, make_pixel_values(1))
    assert caption(model, make_pixel_values(1), eos_token_id=3).shape == (1, 9)
