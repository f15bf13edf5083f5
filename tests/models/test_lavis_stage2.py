"""Stage 2 against numbers that the authors' code computed (random weights, no dropout)."""

import pytest
import torch
from lavis_cases import FIXTURES, NEWLINE, OPT, T5, load, opt_processor, read, tensors
from stage1 import gradients
from tiny import make_image_processor
from transformers import PreTrainedTokenizerFast

from blip2_hf import Blip2Processor
from blip2_hf.convert.lavis import convert_lavis_state_dict


CASES = pytest.mark.parametrize("folder", [OPT, T5], ids=["opt", "t5"])


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


def test_labels_of_a_decoder_only_model():
    texts, wanted = read(OPT, "inputs")["text_input"], tensors(OPT, "outputs")["labels"][:, 8:]
    assert opt_processor().tokenizer("\n", add_special_tokens=False)["input_ids"] == [NEWLINE]
    batch = opt_processor()(text_target=texts, truncation=True, max_length=16, return_tensors="pt")
    found = batch["labels"]
    assert found.shape == wanted.shape
    # LAVIS learns </s>, which generation begins with, where there is no prompt; and cuts off the end of long texts
    assert (wanted[:, 0] == 2).all() and (found[:, 0] == -100).all()
    torch.testing.assert_close(found[[0, 2], 1:], wanted[[0, 2], 1:])
    torch.testing.assert_close(found[[1, 3], 1:-1], wanted[[1, 3], 1:-1])
    assert (found[[1, 3], -1] == NEWLINE).all() and (wanted[[1, 3], -1] != NEWLINE).all()


def test_a_prompt_of_any_length_is_not_learned():
    processor = opt_processor()
    for prompt in ("a", "a photo of", "two people riding a bike near the street and a photo of"):
        batch = processor(text=prompt, text_target="a red bus", return_tensors="pt")
        learned = batch["labels"][0][batch["labels"][0] != -100].tolist()
        assert learned[-1] == NEWLINE
        assert processor.tokenizer.decode(learned[:-1]).strip() == "a red bus"


def test_labels_of_an_encoder_decoder():
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    file = str(FIXTURES / "tokenizers" / "t5" / "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, **names)
    processor = Blip2Processor(make_image_processor(), tokenizer, num_query_tokens=8, is_encoder_decoder=True)
    texts, inputs = read(T5, "inputs"), tensors(T5, "inputs")
    batch = processor(text=texts["text_input"], text_target=texts["text_output"], return_tensors="pt")
    torch.testing.assert_close(batch["input_ids"], inputs["input_ids"])
    torch.testing.assert_close(batch["attention_mask"], inputs["attention_mask"])
    torch.testing.assert_close(batch["labels"], tensors(T5, "outputs")["labels"])


def test_the_end_token_of_a_checkpoint(tmp_path):
    """Texts end with the token at which the checkpoint's generation stops, here and after saving."""
    model = load(OPT)
    model.config.text_config.eos_token_id = NEWLINE
    model.save_pretrained(tmp_path, transformers_compatible=True)
    processor = opt_processor()
    processor.save_pretrained(tmp_path, transformers_compatible=True)
    loaded = Blip2Processor.from_pretrained(tmp_path)
    assert loaded.end_token_id == NEWLINE
    loaded.save_pretrained(tmp_path / "own")
    assert Blip2Processor.from_pretrained(tmp_path / "own").end_token_id == NEWLINE
