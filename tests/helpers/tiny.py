"""Tiny models, tokenizers and pictures, made on the spot: random weights, large enough for every part to matter."""

import io

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from blip2_hf import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor


VOCAB_SIZE = 320
NUM_QUERIES = 4
SENTENCES = [
    "a photo of a dog sitting on the grass",
    "two people riding a bike near the street",
    "Question: what colour is the bus? Answer: red",
    "a woman holding an umbrella under the sky with clouds",
]
CAPTIONS = ["a dog", "a red bus near the street", "two people", "the sky", "a woman holding an umbrella", "grass"]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
}
QFORMER = {
    "vocab_size": 64,
    "bos_token_id": 63,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
TEXT = {"vocab_size": VOCAB_SIZE, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
ROTARY = {
    **TEXT,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
LANGUAGE_MODELS = {
    "opt": lambda: transformers.OPTConfig(
        **TEXT,
        hidden_size=32,
        num_hidden_layers=2,
        ffn_dim=64,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
    ),
    "gpt2": lambda: transformers.GPT2Config(**TEXT, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "llama": lambda: transformers.LlamaConfig(**ROTARY),
    "qwen3": lambda: transformers.Qwen3Config(**ROTARY),
    "gemma3": lambda: transformers.Gemma3TextConfig(**ROTARY, sliding_window=16),
    "t5": lambda: transformers.T5Config(
        vocab_size=VOCAB_SIZE,
        d_model=32,
        d_kv=8,
        num_heads=4,
        num_layers=2,
        num_decoder_layers=2,
        d_ff=64,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        feed_forward_proj="gated-gelu",
    ),
}
DECODER_ONLY = [name for name in LANGUAGE_MODELS if name != "t5"]


def randomize(model: torch.nn.Module, std: float = 0.2) -> torch.nn.Module:
    """Weights so large that every part has a say in the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) * std
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise / 2)
    model.tie_weights()
    return model


def make_config(language_model: str | None = "opt", **kwargs) -> Blip2Config:
    text_config = None if language_model is None else LANGUAGE_MODELS[language_model]()
    fields = {
        "vision_config": dict(VISION),
        "qformer_config": dict(QFORMER),
        "text_config": text_config,
        "num_query_tokens": NUM_QUERIES,
        "image_text_hidden_size": 16,
        "image_token_index": VOCAB_SIZE - 1,
    }
    return Blip2Config(**(fields | kwargs))


def make_model(language_model: str = "opt", **kwargs) -> Blip2ForConditionalGeneration:
    return randomize(Blip2ForConditionalGeneration(make_config(language_model, **kwargs))).eval()


def assert_same_model(actual, expected, outputs, expected_outputs):
    """Weights to the last bit; what is computed of them may depend on where in memory they lie."""
    weights = expected.state_dict()
    assert actual.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in actual.state_dict().items())
    torch.testing.assert_close(outputs, expected_outputs)


def make_tokenizer(bos: bool = True, eos: bool = False) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of fewer than `VOCAB_SIZE - 1` tokens; `<s>` 0, `<pad>` 1, `</s>` 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 1,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def make_image_processor(size: int = 28):
    return transformers.models.blip.image_processing_pil_blip.BlipImageProcessorPil(
        size={"height": size, "width": size}
    )


def make_cropping_image_processor(size: int = 14):
    """As those of CLIP and DINOv2: the shortest side is scaled, and the middle cut out."""
    crop = {"height": size, "width": size}
    return transformers.BitImageProcessorPil(size={"shortest_edge": size * 8 // 7}, crop_size=crop)


def columns_seen(image_processor) -> np.ndarray:
    """Which column of a wide picture, 0 to 255, each column of the tower's input shows."""
    ramp = Image.fromarray(np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (64, 256, 3)).copy())
    ends = [Image.new("RGB", (256, 64), colour) for colour in ("black", "white")]
    pixels = image_processor(images=[ramp, *ends], return_tensors="np")["pixel_values"][:, 0].mean(axis=1)
    return (pixels[0] - pixels[1]) / (pixels[2] - pixels[1]) * 255


def assert_sees_the_whole(image_processor, size: int):
    """Squares of a size, whose columns are spread evenly over the picture."""
    columns = columns_seen(image_processor)
    assert columns.shape == (size,)
    np.testing.assert_allclose(columns, (np.arange(size) + 0.5) * 256 / size - 0.5, atol=3)


def make_processor(is_encoder_decoder: bool = False, **kwargs) -> Blip2Processor:
    tokenizer = make_tokenizer(bos=not is_encoder_decoder, eos=is_encoder_decoder)
    fields = {"num_query_tokens": NUM_QUERIES, "is_encoder_decoder": is_encoder_decoder}
    return Blip2Processor(make_image_processor(), tokenizer, **(fields | kwargs))


def make_image(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    """Return the bytes of a file of the image."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def make_pixel_values(num_images: int = 2, size: int = 28) -> torch.Tensor:
    return torch.randn(num_images, 3, size, size)
