"""
Gradient caching: stage 1 on a contrastive batch that is larger than memory (arXiv 2101.06983).

It is not one loop with `Blip2ForPreTraining._losses`, because there both passes share keys and values, which would be
kept in memory here.
"""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .losses import image_grounded_text_generation_loss


class GradientCachingMixin:
    """Losses of [`Blip2ForPreTraining`] with a graph for some pairs at a time."""

    gradient_caching_chunk_size: int | None = None

    def gradient_caching_enable(self, chunk_size: int):
        r"""
        Let a contrastive batch be larger than memory. The features of all pairs are computed without a graph. The
        graph is computed in the backward pass, chunk by chunk. Losses and gradients are those of the whole batch.

        Args:
            chunk_size (`int`):
                Number of pairs that have a graph at the same time.

        Raises:
            ValueError: if `chunk_size` is less than 1.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}: a number of pairs, at least 1, was expected.")
        self.gradient_caching_chunk_size = chunk_size

    def gradient_caching_disable(self):
        """Undo [`~Blip2ForPreTraining.gradient_caching_enable`]."""
        self.gradient_caching_chunk_size = None

    def _chunks(self, num_pairs: int) -> list[slice]:
        """Return the rows that have a graph at the same time."""
        size = self.gradient_caching_chunk_size or num_pairs
        return [slice(start, start + size) for start in range(0, num_pairs, size)]

    def _image_embeds_by_chunks(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool) -> torch.Tensor:
        run = partial(self.get_image_embeds, interpolate_pos_encoding=interpolate_pos_encoding)
        if self.gradient_caching_chunk_size is None:
            return run(pixel_values)
        chunks = pixel_values.split(self.gradient_caching_chunk_size)
        return torch.cat([checkpoint(run, chunk, use_reentrant=False) for chunk in chunks])

    def _losses_by_chunks(
        self, batch, image_embeds, input_ids, attention_mask, label_positions, is_match, **kwargs
    ) -> dict[str, Any]:
        """Compute what `_losses` computes, with the passes of each chunk under a checkpoint."""
        run = partial(checkpoint, use_reentrant=False)
        chunks = self._chunks(len(input_ids))

        def encode(image_embeds, input_ids, attention_mask, row, position):
            texts = self._embed_texts(input_ids, attention_mask, row, position)
            images = self.get_image_key_values(image_embeds)
            image_features, text_features, itg_logits, _ = self._first_pass(images, texts)
            # Over 1, so a sum: it is divided by the labels of all chunks
            loss_sum = image_grounded_text_generation_loss(itg_logits, texts.labels, num_items=1)
            return image_features, text_features, loss_sum

        encoded = [
            run(encode, image_embeds[rows], input_ids[rows], attention_mask[rows], *positions)
            for rows, positions in zip(chunks, label_positions, strict=True)
        ]
        image_features, text_features = (torch.cat([chunk[i] for chunk in encoded]) for i in (0, 1))
        compared = self._compare(batch, image_features, text_features)
        negatives = self._draw_negatives(compared, is_match)
        drawn_embeds, image_index = image_embeds, negatives["negative_image_index"]
        if batch.world_size > 1:
            drawn, image_index = image_index.unique(return_inverse=True)
            drawn_embeds = batch.fetch(image_embeds, drawn)
        all_ids, all_masks = self._gather_texts(batch, input_ids, attention_mask)
        negative_ids, negative_mask = (tensor[negatives["negative_text_index"]] for tensor in (all_ids, all_masks))

        def match(image_embeds, drawn_embeds, rows):
            # Selected inside, because the inputs of a checkpoint are kept in memory
            negative_embeds = drawn_embeds[image_index[rows]]
            images, negative_images = (
                self.get_image_key_values(embeds) for embeds in (image_embeds[rows], negative_embeds)
            )
            texts, negative_texts = (self.embeddings(input_ids=ids[rows]) for ids in (input_ids, negative_ids))
            masks = attention_mask[rows], negative_mask[rows]
            return self._second_pass(images, negative_images, texts, masks[0], negative_texts, masks[1])

        # Each chunk has three thirds (pairs, negative images, negative texts), which are joined third by third
        matched = [run(match, image_embeds, drawn_embeds, rows).chunk(3) for rows in chunks]
        itm_logits = torch.cat([chunk[third] for third in range(3) for chunk in matched])
        num_items = batch.mean_share(attention_mask[:, 1:].ne(0).sum())
        return {
            "loss_itg": sum(chunk[2] for chunk in encoded) / num_items,
            **self._pair_losses(batch, compared, itm_logits, is_match),
            **compared,
            **negatives,
        }
