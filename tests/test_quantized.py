"""Stage 2 on a language model in 4 and in 8 bits, against the same weights written out in float32."""

import pytest
import torch
import transformers
from tiny import ROTARY, make_model, make_pixel_values, make_tokenizer, randomize

from blip2_hf import Blip2ForConditionalGeneration
from blip2_hf.training import train_only


bitsandbytes = pytest.importorskip("bitsandbytes")
# Quantisation works on blocks of 64
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
SIZES = {**ROTARY, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language_model")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES))
    randomize(model, std=0.1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_quantized(language_model, **options) -> Blip2ForConditionalGeneration:
    torch.manual_seed(1)
    config = transformers.BitsAndBytesConfig(**options)
    return Blip2ForConditionalGeneration.from_pretrained_parts(
        make_model("opt"),
        language_model,
        language_model_kwargs={"quantization_config": config, "dtype": torch.float32},
    )


@torch.no_grad()
def written_out(module: torch.nn.Module) -> torch.Tensor:
    """The weight that a quantised map multiplies with."""
    weight = module.weight
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    # Moved there by the first forward pass
    return weight.data.float() * module.state.SCB[:, None] / 127


def in_full(model: Blip2ForConditionalGeneration, language_model) -> Blip2ForConditionalGeneration:
    plain = transformers.AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32)
    for name, module in model.language_model.named_modules():
        if isinstance(module, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)):
            plain.get_submodule(name).weight.data = written_out(module)
    whole = Blip2ForConditionalGeneration.from_pretrained_parts(model, plain)
    whole.language_projection.load_state_dict(model.language_projection.state_dict())
    return whole


def make_batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    input_ids = torch.randint(3, 60, (3, 7))
    return {"pixel_values": make_pixel_values(3), "input_ids": input_ids, "labels": input_ids}


def learn(model: Blip2ForConditionalGeneration):
    # Without dropout
    model.eval().zero_grad()
    loss = model(**make_batch(), skip_logits=True).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# In 8 bits what goes in is quantised too
@pytest.mark.parametrize(("options", "tolerance"), [(FOUR_BITS, 1e-4), ({"load_in_8bit": True}, 0.1)])
def test_loss_gradients_and_tokens(language_model, options, tolerance):
    model = make_quantized(language_model, **options)
    kinds = {type(module).__name__ for module in model.language_model.modules()}
    assert kinds & {"Linear4bit", "Linear8bitLt"}
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if "language_model" not in name)
    loss, gradients = learn(model)
    expected_loss, expected = learn(in_full(model, language_model))
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=0)
    assert gradients.keys() == expected.keys()
    assert "query_tokens.weight" in gradients and not any(name.startswith("language_model") for name in gradients)
    for name in ("query_tokens.weight", "language_projection.weight"):
        difference = (gradients[name] - expected[name]).norm() / expected[name].norm()
        assert difference <= tolerance, f"{name}: {difference:.1e}"


def test_adapters_learn_on_four_bits(language_model):
    model = train_only(make_quantized(language_model, **FOUR_BITS), "lora_language_model")
    _, gradients = learn(model)
    assert gradients and all("lora" in name for name in gradients)


def test_it_is_not_saved_as_a_whole(language_model, tmp_path):
    with pytest.raises(ValueError, match="quantised on its own"):
        make_quantized(language_model, **FOUR_BITS).save_pretrained(tmp_path)
