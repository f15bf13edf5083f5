"""
Measure how many pairs of image and text re-ranking by matching (ITM) scores a second.

    python benchmarks/retrieval.py                       # from stored features, on a CPU thread
    python benchmarks/retrieval.py --tower               # against transformers, which runs a ViT-L at each call
    python benchmarks/retrieval.py --device cuda --dtype bfloat16

A BERT-base Q-Former with 32 queries matches each of a few images with k texts of about 12 tokens. The baseline is
transformers' Blip2ForImageTextRetrieval.

Without --tower both start from stored features [257, 1408]. The baseline scores each pair as LAVIS does: a batch has
an image's k pairs, with the image's features repeated for each text, and texts padded to 35 tokens. With --tower both
start from pixels. The baseline then pads texts to their longest, and runs the tower for each pair; this library runs
it once an image, and its time is counted. With --tower the baseline is timed on fewer pairs because each pair costs
the same. The scores of both are compared. The output is one line of JSON. A speed_ratio above 1 means that this
library is faster.
"""

import argparse
import json

import torch
import transformers
from measure import seconds_in_turn
from shapes import PAPER, Shapes
from stage2 import StoredTower

from blip2_hf import Blip2Config, Blip2ForImageTextRetrieval, Blip2QFormerConfig, Blip2VisionConfig
from blip2_hf.evaluation import TwoStageRetrieval


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--k", type=int, default=64, help="texts that each image is matched with")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--baseline-batch-size", type=int, default=16, help="with --tower: pairs of the baseline")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind that are timed; the median counts")
    parser.add_argument("--tower", action="store_true", help="the baseline runs a tower of ViT-L's shape")
    return parser.parse_args()


def make_models(arguments: argparse.Namespace, shapes: Shapes = PAPER):
    torch.manual_seed(0)
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**vision if arguments.tower else shapes.vision | {"num_hidden_layers": 0}),
        qformer_config=Blip2QFormerConfig(**shapes.qformer, use_qformer_text_input=True),
    )
    config.vision_config.post_layernorm_eps = config.vision_config.layer_norm_eps
    ours = Blip2ForImageTextRetrieval(config)
    theirs = transformers.Blip2ForImageTextRetrieval(config.to_transformers())
    weights = {n: w for n, w in ours.state_dict().items() if not n.startswith("temperature")}
    theirs.load_state_dict({name.replace("query_tokens.weight", "query_tokens"): w for name, w in weights.items()})
    if not arguments.tower:
        theirs.vision_model = StoredTower(theirs.vision_model.post_layernorm)
    dtype = getattr(torch, arguments.dtype)
    return tuple(model.to(arguments.device, dtype).eval() for model in (ours, theirs))


def make_texts(count: int) -> list[list[int]]:
    """Make texts of 9 to 15 tokens, 12 on average, [CLS] and [SEP] included, in random order."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(9, 16, (count,), generator=generator).tolist()
    return [[101, *torch.randint(1000, 30000, (n - 2,), generator=generator).tolist(), 102] for n in lengths]


def pad(texts: list[list[int]], length: int, device: str) -> dict[str, torch.Tensor]:
    ids = torch.tensor([text + [0] * (length - len(text)) for text in texts], device=device)
    return {"input_ids": ids, "attention_mask": ids.ne(0).long()}


class Ours:
    def __init__(self, model: Blip2ForImageTextRetrieval, pictures: torch.Tensor, texts, arguments):
        self.model, self.pictures, self.texts, self.runs_tower = model, pictures, texts, arguments.tower
        self.retrieval = TwoStageRetrieval(model, None, batch_size=arguments.k, show_progress=False)
        self.pairs = torch.cartesian_prod(torch.arange(arguments.images), torch.arange(arguments.k))

    @torch.inference_mode()
    def __call__(self) -> torch.Tensor:
        embeds = self.model.get_image_embeds(self.pictures) if self.runs_tower else self.pictures
        return self.retrieval.match(embeds, self.texts, self.pairs)


class Theirs:
    def __init__(self, model, pictures: torch.Tensor, texts, arguments):
        self.model, self.pictures = model, pictures
        self.batch_size = arguments.baseline_batch_size if arguments.tower else arguments.k
        length = max(map(len, texts)) if arguments.tower else 35
        self.batch = pad(texts[: self.batch_size], length, arguments.device)
        self.num_images = 1 if arguments.tower else len(pictures)

    @torch.inference_mode()
    def __call__(self) -> torch.Tensor:
        scores = []
        for picture in self.pictures[: self.num_images]:
            repeated = picture[None].expand(self.batch_size, *picture.shape)
            outputs = self.model(repeated, **self.batch, use_image_text_matching_head=True)
            scores.append(outputs.logits_per_image[:, 1].float().cpu())
        return torch.cat(scores)


def main():
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    models, texts = make_models(arguments), make_texts(arguments.k)
    shape = (3, 224, 224) if arguments.tower else (257, 1408)
    pictures = torch.randn(arguments.images, *shape, generator=torch.Generator().manual_seed(1))
    pictures = pictures.to(arguments.device, getattr(torch, arguments.dtype))
    ours, theirs = Ours(models[0], pictures, texts, arguments), Theirs(models[1], pictures, texts, arguments)
    scores = {"ours": ours(), "theirs": theirs()}
    difference = (scores["ours"][: len(scores["theirs"])] - scores["theirs"]).abs().max()
    times = seconds_in_turn({"ours": ours, "theirs": theirs}, arguments.device, arguments.repeats)
    rates = {name: len(scores[name]) / seconds for name, seconds in times.items()}
    is_cpu = arguments.device == "cpu"
    print(
        json.dumps(
            {
                "device": f"{arguments.threads} CPU threads" if is_cpu else torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "dtype": arguments.dtype,
                "tower": "ViT-L, run by both" if arguments.tower else "stored features",
                "k": arguments.k,
                "pairs_per_second": {name: round(rate, 2) for name, rate in rates.items()},
                "speed_ratio": round(rates["ours"] / rates["theirs"], 3),
                "largest_difference_of_scores": float(difference),
            }
        )
    )


if __name__ == "__main__":
    main()
