"""CapFilt over a dataset: file by file, what is there already stays, each process takes its share."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from accelerate import PartialState
from datasets.table import embed_table_storage
from tqdm import tqdm
from transformers.utils import logging

from ..data.rows import check_dataset, stable_hash
from ..jobs.fingerprints import stable_repr
from ..jobs.output import of_first, only_writer, share, tell_share
from ..jobs.picture_inputs import load_shards
from .captioned_pictures import CaptionedPicture, CaptionedPictures
from .captioners import Captioner, ModelCaptioner, PipelineCaptioner, propose_captions
from .filters import CaptionFilter, RetrievalFilter
from .ranking import RankedCaption, kept_captions, rank_captions
from .result import CapFiltCounts, ResultFiles, ShardReport


ADDED = {
    "kept_captions": datasets.List(datasets.Value("string")),
    "candidates": datasets.List(
        {
            "text": datasets.Value("string"),
            "score": datasets.Value("float32"),
            "is_original": datasets.Value("bool"),
        }
    ),
    "capfilt_row": datasets.Value("int64"),
}


def capfilt_dataset(
    dataset: datasets.Dataset,
    captioner: Captioner | None,
    caption_filter: CaptionFilter,
    folder: str | os.PathLike,
    image_column: str = "image",
    text_column: str = "caption",
    keep: int = 2,
    min_score: float | None = None,
    batch_size: int = 16,
    rows_per_shard: int = 1000,
    seed: int = 0,
    num_workers: int = 0,
    overwrite: bool = False,
    allow_urls: bool | Sequence[str] = False,
) -> CapFiltCounts:
    r"""
    Caption and filter a dataset (CapFilt, as in section 3.4): a captioner proposes captions of each picture, a filter
    ranks them together with those that the picture came with, the first `keep` stay. The job may be stopped, or
    killed, and run again: finished files are kept, and the result is the same. In several processes
    (`accelerate launch`, `torchrun`) each takes its share of the files.

    The result is a dataset of Parquet files, `datasets.load_dataset(folder)`, with the columns of `dataset` and

    - `kept_captions` (`list[str]`): what is kept, the best first; [`ImageTextPairs`] with
      `text_column="kept_captions"` draws one of them each time;
    - `candidates` (list of `{"text", "score", "is_original"}`): all that was ranked, the best first;
    - `capfilt_row` (`int`): number of the row in `dataset`.

    Rows whose picture can't be read, or of which no caption is kept, are left out, and listed in `left_out.jsonl`.
    `capfilt.json` says what the result was made with.

    Args:
        dataset (`datasets.Dataset`):
            Rows with a picture or, in its place, the features that [`~data.cache_features`] stored, of which the
            first view is read. They are told from those of another dataset by their number, columns and 32 of them.
        captioner (`Callable`, *optional*):
            [`ModelCaptioner`], [`PipelineCaptioner`], or any function from a list of pictures to a list of captions
            for each. `None` proposes nothing: the filter ranks the existing captions.
        caption_filter (`Callable`):
            [`RetrievalFilter`], or any function of a list of pictures, and a list of captions for each, that returns a
            list of scores for each.
        folder (`str` or `os.PathLike`):
            Where the result goes.
        image_column (`str`, *optional*, defaults to `"image"`):
            Column of the pictures: anything that [`~image_loading.load_image`] takes.
        text_column (`str`, *optional*, defaults to `"caption"`):
            Column of the captions that the pictures came with: texts, or lists of texts.
        keep (`int`, *optional*, defaults to 2):
            How many captions of a picture are kept. The paper keeps 2.
        min_score (`float`, *optional*):
            The lowest score that is kept.
        batch_size (`int`, *optional*, defaults to 16):
            Pictures at a time. What is sampled depends on it.
        rows_per_shard (`int`, *optional*, defaults to 1000):
            Rows of a file: what is computed again after an interruption.
        seed (`int`, *optional*, defaults to 0):
            With the number of a row, seeds what is sampled by PyTorch. A captioner that draws otherwise has to do so
            the same way each time by itself.
        num_workers (`int`, *optional*, defaults to 0):
            Processes that decode pictures.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to delete what is in the folder, and begin anew.
        allow_urls (`bool` or `list[str]`, *optional*, defaults to `False`):
            Which URLs in the rows are fetched: none, with `True` those of public addresses, with a list also those of
            the hosts in it.

    Returns:
        [`CapFiltCounts`].

    Raises:
        ValueError: if the arguments do not fit, if the folder holds captions that were ranked otherwise, or if another
            run is writing to it.
        OSError: if files are gone at the end, as when the folder was deleted meanwhile.

    Example:

    ```python
    >>> captioner = ModelCaptioner(captioning_model, captioning_processor, num_captions=10)
    >>> caption_filter = RetrievalFilter(*load_retrieval_model("stage1"))
    >>> counts = capfilt_dataset(web_pairs, captioner, caption_filter, "filtered")
    >>> counts.originals_kept, counts.originals
    (412, 1000)
    >>> pairs = ImageTextPairs(datasets.load_dataset("filtered", split="train"), text_column="kept_captions")
    ```"""
    check_dataset(dataset, ADDED)
    if min(keep, batch_size, rows_per_shard) < 1:
        raise ValueError(
            f"keep={keep}, batch_size={batch_size}, rows_per_shard={rows_per_shard}: 1 at least was expected of each."
        )
    pictures = CaptionedPictures(dataset, image_column, text_column, allow_urls)
    settings = {
        **pictures.describe(),
        "captioner": _settings_of(captioner),
        "filter": _settings_of(caption_filter),
        "keep": keep,
        "min_score": min_score,
        "batch_size": batch_size,
        "seed": seed,
    }
    features = datasets.Features({**dataset.features, **ADDED})
    files = ResultFiles(Path(folder), features, len(dataset), rows_per_shard, settings)
    ranking = _Ranking(pictures, captioner, caption_filter, keep, min_score, seed, files.schema)
    state = PartialState(cpu=not torch.accelerator.is_available())

    def begin():
        files.check_own()
        if overwrite:
            files.clear()

    with only_writer(files.folder / ".lock", files.folder, state):
        of_first(begin, state)
        _rank_missing(files, ranking, batch_size, num_workers, state)
        return of_first(lambda: files.report().counts, state)


def _rank_missing(files: ResultFiles, ranking: "_Ranking", batch_size: int, num_workers: int, state: PartialState):
    """Write the files that are not there yet, each process a share of them, and make them a dataset."""

    def look() -> list[int]:
        files.check()
        return files.missing()

    missing = of_first(look, state)
    if state.is_main_process:
        files.prepare()
        to_write = f"files to write: {len(missing):,} of {len(files.names):,}"
        tqdm.write(f"{len(ranking.pictures):,} rows, {to_write}{tell_share(state)} ({files.folder})", file=sys.stderr)
    state.wait_for_everyone()
    own = share(missing, state)
    rows = [files.rows[shard] for shard in own]
    read = load_shards(ranking.pictures, rows, batch_size, num_workers, collate_fn=list)
    is_hidden = not state.is_main_process
    with logging.tqdm(total=sum(map(len, rows)), unit="row", desc="CapFilt", disable=is_hidden) as bar:
        for shard, batches in zip(own, read, strict=True):
            report = ShardReport()
            files.write(shard, ranking.tables(batches, report, bar), report)
    state.wait_for_everyone()
    if state.is_main_process:
        tqdm.write(files.finish(), file=sys.stderr)
    state.wait_for_everyone()


def _settings_of(function: Any) -> Any:
    """Return the settings of a captioner or a filter, and of any other function its name."""
    if isinstance(function, (ModelCaptioner, PipelineCaptioner, RetrievalFilter)):
        return function.settings()
    return None if function is None else stable_repr(function)


@dataclass
class _Ranking:
    """Makes tables of rows with their ranked captions."""

    pictures: CaptionedPictures
    captioner: Captioner | None
    caption_filter: CaptionFilter
    keep: int
    min_score: float | None
    seed: int
    schema: pa.Schema

    def tables(self, batches: Iterator[list[CaptionedPicture]], report: ShardReport, bar: Any) -> Iterator[pa.Table]:
        for batch in batches:
            found = []
            for row, ranked in zip(batch, self._rank(batch), strict=True):
                kept = kept_captions(ranked, self.keep, self.min_score)
                report.add_row(row, ranked, len(kept), self.min_score)
                if kept:
                    found.append((kept, [asdict(caption) for caption in ranked], row.name.number))
            if found:
                yield self._table(found)
            bar.update(len(batch))

    def _rank(self, batch: list[CaptionedPicture]) -> list[list[RankedCaption]]:
        readable = [row for row in batch if row.bad is None]
        pictures = [row.picture for row in readable]
        proposals = propose_captions(self.captioner, pictures, stable_hash(f"{self.seed}/{batch[0].name.number}"))
        ranked = iter(rank_captions(self.caption_filter, pictures, [row.originals for row in readable], proposals))
        return [next(ranked) if row.bad is None else [] for row in batch]

    def _table(self, found: list[tuple[list[str], list[dict[str, Any]], int]]) -> pa.Table:
        """Return kept captions, candidates and numbers of rows, behind the columns of these rows."""
        columns = list(zip(*found, strict=True))
        arrays = self.pictures.columns(columns[-1]).combine_chunks().columns
        arrays += [pa.array(x, self.schema.field(name).type) for name, x in zip(ADDED, columns, strict=True)]
        # The result may be moved to where files that rows only name are missing, but URLs are not
        return embed_table_storage(pa.Table.from_arrays(arrays, schema=self.schema), remote_files=False)


__all__ = ["capfilt_dataset"]
