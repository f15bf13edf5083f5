"""Stage 2 against numbers that the authors' code computed (random weights, no dropout)."""

import json

import pytest
from stage1 import gradients
from test_convert_lavis import OPT, T5, load, tensors

from blip2_hf.convert.lavis import convert_lavis_state_dict


CASES = pytest.mark.parametrize("folder", [OPT, T5], ids=["opt", "t5"])


def read(folder, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def run(model, folder, **kwargs):
    """With the labels that LAVIS gave its language model."""
    inputs, labels = tensors(folder, "inputs"), tensors(folder, "outputs")["labels"]
    if folder == OPT:
        # Those of the text; the queries in front have none
        labels = labels[:, -inputs["input_ids"].shape[1] :]
    else:
        kwargs["decoder_attention_mask"] = inputs["output_attention_mask"]
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return model(pixel_values=inputs["image"], labels=labels, **texts, **kwargs)


@CASES
@pytest.mark.parametrize("skip_logits", [False, True])
def test_loss_and_gradients(folder, skip_logits):
    model = load(folder).train()
    outputs = run(model, folder, skip_logits=skip_logits)
    assert (outputs.logits is None) == skip_logits
    assert outputs.loss.item() == pytest.approx(read(folder, "outputs")["loss"], abs=1e-5)
    expected, _ = convert_lavis_state_dict(tensors(folder, "grads"))
    actual = gradients(model, outputs.loss)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        # That of the bias of a key is zero, up to rounding
        norm = 1 if name.endswith("key.bias") else gradient.norm()
        assert (actual[name] - gradient).norm() / norm < 1e-4, name


@CASES
@pytest.mark.parametrize("case", ["greedy", "beam5", "vqa_predict_answers", "vqa_predict_answers_greedy"])
def test_generation(folder, case):
    model, inputs = load(folder), tensors(folder, "generate_inputs")
    expected = read(folder, "generate")[case]
    arguments = dict(expected["args"])
    for name in ("top_p", "temperature"):
        arguments.pop(name, None)
    if "max_length" in arguments:
        # Counts a start token, where the prompt is given as embeddings
        arguments["max_new_tokens"] = arguments.pop("max_length") - 1
    if case.startswith("vqa"):
        text = {"input_ids": inputs["vqa.input_ids"], "attention_mask": inputs["vqa.text_attention_mask"]}
    else:
        text = {"input_ids": inputs["prompt.input_ids"]}
    tokens = model.generate(pixel_values=tensors(folder, "inputs")["image"], **text, **arguments)
    if folder == OPT:
        tokens = tokens[:, text["input_ids"].shape[1] :]
        wanted = [row[1:] for row in expected["sequences"]]
    else:
        wanted = expected["sequences"]
    assert tokens.tolist() == wanted
