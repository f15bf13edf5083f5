"""transformers' InstructBLIP-Video, tiny, and the files of its processor, which needs torchvision to be made."""

import json
from pathlib import Path

import transformers
from lavis_cases import FIXTURES
from tiny import LANGUAGE_MODELS, NUM_QUERIES, QFORMER, VISION, VOCAB_SIZE, make_tokenizer, randomize


PROCESSOR_CONFIG = {
    "num_query_tokens": NUM_QUERIES,
    "processor_class": "InstructBlipVideoProcessor",
    "video_processor": {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "do_sample_frames": False,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "return_metadata": False,
        "size": {"height": 28, "width": 28},
        "video_processor_type": "InstructBlipVideoVideoProcessor",
    },
}


def save_instructblip_video(
    folder: Path, language_model: str = "opt"
) -> transformers.InstructBlipVideoForConditionalGeneration:
    """Write model and processor, and return the model."""
    qformer_tokenizer = transformers.BertTokenizer(str(FIXTURES / "tokenizers" / "bert" / "vocab.txt"))
    tokenizer = make_tokenizer(bos=language_model != "t5", eos=language_model == "t5")
    tokenizer.add_tokens([transformers.AddedToken("<video>", normalized=False, special=True)], special_tokens=True)
    text_config = LANGUAGE_MODELS[language_model]()
    text_config.bos_token_id = 0
    config = transformers.InstructBlipVideoConfig(
        vision_config={**VISION, "initializer_range": 0.02},
        qformer_config={**QFORMER, "vocab_size": len(qformer_tokenizer), "bos_token_id": None},
        text_config=text_config,
        num_query_tokens=NUM_QUERIES,
        video_token_index=VOCAB_SIZE - 1,
    )
    model = randomize(transformers.InstructBlipVideoForConditionalGeneration(config)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    qformer_tokenizer.save_pretrained(folder / "qformer_tokenizer")
    (folder / "processor_config.json").write_text(json.dumps(PROCESSOR_CONFIG))
    return model
