"""
Retrieval in two stages (section 4.4): contrast (ITC) finds the first k of each image and of each text, matching (ITM)
ranks them.

An image's keys and values are computed once, however many texts it is matched with, and pairs that both directions ask
for are matched once. Texts of like lengths are matched together, no longer than the longest of them.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from transformers.utils import logging

from ..data.feature_cache import read_cached_features
from ..jobs.batch_size import BatchSize
from ..jobs.inference import eval_mode
from ..models.losses import image_text_similarity
from ..models.modeling_image_text import Blip2ImageTextPreTrainedModel


_COSINES = 2**25  # that are in memory at a time


@dataclass
class Ranking:
    r"""
    What was found, the best first.

    Args:
        index (`torch.LongTensor` of shape `(num_queries, k)`):
            Numbers of the texts that an image found, or of the images that a text found.
        scores (`torch.FloatTensor` of shape `(num_queries, k)`):
            Their scores: the logit of "match" plus the cosine, or the cosine alone.
    """

    index: torch.Tensor
    scores: torch.Tensor

    def matrix(self, num_candidates: int, fill: float = float("-inf")) -> torch.Tensor:
        """
        Return the scores of all candidates, with `fill` for those that were not found.

        Args:
            num_candidates (`int`):
                Number of texts, or of images, that were searched.
            fill (`float`, *optional*, defaults to `-inf`):
                Score of those that were not found.

        Returns:
            `torch.FloatTensor` of shape `(num_queries, num_candidates)`.
        """
        full = torch.full((len(self.index), num_candidates), fill, dtype=self.scores.dtype)
        return full.scatter_(1, self.index, self.scores)


@dataclass
class TwoStageRankings:
    """What the images found among the texts, and the texts among the images."""

    image_to_text: Ranking
    text_to_image: Ranking

    def recall(self, is_match: torch.Tensor, k: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
        r"""
        Compute recall at k, both ways: the share of images with a text of theirs among the first k, and of texts.

        Args:
            is_match (`torch.BoolTensor` of shape `(num_images, num_texts)`, or `torch.LongTensor` of shape \
`(num_texts,)`):
                Which belong together, or the number of each text's image (-1: none). Images without any text, and
                texts without any image, do not count.
            k (`tuple[int, ...]`, *optional*, defaults to `(1, 5, 10)`):
                How many of the first count. A number is left out where fewer were ranked, unless these are all.

        Returns:
            `dict[str, float]`: `image_to_text_r1`, `text_to_image_r1` and so on, between 0 and 1.
        """
        recall = {}
        texts, images = self.image_to_text.index, self.text_to_image.index
        if is_match.dim() == 2:
            right = {
                "image_to_text": is_match.gather(1, texts)[is_match.any(dim=1)],
                "text_to_image": is_match.T.gather(1, images)[is_match.any(dim=0)],
            }
        else:
            has_image = is_match >= 0
            right = {
                "image_to_text": (is_match[texts] == torch.arange(len(texts))[:, None])[is_match[has_image].unique()],
                "text_to_image": (images == is_match[:, None])[has_image],
            }
        for (name, found), num_candidates in zip(right.items(), (len(images), len(texts)), strict=True):
            for count in k:
                if count <= found.shape[1] or found.shape[1] == num_candidates:
                    recall[f"{name}_r{count}"] = found[:, :count].any(dim=1).double().mean().item()
        return recall


@dataclass
class EncodedTexts:
    r"""
    Texts, read once.

    Args:
        input_ids (`list[list[int]]`):
            Their tokens, without padding.
        features (`torch.FloatTensor` of shape `(num_texts, image_text_hidden_size)`):
            What images are compared with.
    """

    input_ids: list[list[int]]
    features: torch.Tensor


def _in_eval_mode(method: Callable) -> Callable:
    """Run a method without dropout and without a graph; the model is left as it was."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        with eval_mode(self.model), torch.no_grad():
            return method(self, *args, **kwargs)

    return run


