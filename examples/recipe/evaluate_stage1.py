"""Evaluation of stage 1: retrieval by contrast and re-ranked by matching, swapped captions, and captions by ITG."""

import sys
from pathlib import Path

import datasets
import torch


sys.path.insert(0, str(Path(__file__).parents[1]))
from precision import fast_autocast  # noqa: E402
from scene_training import stack_features  # noqa: E402
from scenes import exact, object_scores  # noqa: E402

from blip2_hf.evaluation import TwoStageRetrieval  # noqa: E402
from blip2_hf.models.losses import image_text_similarity  # noqa: E402
from blip2_hf.training import query_diversity  # noqa: E402


CANDIDATES = 10  # that matching re-ranks
SWAPS = {"relation": ("left", "above"), "count": ("two", "three")}


@torch.no_grad()
def evaluate(model, processor, scenes: datasets.Dataset, losses: tuple[str, ...]) -> dict[str, float]:
    """Compute the scores of the losses that were trained."""
    model.eval()
    embeds = stack_features(scenes).to(model.device)
    with fast_autocast():
        results = retrieve(model, processor, scenes, embeds, "itm" in losses)
        for kind, wanted in SWAPS.items():
            results |= tell_swapped(model, processor, scenes, embeds, kind, wanted, "itm" in losses)
        if model.config.num_query_tokens > 1:
            states = model.encode_image(None, embeds[:64], output_hidden_states=True)[2].hidden_states
            layers = [tuple(map(float, query_diversity(layer))) for layer in states]
            results |= {"query cosine": layers[-1][0], "query rank": layers[-1][1]}
            results |= {f"query cosine, layer {number}": layer[0] for number, layer in enumerate(layers)}
        if "itg" in losses:
            captions = write(model, processor, embeds)
            results |= {f"ITG {name}": score for name, score in score_captions(captions, scenes).items()}
    return results


def score_captions(captions: list[str], scenes: datasets.Dataset) -> dict[str, float]:
    """Return the share of captions that are exactly right, of all and of each kind, and how well things are named."""
    kinds = scenes["kind"]
    rows = {kind: [row for row, own in enumerate(kinds) if own == kind] for kind in sorted(set(kinds))}
    by_kind = {f"exact, {kind}": exact([captions[i] for i in own], scenes.select(own)) for kind, own in rows.items()}
    return {"exact": exact(captions, scenes)} | object_scores(captions, scenes) | by_kind


def retrieve(model, processor, scenes, embeds: torch.Tensor, has_matching: bool) -> dict[str, float]:
    """Compute R@1 among all scenes, both ways. A scene with the same captions counts as the right one."""
    captions = list(scenes["caption"])
    retrieval = TwoStageRetrieval(model, processor.tokenizer, k=CANDIDATES, show_progress=False)
    texts, features = retrieval.encode_texts(captions), retrieval.encode_images(embeds)
    ranked = {"ITC": retrieval.compare(features, texts.features)}
    if has_matching:
        ranked["ITM"] = retrieval(embeds, texts, features)
    return {
        f"{name} {way} R@1": sum(
            captions[first] == own
            for first, own in zip(getattr(ranking, way).index[:, 0].tolist(), captions, strict=True)
        )
        / len(captions)
        for name, ranking in ranked.items()
        for way in ("image_to_text", "text_to_image")
    }


def tell_swapped(model, processor, scenes, embeds, kind: str, wanted, has_matching: bool) -> dict[str, float]:
    """Compute how often the true caption scores more than the same with another relation or count. Chance is 50%."""
    rows = [row for row, own in enumerate(scenes["kind"]) if own in wanted]
    if not rows:
        return {}
    true, swapped = ([captions[0] for captions in scenes.select(rows)[name]] for name in ("captions", "swapped"))
    scores = [score_pairs(model, processor, embeds[rows], texts, has_matching) for texts in (true, swapped)]
    return {f"{name} {kind} told": (scores[0][name] > scores[1][name]).double().mean().item() for name in scores[0]}


def score_pairs(model, processor, embeds: torch.Tensor, texts: list[str], has_matching: bool) -> dict:
    """Return the cosine and the logit of "match" of each image with its text."""
    tokens = processor.tokenizer(texts, padding=True, return_tensors="pt").to(model.device)
    tokens = tokens["input_ids"], tokens["attention_mask"]
    images = model.get_image_features(image_embeds=embeds, return_dict=True).pooler_output
    features = model.get_text_features(*tokens, return_dict=True).pooler_output
    scores = {"ITC": image_text_similarity(images.float(), features.float()).diagonal()}
    if has_matching:
        logits = model.get_matching_logits(*tokens, image_embeds=embeds)
        scores["ITM"] = logits.float()[:, 1] - logits.float()[:, 0]
    return scores


def write(model, processor, embeds: torch.Tensor) -> list[str]:
    """Generate the Q-Former's own captions (ITG)."""
    tokens = [model.generate(image_embeds=chunk, max_new_tokens=16, do_sample=False) for chunk in embeds.split(100)]
    return [text for part in tokens for text in processor.tokenizer.batch_decode(part, skip_special_tokens=True)]
