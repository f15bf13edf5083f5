"""Stage 2 on a language model in 4 and in 8 bits, against the same weights written out in float32."""

import pytest
import torch
import transformers
from stage1 import make_stage1
from tiny import ROTARY, make_model, make_pixel_values, make_tokenizer, randomize

from blip2_hf import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, Blip2ForPreTraining
from blip2_hf.training import train_only


bitsandbytes = pytest.importorskip("bitsandbytes")
# Quantisation works on blocks of 64
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
SIZES = {**ROTARY, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.fixture(scope="module", autouse=True)
def plain_cpu():
    """Keep the order of weights: a CPU that multiplies in bfloat16 packs them, which fails for so narrow ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
        yield


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


# The widest gap between the numbers that four bits stand for is a third; in eight bits, 1 / 127
@pytest.mark.parametrize(("options", "step"), [(FOUR_BITS, 1 / 3), ({"load_in_8bit": True}, 1 / 127)])
def test_adapters_are_merged(language_model, options, step):
    peft = pytest.importorskip("peft")
    model = make_quantized(language_model, **options).eval()
    inputs = {name: x for name, x in make_batch().items() if name != "labels"}
    with torch.no_grad():
        model(**inputs)
    base = written_out(model.language_model.model.layers[0].self_attn.q_proj)
    torch.manual_seed(3)
    settings = peft.LoraConfig(target_modules=r"language_model.*(q|v)_proj|qformer.*\.query", init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings).eval()
    adapter = adapted.base_model.model.language_model.model.layers[0].self_attn.q_proj
    delta = adapter.get_delta_weight("default").detach()
    merged = adapted.merge_and_unload()
    with torch.no_grad():
        assert merged(**inputs).logits.isfinite().all()
    layer = merged.language_model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt))
    found, expected = written_out(layer), base + delta
    assert delta.abs().max() > 0.1 * base.abs().max()
    assert (found - expected).abs().max() <= step / 2 * expected.abs().max() * 1.01
    # What was learned has gone in, and not a part of it
    assert ((found - base) * delta).sum() / (delta * delta).sum() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    "model_class",
    [Blip2ForConditionalGeneration, Blip2ForPreTraining, Blip2ForImageTextRetrieval],
    ids=["captioner", "stage1", "retriever"],
)
def test_in_four_bits_it_is_saved_before_it_runs_on_a_cpu(model_class, tmp_path):
    plain = make_model("opt") if model_class is Blip2ForConditionalGeneration else make_stage1()
    plain.save_pretrained(tmp_path / "plain")
    config = transformers.BitsAndBytesConfig(**FOUR_BITS)
    model = model_class.from_pretrained(tmp_path / "plain", quantization_config=config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "quantized")
    again = model_class.from_pretrained(tmp_path / "quantized").eval()
    pixel_values = make_pixel_values(2)
    expected = model.get_image_embeds(pixel_values)
    assert torch.equal(again.get_image_embeds(pixel_values), expected)
    pack_for_cpu(model)
    with pytest.raises(ValueError, match="has run on a CPU, .* vision_model.encoder.layers.0"):
        model.save_pretrained(tmp_path / "later")
    # Unpacked, and not the same
    model.state_dict()
    with pytest.raises(ValueError, match="has run on a CPU"):
        model.save_pretrained(tmp_path / "later")
    assert not (tmp_path / "later").exists()


def pack_for_cpu(model: torch.nn.Module):
    """What a forward pass does on a CPU that multiplies in bfloat16, to weights as wide as a block or wider."""
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and module.in_features % 64 == 0:
            weight = module.weight
            weight.data, _ = bitsandbytes.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