class TwoStageRetrieval:
    r"""
    Finds texts for images and images for texts.

    Args:
        model ([`Blip2ForImageTextRetrieval`] or [`Blip2ForPreTraining`]):
            Whose features and scores count. It computes on the device that it is on.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The Q-Former's.
        k (`int`, *optional*, defaults to 128):
            How many candidates of contrast are matched (the paper's number). 0: contrast alone ranks all.
        batch_size (`int`, *optional*, defaults to 64):
            How many images, texts or pairs the model takes at a time. It is halved if memory runs out.
        max_length (`int`, *optional*, defaults to 35):
            Most tokens of a text; the rest is cut. The authors' code has 35.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.

    Example:

    ```python
    >>> from blip2_hf.evaluation import TwoStageRetrieval

    >>> retrieval = TwoStageRetrieval(model, processor.tokenizer, k=128)
    >>> rankings = retrieval(load_cached_features("features"), captions)
    >>> rankings.image_to_text.index[0]  # the captions of image 0, the best first
    >>> rankings.recall(is_match)
    ```"""

    def __init__(
        self,
        model: Blip2ImageTextPreTrainedModel,
        tokenizer: Any,
        k: int = 128,
        batch_size: int = 64,
        max_length: int = 35,
        show_progress: bool = True,
    ):
        if k < 0:
            raise ValueError(f"k={k}: at least 0 was expected.")
        self.model = model
        self.tokenizer = tokenizer
        self.k = k
        self._batch_size = BatchSize(batch_size)
        self.max_length = max_length
        self.show_progress = show_progress

    @property
    def batch_size(self) -> int:
        """Return how many images, texts or pairs the model takes at a time, now."""
        return self._batch_size.size

    @_in_eval_mode
    def __call__(
        self,
        images: torch.Tensor | datasets.Dataset | Sequence[torch.Tensor],
        texts: Sequence[str] | EncodedTexts,
        image_features: torch.Tensor | None = None,
    ) -> TwoStageRankings:
        r"""
        Find texts for images and images for texts.

        Args:
            images (`torch.Tensor` of shape `(num_images, features, vision hidden_size)`, `datasets.Dataset` or \
sequence of `torch.Tensor`):
                The tower's output: what [`~Blip2PreTrainedModel.get_image_embeds`] returned, in memory, or what
                [`~data.load_cached_features`] opened, on the disk.
            texts (`list[str]` or [`EncodedTexts`]):
                The texts, or what [`~TwoStageRetrieval.encode_texts`] made of them.
            image_features (`torch.Tensor`, *optional*):
                What [`~TwoStageRetrieval.encode_images`] returned for `images`.

        Returns:
            [`TwoStageRankings`]: both directions, on the CPU, `k` candidates each (all, with `k=0`), or as many as
            there are.
        """
        if not isinstance(texts, EncodedTexts):
            texts = self.encode_texts(texts)
        if image_features is None:
            image_features = self.encode_images(images)
        if len(image_features) != len(images):
            raise ValueError(
                f"image_features has {len(image_features)} rows; {len(images)} were expected, one for each image."
            )
        found = self.compare(image_features, texts.features)
        if self.k == 0:
            return found
        num_texts = len(texts.input_ids)
        image, text = (torch.arange(len(r.index))[:, None] for r in (found.image_to_text, found.text_to_image))
        # A pair is one number: image * num_texts + text
        wanted = image * num_texts + found.image_to_text.index, found.text_to_image.index * num_texts + text
        pairs = torch.cat([numbers.flatten() for numbers in wanted]).unique()
        matched = self.match(images, texts.input_ids, torch.stack([pairs // num_texts, pairs % num_texts], dim=1))
        scores = (matched[torch.searchsorted(pairs, numbers)] for numbers in wanted)
        rankings = zip((found.image_to_text, found.text_to_image), scores, strict=True)
        return TwoStageRankings(*(_ranked_anew(ranking, added) for ranking, added in rankings))

    @_in_eval_mode
    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        r"""
        Compute what images are compared with.

        Args:
            texts (`list[str]`):
                The texts.

        Returns:
            [`EncodedTexts`]: on the CPU.
        """
        if isinstance(texts, str) or len(texts) == 0:
            raise ValueError(f"A list of texts was expected, at least one; got {texts!r}.")
        input_ids = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=False,
            # A text that spells a special token, such as <image>, is text, as in training
            split_special_tokens=True,
        )["input_ids"]
        self._check_vocabulary(input_ids)
        order = sorted(range(len(input_ids)), key=lambda i: len(input_ids[i]))

        def encode(part: list[int]) -> torch.Tensor:
            ids, mask = self._pad([input_ids[i] for i in part])
            return self.model.get_text_features(ids, mask, return_dict=True).pooler_output.cpu()

        features = self._in_batches(encode, order, "Texts")[torch.tensor(order).argsort()]
        _check_finite(features, "Features of texts")
        return EncodedTexts(input_ids, features)

    @_in_eval_mode
    def encode_images(self, images: torch.Tensor | datasets.Dataset | Sequence[torch.Tensor]) -> torch.Tensor:
        r"""
        Compute what texts are compared with.

        Args:
            images (`torch.Tensor`, `datasets.Dataset` or sequence of `torch.Tensor`):
                The tower's output.

        Returns:
            `torch.FloatTensor` of shape `(num_images, num_query_tokens, image_text_hidden_size)`: on the CPU.
        """
        if len(images) == 0:
            raise ValueError("There are no images.")

        def encode(part: range) -> torch.Tensor:
            embeds = self._read(images, part)
            return self.model.get_image_features(image_embeds=embeds, return_dict=True).pooler_output.cpu()

        features = self._in_batches(encode, range(len(images)), "Images")
        _check_finite(features, "Features of images")
        return features

    @_in_eval_mode
    def compare(
        self, image_features: torch.Tensor, text_features: torch.Tensor, k: int | None = None
    ) -> TwoStageRankings:
        r"""
        Rank by contrast alone.

        Args:
            image_features (`torch.Tensor` of shape `(num_images, num_query_tokens, image_text_hidden_size)`):
                What [`~TwoStageRetrieval.encode_images`] returned.
            text_features (`torch.Tensor` of shape `(num_texts, image_text_hidden_size)`):
                Features of texts.
            k (`int`, *optional*):
                How many of the first are kept, 0 for all; that of the constructor if it is not given.

        Returns:
            [`TwoStageRankings`]: the first `k` of each, by the cosine.
        """
        k = self.k if k is None else k
        return rank_by_contrast(image_features, text_features.to(self.model.device), k, self.batch_size)

    @_in_eval_mode
    def match(
        self,
        images: torch.Tensor | datasets.Dataset | Sequence[torch.Tensor],
        input_ids: list[list[int]],
        pairs: torch.Tensor,
    ) -> torch.Tensor:
        r"""
        Compute the logit of "match" of any pairs, and each image's keys and values once.

        Args:
            images (`torch.Tensor`, `datasets.Dataset` or sequence of `torch.Tensor`):
                The tower's output.
            input_ids (`list[list[int]]`):
                Tokens of the texts.
            pairs (`torch.LongTensor` of shape `(num_pairs, 2)`):
                Numbers of an image and of a text.

        Returns:
            `torch.FloatTensor` of shape `(num_pairs,)`: on the CPU.
        """
        if len(pairs) and (int(pairs.min()) < 0 or int(pairs[:, 0].max()) >= len(images)):
            raise ValueError(f"pairs name images that are not there: 0 to {len(images) - 1} was expected.")
        scores = self._batch_size.fit(functools.partial(self._match, images, input_ids, pairs))
        _check_finite(scores, "Scores of pairs")
        return scores

    def _match(self, images: Any, input_ids: list[list[int]], pairs: torch.Tensor, batch_size: int) -> torch.Tensor:
        scores = torch.empty(len(pairs))
        by_image: dict[int, list[int]] = {}
        texts = pairs[:, 1].tolist()
        for pair, image in enumerate(pairs[:, 0].tolist()):
            by_image.setdefault(image, []).append(pair)
        for own in by_image.values():
            own.sort(key=lambda pair: len(input_ids[texts[pair]]))
        with self._bar(len(pairs), "Pairs", "pair") as bar:
            for group in _groups(by_image, batch_size):
                key_values = self.model.get_image_key_values(self._read(images, group))
                columns = list(zip(*(by_image[image] for image in group), strict=True))
                step = max(1, batch_size // len(group))
                for start in range(0, len(columns), step):
                    # Rows of an image lie next to one another
                    chunk = [pair for row in zip(*columns[start : start + step], strict=True) for pair in row]
                    ids, mask = self._pad([input_ids[texts[pair]] for pair in chunk])
                    logits = self.model.get_matching_logits(ids, mask, image_key_values=key_values)
                    scores[chunk] = logits[:, 1].float().cpu()
                    bar.update(len(chunk))
        return scores

    def _in_batches(self, function: Callable[[Any], torch.Tensor], items: Sequence[int], name: str) -> torch.Tensor:
        parts = []
        with self._bar(len(items), name, name.lower().removesuffix("s")) as bar:
            for part, found in self._batch_size.run(function, items):
                parts.append(found)
                bar.update(len(part))
        return torch.cat(parts)

    def _read(self, images: Any, rows: Sequence[int]) -> torch.Tensor:
        """Return the tower's output of some images, on the model's device."""
        if isinstance(images, torch.Tensor):
            embeds = images[list(rows)]
        elif isinstance(images, datasets.Dataset):
            embeds = torch.stack([read_cached_features(images[row]) for row in rows])
        else:
            embeds = torch.stack([torch.as_tensor(images[row]) for row in rows])
        return embeds.to(self.model.device)

    def _check_vocabulary(self, input_ids: list[list[int]]):
        size, highest = self.model.config.qformer_config.vocab_size, max(max(ids, default=0) for ids in input_ids)
        if highest >= size:
            raise ValueError(
                f"The tokenizer gave the token {highest}, and the Q-Former has a vocabulary of {size}: give the "
                "Q-Former's tokenizer, not that of a language model."
            )

    def _pad(self, input_ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.model.device
        lengths = torch.tensor([len(ids) for ids in input_ids])
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        padded = torch.full(mask.shape, self.model.config.qformer_config.pad_token_id or 0)
        padded[mask] = torch.tensor([token for ids in input_ids for token in ids])
        return padded.to(device), mask.long().to(device)

    def _bar(self, total: int, name: str, unit: str):
        return logging.tqdm(total=total, desc=name, unit=unit, disable=not self.show_progress)


def rank_by_contrast(
    image_features: torch.Tensor, text_features: torch.Tensor, k: int, batch_size: int
) -> TwoStageRankings:
    r"""
    Rank by contrast (section 3.2, ITC), with some of the cosines in memory at a time.

    Args:
        image_features (`torch.Tensor` of shape `(num_images, num_query_tokens, image_text_hidden_size)`):
            Projected queries, of length 1, on any device.
        text_features (`torch.Tensor` of shape `(num_texts, image_text_hidden_size)`):
            Projected [CLS] of the texts, of length 1, on the device that computes.
        k (`int`):
            How many of the first are kept, 0 for all.
        batch_size (`int`):
            Most images that are compared at a time.

    Returns:
        [`TwoStageRankings`]: the first `k` of each, by the cosine, on the CPU.
    """
    num_images, num_texts = len(image_features), len(text_features)
    of_image, of_text = (min(k or count, count) for count in (num_texts, num_images))
    # Cosines of some images at a time. These are no fewer than a text keeps, so that merging costs little
    block = max(of_text, _COSINES // num_texts)
    # Each query of an image has cosines of its own, of which the highest is kept
    batch_size = min(batch_size, max(1, _COSINES // (num_texts * image_features.shape[1])))
    found: list[Ranking] = []
    best = Ranking(torch.empty(num_texts, 0, dtype=torch.long), torch.empty(num_texts, 0, dtype=text_features.dtype))
    for start in range(0, num_images, block):
        chunks = [chunk.to(text_features.device) for chunk in image_features[start : start + block].split(batch_size)]
        similarity = torch.cat([image_text_similarity(chunk, text_features).cpu() for chunk in chunks])
        found.append(_best(similarity, of_image))
        best = _merged(best, _best(similarity.T, of_text), start, of_text)
    index, scores = (torch.cat([getattr(part, name) for part in found]) for name in ("index", "scores"))
    return TwoStageRankings(Ranking(index, scores), best)


def _best(scores: torch.Tensor, count: int) -> Ranking:
    values, index = scores.topk(min(count, scores.shape[1]), dim=1)
    return Ranking(index, values)


def _merged(first: Ranking, second: Ranking, start: int, count: int) -> Ranking:
    """Return the best of two rankings. The numbers of the second begin at `start`."""
    index = torch.cat([first.index, second.index + start], dim=1)
    best = _best(torch.cat([first.scores, second.scores], dim=1), count)
    return Ranking(index.gather(1, best.index), best.scores)


def _check_finite(values: torch.Tensor, what: str):
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"{what} are not finite: let the model compute in bfloat16 or float32, and look at its input."
        )


def _ranked_anew(found: Ranking, matched: torch.Tensor) -> Ranking:
    """Rank by the logit of "match" plus the cosine."""
    scores = found.scores + matched
    order = scores.argsort(dim=1, descending=True, stable=True)
    return Ranking(found.index.gather(1, order), scores.gather(1, order))


def _groups(by_image: dict[int, list[int]], batch_size: int) -> list[list[int]]:
    """Return images that are matched together: they have as many texts each, and no more than a batch in all."""
    groups: list[list[int]] = []
    for image in sorted(by_image, key=lambda image: (len(by_image[image]), image)):
        count = len(by_image[image])
        if groups and len(by_image[groups[-1][0]]) == count and (len(groups[-1]) + 1) * count <= batch_size:
            groups[-1].append(image)
        else:
            groups.append([image])
    return groups


__all__ = ["EncodedTexts", "Ranking", "TwoStageRankings", "TwoStageRetrieval"]
