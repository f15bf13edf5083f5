"""Collators, which make batches of rows."""

from collections.abc import Sequence
from typing import Any

import torch

from ..jobs.errors import shorten
from ..models.image_loading import check_reads_8_bit
from .bad_rows import NOTHING_TO_LEARN, TEXT_TOO_LONG, BadRowError


class ImageTextCollator:
    r"""
    Makes a batch for [`Blip2ForPreTraining`] of the items of [`ImageTextPairs`] or [`ImageTextStream`]. Texts, cleaned
    already, are padded on the right to the longest of the batch.

    Args:
        processor ([`Blip2Processor`]):
            Any processor with an `image_processor` and a `tokenizer`, which is the Q-Former's.
        max_length (`int`, *optional*, defaults to 32):
            Most tokens of a text, with [CLS] and [SEP]; what is cut is the end of the text.

    Example:

    ```python
    >>> collator = ImageTextCollator(processor)
    >>> loader = DataLoader(pairs, batch_size=64, collate_fn=collator)
    ```"""

    def __init__(self, processor: Any, max_length: int = 32):
        self.processor = processor
        self.max_length = max_length

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        r"""
        Make a batch.

        Args:
            rows (`list[dict]`):
                Items with `image` or `image_embeds`, `text` and `image_id`.

        Returns:
            `dict[str, torch.Tensor]`: `pixel_values` of shape `(batch_size, channels, height, width)`, or
            `image_embeds` of shape `(batch_size, features, width)` in the stored dtype; `input_ids` and
            `attention_mask` of shape `(batch_size, length)`; `image_ids` of shape `(batch_size,)`. The last three are
            `int64`.

        Raises:
            ValueError: if rows lack a field, or mix images and features, or features differ in shape or dtype, or
                the image processor expects floats in [0, 1] (`do_rescale=False`).
        """
        batch = _stack_images(rows, self.processor)
        _check_names(rows, "text", "image_id")
        if any(_num_frames(row) is not None for row in rows):
            raise ValueError("Videos go with a language model, and no frames are compared with texts. Give pictures.")
        texts = self.processor.tokenizer(
            [row["text"] for row in rows],
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,
            return_token_type_ids=False,
            # A caption that spells a special token, such as <image>, is text
            split_special_tokens=True,
            return_tensors="pt",
        )
        image_ids = torch.tensor([row["image_id"] for row in rows], dtype=torch.int64)
        return {**batch, **texts, "image_ids": image_ids}


