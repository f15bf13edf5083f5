"""A folder of pictures that is searched: by contrast (ITC), re-ranked by matching (ITM), as in section 4.4."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.utils import logging

from ..jobs.batch_size import BatchSize
from ..jobs.output import only_writer
from ..jobs.picture_inputs import PictureInputs, collate_pictures
from ..models.image_loading import check_reads_8_bit, load_image_for
from ..models.losses import image_text_similarity
from ..models.modeling_image_text import Blip2ImageTextPreTrainedModel
from ..retrieval.loading import check_same_model, describe_model, model_and_processor
from .approximate import ApproximateIndex, import_faiss
from .store import DESCRIPTION, LOCK, Store, check_is_free, create_store, read_description
from .update import Updater, find_pictures


logger = logging.get_logger(__name__)

DEFAULT_NAME = ".blip2-index"  # of the folder of an index, inside that of the pictures

_MAX_TEXT_LENGTH = 35  # tokens, as in the authors' evaluation
_BATCH_SIZE = 32  # pictures that are matched at a time


class SearchResult(NamedTuple):
    r"""
    A picture that was found.

    Args:
        path (`Path`):
            Its file.
        score (`float`):
            The cosine of contrast or, re-ranked, the logit of "match" plus the cosine.
    """

    path: Path
    score: float


class SearchIndex:
    r"""
    Find pictures of a folder by text, or by another picture. Make it with [`SearchIndex.build`] or
    [`SearchIndex.open`].

    Args:
        directory (`str` or `os.PathLike`):
            The folder of the index.
        model ([`Blip2ForImageTextRetrieval`] or [`Blip2ForPreTraining`]):
            The model that it was built with. It computes on the device that it is on.
        processor ([`Blip2Processor`]):
            Its processor, with the Q-Former's tokenizer.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars, and to say what is done.

    Raises:
        ValueError: if it was built with another model.

    Example:

    ```python
    >>> from blip2_hf.search import SearchIndex

    >>> index = SearchIndex.build("holidays", model="Salesforce/blip2-itm-vit-g")
    >>> for path, score in index.search("a red bus", top=5, rerank=50):
    ...     print(f"{score:.3f} {path}")
    ```"""

    def __init__(
        self,
        directory: str | os.PathLike,
        model: Blip2ImageTextPreTrainedModel,
        processor: Any,
        show_progress: bool = True,
    ):
        self.directory = Path(directory)
        self.model = model.eval()
        self.image_processor = processor.image_processor
        self.tokenizer = processor.qformer_tokenizer or processor.tokenizer
        self.show_progress = show_progress
        self._store = Store(self.directory)
        self._approximate = ApproximateIndex(self._store)
        # Resolved first: ".." leads elsewhere from a link
        self.folder = Path(os.path.normpath(self.directory.resolve() / self._store.description["folder"]))
        check_same_model(self.directory, self._store.description, describe_model(model, self.image_processor))

    def __len__(self) -> int:
        return len(self._store.rows)

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike,
        model: str | os.PathLike | Blip2ImageTextPreTrainedModel | None = None,
        processor: Any = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        show_progress: bool = True,
    ) -> "SearchIndex":
        r"""
        Open an index.

        Args:
            directory (`str` or `os.PathLike`):
                Its folder, or that of the pictures.
            model (`str`, `os.PathLike` or [`Blip2ForImageTextRetrieval`], *optional*):
                The model that it was built with: loaded, or what [`load_retrieval_model`] takes. Without it, the model
                is loaded from where it was then.
            processor ([`Blip2Processor`], *optional*):
                Goes with a model that is loaded.
            device (`str` or `torch.device`, *optional*), dtype (`str` or `torch.dtype`, *optional*):
                Those of [`load_retrieval_model`].
            show_progress (`bool`, *optional*, defaults to `True`):
                Whether to show progress bars.

        Returns:
            [`SearchIndex`].

        Raises:
            FileNotFoundError: if there is no index.
            ValueError: if it was built with another model.
        """
        directory = Path(directory)
        if not (directory / DESCRIPTION).exists() and (directory / DEFAULT_NAME / DESCRIPTION).exists():
            directory = directory / DEFAULT_NAME
        name = read_description(directory)["model"]
        model, processor = model_and_processor(model if model is not None else name, processor, device, dtype)
        return cls(directory, model, processor, show_progress)

    @classmethod
    def build(
        cls,
        folder: str | os.PathLike,
        model: str | os.PathLike | Blip2ImageTextPreTrainedModel | None = None,
        processor: Any = None,
        directory: str | os.PathLike | None = None,
        store_embeds: bool = False,
        approximate: bool | None = None,
        rebuild: bool = False,
        batch_size: int = 32,
        rows_per_shard: int = 500,
        num_workers: int = 0,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        show_progress: bool = True,
    ) -> "SearchIndex":
        r"""
        Make an index of a folder of pictures and of the folders in it, or bring it up to date: new and changed
        pictures are computed, those that are gone are dropped. It can be stopped and run again. A second run on the
        same index is refused while the first one lasts.

        Files and folders whose name begins with a dot are passed over. Pictures that can't be read are listed in
        `broken.json`, and tried again when they have changed.

        Args:
            folder (`str` or `os.PathLike`):
                The pictures.
            model (`str`, `os.PathLike` or [`Blip2ForImageTextRetrieval`], *optional*):
                Loaded, or what [`load_retrieval_model`] takes. Without it, that of the index.
            processor ([`Blip2Processor`], *optional*):
                Goes with a model that is loaded.
            directory (`str` or `os.PathLike`, *optional*):
                Where the index lies. Without it, `.blip2-index` inside `folder`.
            store_embeds (`bool`, *optional*, defaults to `False`):
                Whether to store the tower's output, in float16, so that re-ranking need not run the tower. An index
                that has it goes on with it.
            approximate (`bool`, *optional*):
                Whether to make an approximate index, with faiss. Without it, one is made from 100,000 pictures on, and
                one that is there is kept up to date.
            rebuild (`bool`, *optional*, defaults to `False`):
                Whether to begin anew. After an interruption, go on without it.
            batch_size (`int`, *optional*, defaults to 32):
                How many pictures the model takes at a time.
            rows_per_shard (`int`, *optional*, defaults to 500):
                Pictures of a file: what is computed again after an interruption.
            num_workers (`int`, *optional*, defaults to 0):
                Processes that load pictures while the model runs.
            device (`str` or `torch.device`, *optional*), dtype (`str` or `torch.dtype`, *optional*):
                Those of [`load_retrieval_model`].
            show_progress (`bool`, *optional*, defaults to `True`):
                Whether to show progress bars, and to say what is done.

        Returns:
            [`SearchIndex`].

        Raises:
            ValueError: if there are no pictures, if the index was built with another model, or if another run is
                writing to it.
            ImportError: if `approximate=True` and faiss is not installed.
            OSError: if the disk has too little space, or files of the index are gone at the end.
        """
        folder = Path(folder)
        directory = folder / DEFAULT_NAME if directory is None else Path(directory)
        if batch_size < 1 or rows_per_shard < 1:
            raise ValueError(f"batch_size={batch_size}, rows_per_shard={rows_per_shard}: both are at least 1.")
        if approximate:
            import_faiss()
        found = find_pictures(folder, directory)
        if model is None:
            model = read_description(directory)["model"]
        model, processor = model_and_processor(model, processor, device, dtype)
        check_reads_8_bit(processor.image_processor)
        check_is_free(directory)
        with only_writer(directory / LOCK, directory):
            if rebuild or not (directory / DESCRIPTION).exists():
                description = _describe_index(directory, folder, model, processor.image_processor, store_embeds)
                create_store(directory, description)
            index = cls(directory, model, processor, show_progress)
            index._check_options(folder, store_embeds)
            parts = index._store, index.folder, index.model, index.image_processor
            Updater(*parts, BatchSize(batch_size), rows_per_shard, num_workers, show_progress).update(found)
            index._approximate.update(approximate, show_progress)
        return index

    def broken(self) -> dict[str, str]:
        """Return why pictures could not be read, by their path inside the folder."""
        return {path: reason for path, (_, _, reason) in self._store.read_broken().items()}

    @torch.inference_mode()
    def search(
        self,
        text: str | None = None,
        image: Any = None,
        top: int = 12,
        rerank: int = 0,
        exact: bool = False,
    ) -> list[SearchResult]:
        r"""
        Find pictures, by a text or by a picture. The score of a picture is the highest of the cosines of its queries
        with the text or, with a picture, the mean of that over the queries of the picture.

        Args:
            text (`str`, *optional*):
                What to look for.
            image (*optional*):
                In its place: a picture, of any kind that [`~image_loading.load_image`] takes.
            top (`int`, *optional*, defaults to 12):
                How many pictures to find.
            rerank (`int`, *optional*, defaults to 0):
                How many of the first are matched with the text, and ranked by the logit of "match" plus the cosine.
                The paper has 128.
            exact (`bool`, *optional*, defaults to `False`):
                Whether to compare with all pictures even if there is an approximate index.

        Returns:
            `list[SearchResult]`: the best first; fewer than `top` if there are not as many.

        Raises:
            ValueError: if not one of `text` and `image` is given, or the numbers do not fit.
            ImageLoadError: if `image` can't be read.
        """
        if (text is None) == (image is None):
            raise ValueError("Give either a text or an image to search for.")
        if top < 1 or rerank < 0:
            raise ValueError(f"top={top}, rerank={rerank}: top is at least 1, rerank at least 0.")
        if rerank and image is not None:
            raise ValueError("rerank goes with a text: an image is not matched with images.")
        if 0 < rerank < top:
            raise ValueError(
                f"rerank={rerank} with top={top}: rerank (--rerank) as many as are to be found (--top), or more."
            )
        tokens = None if text is None else self._tokens(text)
        queries = self._image_queries(image) if tokens is None else self.model.get_text_features(*tokens).pooler_output
        rows, scores = self._compare(queries, max(top, rerank), exact)
        if rerank:
            rows, scores = self._rerank(rows, scores, *tokens)
        found = [
            SearchResult(self.folder / self._store.name(shard, row), score)
            for (shard, row), score in zip(rows.tolist(), scores.tolist(), strict=True)
        ]
        return sorted(found, key=lambda result: (-result.score, result.path))[:top]

    def _tokens(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        if not text.strip():
            raise ValueError("The text to search for is empty.")
        kwargs = {"truncation": True, "max_length": _MAX_TEXT_LENGTH, "split_special_tokens": True}
        tokens = self.tokenizer(text, **kwargs, return_tensors="pt").to(self.model.device)
        vocab_size = self.model.config.qformer_config.vocab_size
        if int(tokens["input_ids"].max()) >= vocab_size:
            raise ValueError(
                f"The tokenizer has tokens beyond the {vocab_size} of the Q-Former. Give a processor with the "
                "Q-Former's tokenizer, not with a language model's."
            )
        return tokens["input_ids"], tokens["attention_mask"]

    def _image_queries(self, image: Any) -> torch.Tensor:
        picture = load_image_for(self.image_processor, image)
        pixel_values = self.image_processor(images=[picture], return_tensors="pt")["pixel_values"]
        return self.model.get_image_features(pixel_values.to(self.model.device)).pooler_output[0]

    def _compare(self, queries: torch.Tensor, count: int, exact: bool) -> tuple[np.ndarray, torch.Tensor]:
        """Return the shard and the row of the best `count` pictures, and their scores."""
        candidates = None if exact else self._approximate.propose(queries, count)
        rows = (self._store.rows if candidates is None else self._store.rows[candidates])[:, 1:]
        if not len(rows):
            return rows, torch.empty(0)
        shards, starts = np.unique(rows[:, 0], return_index=True)
        parts = zip(shards.tolist(), starts.tolist(), np.split(rows[:, 1], starts[1:]), strict=True)
        # Made first: a small tensor for each shard would lie between the large ones, whose memory could not be reused
        scores = torch.empty(len(rows), device=queries.device)
        for shard, start, own in parts:
            features = torch.from_numpy(self._store.read("features", shard, own)).to(queries.device).float()
            # The mean over the queries of the highest cosine of each with those of a picture
            scores[start : start + len(own)] = image_text_similarity(features, queries).mean(dim=1)
        best = scores.topk(min(count, len(rows)))
        return rows[best.indices.cpu().numpy()], best.values.cpu()

    def _rerank(
        self, rows: np.ndarray, scores: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[np.ndarray, torch.Tensor]:
        """Return the rows whose picture is still there, and as scores the logit of "match" plus the cosine."""
        kept: list[int] = []
        logits = [torch.empty(0)]
        starts = range(0, len(rows), _BATCH_SIZE)
        for start in logging.tqdm(starts, desc="Re-ranking", unit="batch", disable=not self.show_progress):
            readable, image_embeds = self._embeds(rows[start : start + _BATCH_SIZE])
            if image_embeds is not None:
                pairs = [tokens.expand(len(readable), -1) for tokens in (input_ids, attention_mask)]
                logits.append(self.model.get_matching_logits(*pairs, image_embeds=image_embeds)[:, 1].float().cpu())
                kept += [start + i for i in readable]
        return rows[kept], scores[kept] + torch.cat(logits)

    def _embeds(self, rows: np.ndarray) -> tuple[Sequence[int], torch.Tensor | None]:
        """Return which of some rows can be read, and the tower's output for them."""
        if self._store.has_embeds:
            stored = np.concatenate([self._store.read("embeds", shard, [row]) for shard, row in rows.tolist()])
            dtype = next(self.model.qformer.parameters()).dtype
            return range(len(rows)), torch.from_numpy(stored).to(self.model.device, dtype)
        paths = [self.folder / self._store.name(shard, row) for shard, row in rows.tolist()]
        pictures = PictureInputs(paths, self.image_processor)
        with ThreadPoolExecutor() as pool:
            batch = collate_pictures(list(pool.map(pictures.__getitem__, range(len(paths)))))
        for reason in batch.errors.values():
            logger.warning(f"Left out: {reason}")
        if batch.pixel_values is None:
            return [], None
        return batch.readable, self.model.get_image_embeds(batch.pixel_values.to(self.model.device))

    def _check_options(self, folder: Path, store_embeds: bool):
        if self.folder.resolve() != folder.resolve():
            raise ValueError(
                f"{self.directory} is an index of {self.folder}, not of {folder}. Give another folder for the index."
            )
        if store_embeds and not self._store.has_embeds:
            raise ValueError(
                f"{self.directory} was built without the tower's output. Leave out store_embeds (--store-embeds), or "
                "begin anew with rebuild=True (--rebuild)."
            )


def _describe_index(
    directory: Path, folder: Path, model: Blip2ImageTextPreTrainedModel, image_processor: Any, store_embeds: bool
) -> dict[str, Any]:
    inside, root = directory.resolve(), folder.resolve()
    name = model.name_or_path
    return {
        # Pictures and index can be moved together
        "folder": os.path.relpath(root, inside) if inside.is_relative_to(root) else str(root),
        "model": str(Path(name).resolve()) if name and Path(name).is_dir() else name,
        "store_embeds": store_embeds,
        **describe_model(model, image_processor),
    }


__all__ = ["SearchIndex", "SearchResult"]
