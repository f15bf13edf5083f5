"""Evaluation of stage 1: recall of names and pictures by contrast, by matching and by both; captions."""

import sys
from pathlib import Path

import datasets
import torch
from datasets import concatenate_datasets
from torch.nn.functional import logsigmoid


sys.path.insert(0, str(Path(__file__).parents[1]))
from precision import fast_autocast  # noqa: E402

from blip2_hf.data import read_cached_features  # noqa: E402
from blip2_hf.evaluation import Ranking, TwoStageRankings, TwoStageRetrieval  # noqa: E402
from blip2_hf.evaluation.metrics import caption_metrics  # noqa: E402


CANDIDATES = 10  # that matching re-ranks


def evaluate(model, processor, sets: dict[str, datasets.Dataset], contrast_only: bool = False) -> dict:
    """Compute each set's recall among the names and pictures of all sets, by ITC, ITM and both, and score captions."""
    rows = concatenate_datasets(list(sets.values()))
    names = rows["name"]
    embeds = torch.stack([read_cached_features(row).float() for row in rows])
    retrieval = TwoStageRetrieval(model.eval(), processor.tokenizer, k=CANDIDATES, show_progress=False)
    texts, features = retrieval.encode_texts(names), retrieval.encode_images(embeds)
    ranked = {"ITC": retrieval.compare(features, texts.features)}
    if not contrast_only:
        with fast_autocast():
            ranked["ITM"] = retrieval(embeds, texts, features)
        ranked["ITC and ITM"] = both(ranked["ITC"], ranked["ITM"], model.temperature.weight.item())
        captions = write(model, processor, embeds)
        wanted = processor.tokenizer.batch_decode(texts.input_ids, skip_special_tokens=True)
    results, first = {}, 0
    for split, part in sets.items():
        own = torch.arange(first, first + len(part))
        first += len(part)
        results[split] = {
            f"{name} {direction} R@{k}": recall(getattr(ranking, direction).index[own], own, k)
            for name, ranking in ranked.items()
            for direction in ("image_to_text", "text_to_image")
            for k in (1, 5, 10)
        }
        if not contrast_only:
            scores = score([captions[i] for i in own], [wanted[i] for i in own])
            results[split] |= {f"ITG {name}": value for name, value in scores.items()}
    return results


def score(captions: list[str], names: list[str]) -> dict[str, float]:
    """Compute the share of captions that are the name, and their CIDEr-D with the name as the reference."""
    exact = sum(caption == name for caption, name in zip(captions, names, strict=True)) / len(names)
    return {"exact": exact, "CIDEr-D": caption_metrics(captions, [[name] for name in names])["CIDEr-D"]}


def both(by_contrast: TwoStageRankings, reranked: TwoStageRankings, temperature: float) -> TwoStageRankings:
    """
    Rank the candidates by `cosine / temperature + log sigmoid(logit of "match")`.

    The cosine weighs as much as in the contrastive loss, and all confident matches weigh about the same. `reranked`
    has the sums of logit and cosine.
    """
    rankings = []
    for direction in ("image_to_text", "text_to_image"):
        (index, cosines), (_, sums) = (_in_order(getattr(ranked, direction)) for ranked in (by_contrast, reranked))
        scores, order = (cosines / temperature + logsigmoid(sums - cosines)).sort(dim=1, descending=True)
        rankings.append(Ranking(index.gather(1, order), scores))
    return TwoStageRankings(*rankings)


def _in_order(ranking: Ranking) -> tuple[torch.Tensor, torch.Tensor]:
    """Return index and scores of the candidates, in the order of the index."""
    index, order = ranking.index.sort(dim=1)
    return index, ranking.scores.gather(1, order)


def recall(found: torch.Tensor, wanted: torch.Tensor, k: int) -> float:
    return (found[:, :k] == wanted[:, None]).any(dim=1).double().mean().item()


@torch.no_grad()
def write(model, processor, embeds: torch.Tensor) -> list[str]:
    """Generate the Q-Former's own captions (ITG)."""
    tokens = [
        model.generate(image_embeds=chunk.to(model.device), max_new_tokens=10, do_sample=False)
        for chunk in embeds.split(128)
    ]
    return [text for part in tokens for text in processor.tokenizer.batch_decode(part, skip_special_tokens=True)]
