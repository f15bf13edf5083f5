"""The examples with tiny checkpoints in place of those that they download."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from paths import EXAMPLES
from tiny import LANGUAGE_MODELS, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors


SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
SIDE = 32  # pixels, which the tower halves as often as EfficientNet-lite2 does


@contextlib.contextmanager
def tiny_examples(cache: Path) -> Iterator[pytest.MonkeyPatch]:
    """Let the examples, imported by their names, find tiny checkpoints in `cache`, and compute in float32 on a CPU."""
    forget_examples()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLIP2_HF_CACHE", str(cache))
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.syspath_prepend(EXAMPLES)
        patch.syspath_prepend(EXAMPLES / "recipe")
        import efficientnet_lite
        import precision
        import real_assets

        patch.setattr(precision, "_seconds_of_product", lambda dtype: float(dtype == torch.bfloat16))
        patch.setattr(efficientnet_lite, "pretrained_folder", lambda: str(cache / "tower"))
        save_tower(cache / "tower")
        for part, save in (("text_encoder", save_bert), ("language_model", save_llama), ("vision_model", Path.mkdir)):
            save(cache / "assets" / "-".join((part, *real_assets.PACKAGES[part][:2])))
        yield patch
    forget_examples()


def forget_examples():
    """Forget imported examples, because their names are common words and they read the environment."""
    for name, module in list(sys.modules.items()):
        if EXAMPLES in Path(getattr(module, "__file__", None) or "/").parents:
            del sys.modules[name]


def tower_config() -> transformers.EfficientNetConfig:
    import efficientnet_lite

    config = efficientnet_lite.lite2_config()
    sizes = {"in_channels": [32, 8, 8], "out_channels": [8, 8, 16], "kernel_sizes": [3, 3, 5], "strides": [1, 2, 2]}
    sizes |= {"expand_ratios": [1, 6, 6], "num_block_repeats": [1, 2, 2], "depthwise_padding": []}
    config.update(sizes | {"image_size": SIDE})
    return config


def save_tower(folder: Path):
    torch.manual_seed(0)
    transformers.EfficientNetModel(tower_config()).save_pretrained(folder)
    transformers.BitImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False).save_pretrained(
        folder
    )


def save_bert(folder: Path):
    tokenizer = words_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=40)
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def words_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer that knows the words of captions."""
    from scenes import THINGS, plural

    texts = ["a an two three to the left right of above below", *THINGS, *map(plural, THINGS)]
    words = dict.fromkeys([*SPECIAL, *" ".join(texts).split()])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def save_llama(folder: Path):
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(LANGUAGE_MODELS["llama"]()).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
