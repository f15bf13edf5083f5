"""Rows to batches."""

from collections.abc import Sequence
from typing import Any

import torch


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
        Args:
            rows (`list[dict]`):
                Items with `image` or `image_embeds`, `text` and `image_id`.

        Returns:
            `dict[str, torch.Tensor]`: `pixel_values` of shape `(batch_size, channels, height, width)`, or
            `image_embeds` of shape `(batch_size, features, width)` in the type that was stored; `input_ids` and
            `attention_mask` of shape `(batch_size, length)`; `image_ids` of shape `(batch_size,)`. The last three are
            `int64`.

        Raises:
            ValueError: if rows lack something, or mix pictures and features, or features differ in shape or type.
        """
        batch = self._images(rows)
        missing = [name for name in ("text", "image_id") if any(name not in row for row in rows)]
        if missing:
            raise ValueError(f"Rows without {missing[0]!r}. {_EXPECTED}")
        texts = self.processor.tokenizer(
            [row["text"] for row in rows],
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,
            return_token_type_ids=False,
            # A caption that spells a special token, such as <image>, has no say
            split_special_tokens=True,
            return_tensors="pt",
        )
        image_ids = torch.tensor([row["image_id"] for row in rows], dtype=torch.int64)
        return {**batch, **texts, "image_ids": image_ids}

    def _images(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        with_features = sum("image_embeds" in row for row in rows)
        if with_features == 0:
            if any("image" not in row for row in rows):
                raise ValueError(f"Rows without 'image' and 'image_embeds'. {_EXPECTED}")
            pictures = self.processor.image_processor(images=[row["image"] for row in rows], return_tensors="pt")
            return {"pixel_values": pictures["pixel_values"]}
        if with_features < len(rows):
            raise ValueError(
                f"{with_features} of the {len(rows)} rows of a batch have features, the others pictures. Store the "
                "features of all, with cache_features, or of none."
            )
        features = [row["image_embeds"] for row in rows]
        kinds = {(tuple(f.shape), str(f.dtype)) for f in features}
        if len(kinds) > 1:
            found = ", ".join(f"{list(shape)} {dtype}" for shape, dtype in sorted(kinds))
            raise ValueError(f"The features of a batch differ ({found}). One tower, size and dtype have to make all.")
        return {"image_embeds": torch.stack(features)}


_EXPECTED = (
    "Items of ImageTextPairs or ImageTextStream were expected; in Trainer, set remove_unused_columns=False, or it "
    "takes what the model does not name out of them."
)