class LanguageModelCollator:
    r"""
    Makes a batch for [`Blip2ForConditionalGeneration`] of the items of [`ImageTextPairs`] or [`ImageTextStream`]. The
    image, or the frames of a video, stand in front of the prompt, `text` after it, with the end token. Prompts and
    images have the label -100.

    A prompt or text that spells a special token, such as `<image>` or `</s>`, is text.

    Args:
        processor ([`Blip2Processor`]):
            The model's. If it has a `qformer_tokenizer`, the Q-Former reads the prompt too.
        max_length (`int`, *optional*):
            Most tokens of prompt and text together, or of each for an encoder-decoder; images are not counted. The end
            of the text is cut, never the end token. `None` cuts nothing.
        max_positions (`int`, *optional*):
            Positions of the language model, for queries (if `processor.num_query_tokens` is set), prompt and text. A
            row that needs more is an error. `None`, for models without such a limit, checks nothing.
        max_qformer_positions (`int`, *optional*):
            Positions of a Q-Former that reads the prompt, for its tokens alone: queries take none. A row that needs
            more is an error. `None` checks nothing.

    Example:

    ```python
    >>> pairs = ImageTextPairs(dataset, text_column="answers", prompt="Question: {} Answer:", prompt_column="question")
    >>> collator = LanguageModelCollator(processor, max_positions=model.config.text_config.max_position_embeddings)
    >>> loss = model(**collator([pairs[0], pairs[1]])).loss
    ```"""

    def __init__(
        self,
        processor: Any,
        max_length: int | None = None,
        max_positions: int | None = None,
        max_qformer_positions: int | None = None,
    ):
        self.processor = processor
        self.max_length = max_length
        self.max_positions = max_positions
        self.max_qformer_positions = max_qformer_positions

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        r"""
        Make a batch.

        Args:
            rows (`list[dict]`):
                Items with `image` or `image_embeds`, `text` and, if there are any, `prompt` and `row`, by
                which errors name them.

        Returns:
            `dict[str, torch.Tensor]`: `pixel_values` of shape `(batch_size, channels, height, width)`, or
            `image_embeds` of shape `(batch_size, features, width)` in the stored dtype, both with an axis of frames
            after the first if the rows have videos; `input_ids` and `attention_mask` of shape `(batch_size, length)`;
            `labels` of the same shape or, for an encoder-decoder, of shape `(batch_size, target_length)`;
            `qformer_input_ids` and `qformer_attention_mask` of shape `(batch_size, instruction_length)`, if the
            Q-Former reads text.

        Raises:
            BadRowError: if a row needs more positions than there are, or is cut until nothing is left to learn.
            ValueError: if rows lack a field, or mix images and features, or features differ in shape or dtype, or
                the image processor expects floats in [0, 1] (`do_rescale=False`).
        """
        return _stack_images(rows, self.processor) | self._encode_texts(rows)

    def check(self, row: dict[str, Any]):
        r"""
        Refuse a row of which no batch can be made. Its image is not looked at.

        Args:
            row (`dict`):
                An item with `text` and, if there is one, `prompt`.

        Raises:
            BadRowError: if it needs more positions than there are, or is cut until nothing is left to learn.
        """
        self._encode_texts([row])

    def _encode_texts(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        _check_names(rows, "text")
        text_kwargs: dict[str, Any] = {"split_special_tokens": True}
        if self.max_length is not None:
            text_kwargs |= {"truncation": True, "max_length": self.max_length}
        batch = self.processor(
            text=[self._with_placeholders(row.get("prompt", ""), _num_frames(row) or 1) for row in rows],
            text_target=[row["text"] for row in rows],
            text_kwargs=text_kwargs,
            return_tensors="pt",
        )
        self._check_lengths(rows, batch)
        return dict(batch)

    def _with_placeholders(self, prompt: str, count: int) -> str:
        """Return the prompt with the marks of its images in front, because stored features have placeholders too."""
        token = self.processor.image_token
        # The processor would take a mark inside the prompt for the place of an image
        prompt = prompt.replace(token, f"{token[0]} {token[1:]}")
        return prompt if self.processor.num_query_tokens is None else token * count + prompt

    def _check_lengths(self, rows: Sequence[dict[str, Any]], batch: dict[str, torch.Tensor]):
        num_labels = (batch["labels"] != -100).sum(dim=1)
        positions = batch["attention_mask"].sum(dim=1)
        if self.processor.is_encoder_decoder:
            positions = torch.maximum(positions, num_labels)
        prompt_lengths = batch.get("qformer_attention_mask", torch.zeros_like(batch["attention_mask"])).sum(dim=1)
        lengths = torch.stack([positions, num_labels, prompt_lengths], dim=1).tolist()
        for i, (row, (length, count, prompt_length)) in enumerate(zip(rows, lengths, strict=True)):
            problem, kind = None, TEXT_TOO_LONG
            if self.max_qformer_positions is not None and prompt_length > self.max_qformer_positions:
                problem = (
                    f"has a prompt of {prompt_length} tokens, but the Q-Former has {self.max_qformer_positions} "
                    "positions. Give a max_length of at most that, to cut long prompts"
                )
            elif self.max_positions is not None and length > self.max_positions:
                problem = (
                    f"takes {length} positions, but the model has {self.max_positions}. Give a smaller max_length "
                    "than that, to cut long texts"
                )
            elif count <= 1:  # the end token
                kind = NOTHING_TO_LEARN
                problem = (
                    f"has nothing left to learn: max_length={self.max_length} cuts all of its text, "
                    f"{shorten(row['text'])}, after the prompt {shorten(row.get('prompt', ''))}. Allow more"
                )
            if problem is not None:
                name = row.get("row", f"row {i} of the batch")
                raise BadRowError(
                    f"{name} {problem}, or leave the row out: check_pairs finds all such rows.", name, kind
                )


def _stack_images(rows: Sequence[dict[str, Any]], processor: Any) -> dict[str, torch.Tensor]:
    """Return `pixel_values` or `image_embeds` of a batch."""
    with_features = sum("image_embeds" in row for row in rows)
    if with_features == 0:
        if any("image" not in row for row in rows):
            raise ValueError(f"Some rows have neither 'image' nor 'image_embeds'. {_EXPECTED}")
        check_reads_8_bit(processor.image_processor)
        counts = {_num_frames(row) for row in rows}
        if len(counts) > 1:
            found = ", ".join("a picture" if count is None else f"{count} frames" for count in counts)
            raise ValueError(
                f"Rows of a batch have {found}. Give pictures and videos as two datasets, and all videos the same "
                "num_frames."
            )
        images = [image for row in rows for image in (row["image"] if None not in counts else [row["image"]])]
        pixel_values = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values if None in counts else pixel_values.unflatten(0, (len(rows), -1))}
    if with_features < len(rows):
        raise ValueError(
            f"{with_features} of the {len(rows)} rows of a batch have features, the others images. Store the features "
            "of all rows with cache_features, or of none."
        )
    features = [row["image_embeds"] for row in rows]
    kinds = {(tuple(f.shape), str(f.dtype)) for f in features}
    if len(kinds) > 1:
        found = ", ".join(f"{list(shape)} {dtype}" for shape, dtype in sorted(kinds))
        raise ValueError(f"The features of a batch differ ({found}). Make all with the same tower, size and dtype.")
    return {"image_embeds": torch.stack(features)}


def _num_frames(row: dict[str, Any]) -> int | None:
    """Return the number of frames if a row has a video, or features of one."""
    if (features := row.get("image_embeds")) is not None:
        return len(features) if features.dim() == 3 else None
    image = row.get("image")
    return len(image) if isinstance(image, list) else None


def _check_names(rows: Sequence[dict[str, Any]], *names: str):
    missing = [name for name in names if any(name not in row for row in rows)]
    if missing:
        raise ValueError(f"Some rows have no {missing[0]!r}. {_EXPECTED}")


_EXPECTED = (
    "Items of ImageTextPairs or ImageTextStream were expected. In Trainer, set remove_unused_columns=False, or it "
    "removes fields that the model does not name."
)
