"""Tiny models of stage 1 and of retrieval, their processor, pairs and batches, and what their tests compare with."""

import datasets
import torch
import transformers
from tiny import QFORMER, VOCAB_SIZE, make_config, make_image, make_image_processor, randomize
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from blip2_hf import Blip2ForImageTextRetrieval, Blip2ForPreTraining


STAGE1_QFORMER = {
    **QFORMER,
    "use_qformer_text_input": True,
    "eos_token_id": 3,
}
RETRIEVAL_QFORMER = {**STAGE1_QFORMER, "vocab_size": VOCAB_SIZE}
WORDS = "a red green blue big small dog cat bus tree house boat on under near the grass street"


def make_stage1(qformer_dropout: float = 0.0, **kwargs) -> Blip2ForPreTraining:
    """Return a model whose gradients are neither tiny nor huge, so that a comparison in float32 means something."""
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), qformer_dropout)
    fields = {"qformer_config": {**STAGE1_QFORMER, **dropout}, "image_token_index": None}
    model = randomize(Blip2ForPreTraining(make_config(None, **(fields | kwargs))), std=0.15)
    with torch.no_grad():
        model.temperature.weight.fill_(0.5)
    return model


def make_retrieval(**kwargs) -> Blip2ForImageTextRetrieval:
    fields = {"qformer_config": RETRIEVAL_QFORMER, "image_token_index": None}
    torch.manual_seed(0)
    model = randomize(Blip2ForImageTextRetrieval(make_config(None, **(fields | kwargs)))).eval()
    with torch.no_grad():
        model.temperature.weight.fill_(0.5)
    return model


def make_inputs(batch_size: int = 5, lengths=(7, 3, 9, 5, 4), seed: int = 0) -> dict[str, torch.Tensor]:
    """Return ragged text; [CLS] is 2, [SEP] 3, padding 0."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [lengths[i % len(lengths)] for i in range(batch_size)]
    input_ids = torch.randint(4, 60, (batch_size, max(lengths)), generator=generator)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        input_ids[row, 0], input_ids[row, length - 1], input_ids[row, length:] = 2, 3, 0
        attention_mask[row, :length] = 1
    image_embeds = torch.randn(batch_size, 5, 32, generator=generator)
    return {"image_embeds": image_embeds, "input_ids": input_ids, "attention_mask": attention_mask}


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(actual: dict, expected: dict, tolerance: float):
    """Assert that each is within `tolerance` of its own largest entry, or of 1 where that is smaller."""
    for name in expected:
        scale = expected[name].abs().max().clamp(min=1)
        difference = (actual[name] - expected[name]).abs().max() / scale
        assert difference <= tolerance, f"{name}: {difference:.1e}"


class Processor:
    """Pictures of 28 pixels, and words for tokens."""

    def __init__(self):
        vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS.split()])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        special = [("[CLS]", 2), ("[SEP]", 3)]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
        self.tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
        )
        self.image_processor = make_image_processor()


def make_pairs(count: int = 24) -> datasets.Dataset:
    words = WORDS.split()
    texts = [[" ".join(words[(i * k) % 18] for k in range(1, 3 + i % 5)), words[i % 18]] for i in range(count)]
    return datasets.Dataset.from_dict({"image": [make_image(i) for i in range(count)], "caption": texts})


def one_by_one(model, image_embeds, input_ids, attention_mask, matching: bool) -> torch.Tensor:
    """Scores of all pairs, of one image and one text without padding at a time."""
    rows = []
    for image in image_embeds:
        scores = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            ids = ids[mask.bool()][None]
            outputs = model(image_embeds=image[None], input_ids=ids, use_image_text_matching_head=matching)
            scores.append(outputs.logits_per_image[0] if matching else outputs.logits_per_image[0, 0])
        rows.append(torch.stack(scores))
    return torch.stack(rows)
