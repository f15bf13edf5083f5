"""
Measure how many JPEG files `caption_dataset` captions a second, compared with transformers' own pipeline.

The baseline is pipeline("image-text-to-text") with transformers' own Blip2ForConditionalGeneration.

    python benchmarks/captioning.py                  # a model of medium size, random weights, on a CPU thread
    python benchmarks/captioning.py --num-workers 2 --threads 4 --pictures 512 --batch-size 32 --repeats 1
    python benchmarks/captioning.py --device cuda --dtype bfloat16 --pictures 512 --batch-size 32 --num-workers 4

Both have the same weights, image processor, prompt, batch size, number of worker processes and number of new tokens,
and get the paths of the same files. Without workers, this library decodes in a thread beside the model, and
transformers decodes before it. The output is one line of JSON. A speed_ratio above 1 means that this library is
faster. cpu_seconds are those of this process in the fastest run, which other jobs on the machine disturb less. If
captions differ, the benchmark ends with an error.
"""

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from measure import seconds_in_turn
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from blip2_hf import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, Blip2QFormerConfig, Blip2VisionConfig
from blip2_hf.captioning import caption_dataset


PROMPT = "a photo of"
QUERIES, WORDS = 32, 8000
IMAGE_TOKEN = WORDS  # the next id, which both processors give to <image>


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--size", type=int, nargs=2, default=(640, 480), help="of the files, in pixels")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=12, help="of each caption, no more and no less")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that decode")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each that are timed; the median counts")
    return parser.parse_args()


def make_tokenizer(words: int = WORDS) -> transformers.PreTrainedTokenizerFast:
    """Make a tokenizer of words that can be distinguished in a caption."""
    vocab = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", *PROMPT.split()])}
    vocab |= {f"word{i}": i for i in range(len(vocab), words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def make_config() -> Blip2Config:
    """Make a configuration of ViT-S/14's shape, a Q-Former of the same width, and a small OPT."""
    width = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    return Blip2Config(
        vision_config=Blip2VisionConfig(**width, num_hidden_layers=12, image_size=224),
        qformer_config=Blip2QFormerConfig(**width, num_hidden_layers=6, encoder_hidden_size=384),
        text_config=transformers.OPTConfig(
            hidden_size=512,
            word_embed_proj_dim=512,
            ffn_dim=2048,
            num_hidden_layers=8,
            num_attention_heads=8,
            vocab_size=WORDS + 1,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
        ),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )


def make_models(arguments: argparse.Namespace, config: Blip2Config | None = None) -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    config = config or make_config()
    with torch.device(arguments.device):
        ours = Blip2ForConditionalGeneration(config)
        theirs = transformers.Blip2ForConditionalGeneration(config.to_transformers())
    # Large enough that pictures have different captions
    std = 0.1 * (384 / config.vision_config.hidden_size) ** 0.5
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, std)
    weights = ours.state_dict()
    theirs.load_state_dict({name.replace("query_tokens.weight", "query_tokens"): w for name, w in weights.items()})
    found = {"ours": ours, "theirs": theirs}
    return {name: model.to(arguments.device, getattr(torch, arguments.dtype)).eval() for name, model in found.items()}


def make_processors(words: int = WORDS, image_size: int = 224) -> dict[str, transformers.ProcessorMixin]:
    # This one needs no torchvision
    image_processor = transformers.models.blip.image_processing_pil_blip.BlipImageProcessorPil(
        size={"height": image_size, "width": image_size}
    )
    ours, theirs = make_tokenizer(words), make_tokenizer(words)
    return {
        "ours": Blip2Processor(image_processor, ours, num_query_tokens=QUERIES, is_encoder_decoder=False),
        "theirs": transformers.Blip2Processor(image_processor, theirs, num_query_tokens=QUERIES),
    }


def write_pictures(folder: Path, number: int, size: tuple[int, int]) -> list[Path]:
    """Write blurred noise as JPEG files, which are about as large as photographs of that size."""
    paths = [folder / f"{i:06d}.jpg" for i in range(number)]
    for i, path in enumerate(paths):
        noise = np.random.default_rng(i).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        path.write_bytes(buffer.getvalue())
    return paths


class Rows(torch.utils.data.Dataset):
    """The input of the pipeline, which would take a list for a chat."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"images": str(self.paths[index]), "text": PROMPT}


def with_cpu_seconds(run: Callable, found: list[float]) -> Callable:
    def timed():
        start = time.process_time()
        run()
        found.append(time.process_time() - start)

    return timed


def main():
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    made, tools = make_models(arguments), make_processors()
    length = {"min_new_tokens": arguments.new_tokens, "max_new_tokens": arguments.new_tokens, "do_sample": False}
    common = {"batch_size": arguments.batch_size, "num_workers": arguments.num_workers}
    captions: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder), arguments.pictures, arguments.size)
        output = Path(folder, "captions.jsonl")
        pipe = transformers.pipeline(
            "image-text-to-text", model=made["theirs"], processor=tools["theirs"], device=arguments.device
        )

        def ours():
            caption_dataset(
                made["ours"], tools["ours"], folder, output, prompt=PROMPT, overwrite=True, **common, **length
            )
            captions["ours"] = [json.loads(line)["caption"] for line in output.read_text().splitlines()]

        def theirs():
            found = pipe(Rows(paths), return_full_text=False, generate_kwargs=length, **common)
            captions["theirs"] = [each[0]["generated_text"].strip() for each in found]

        cpu_seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        runs = {run.__name__: with_cpu_seconds(run, cpu_seconds[run.__name__]) for run in (ours, theirs)}
        for run in runs.values():
            run()  # to warm up
        times = seconds_in_turn(runs, arguments.device, arguments.repeats)
    speeds = {name: round(arguments.pictures / seconds, 3) for name, seconds in times.items()}
    equal = sum(a == b for a, b in zip(captions["ours"], captions["theirs"], strict=True))
    is_cpu = arguments.device == "cpu"
    report = {
        "device": f"{arguments.threads} CPU threads" if is_cpu else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": arguments.dtype,
        "pictures": arguments.pictures,
        **common,
        "new_tokens": arguments.new_tokens,
        "pictures_per_second": speeds,
        "cpu_seconds": {name: round(min(values), 3) for name, values in cpu_seconds.items()},
        "speed_ratio": round(times["theirs"] / times["ours"], 3),
        "captions_equal": equal,
        "captions_distinct": len(set(captions["ours"])),
    }
    print(json.dumps(report))
    # In lower precision, tokens of almost equal probability may change places
    if arguments.dtype == "float32" and equal < arguments.pictures:
        raise SystemExit("The captions differ.")


if __name__ == "__main__":
    main()
