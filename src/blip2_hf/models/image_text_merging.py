"""Merging of image features into the text of a language model."""

from typing import Any

import torch
from torch import nn

from .text_inputs import check_attention_mask


class Blip2ImageTextMergingMixin:
    """Merging of image features and text in [`Blip2ForConditionalGeneration`], and checks that they fit."""

    def _insert_image_features(
        self,
        image_features: torch.Tensor,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Return what [`_place_images`] returns, with the image features in `inputs_embeds`."""
        num_images, image_length = image_features.shape[:2]
        prompt = self._place_images(num_images, image_length, input_ids, attention_mask, inputs_embeds=inputs_embeds)
        return self._fill_in(prompt, image_features)

    def _place_images(
        self,
        num_images: int,
        image_length: int,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_length: int = 0,
    ) -> dict[str, Any]:
        """
        Find the places of images of `image_length` features: at their `<image>` placeholders, or in front of the text
        if there are none. All values are read here, so that this can come before the device has work.

        Returns:
            `dict`: `input_ids` and `inputs_embeds` (`None` if they were not given), `attention_mask` and `labels`, all
            with these places; `is_image`, boolean, of shape `(batch_size, length)`; `num_added`, the number of
            positions that were put in front.
        """
        text: torch.Tensor = input_ids if inputs_embeds is None else inputs_embeds
        if input_ids is not None and input_ids.shape[:2] != text.shape[:2]:
            raise ValueError(
                f"inputs_embeds of shape {tuple(text.shape)} for input_ids of shape {tuple(input_ids.shape)}: one "
                "embedding for each token was expected."
            )
        check_attention_mask(attention_mask, text, past_length)
        if attention_mask is None:
            attention_mask = torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
        is_image, num_added = self._placeholders(input_ids, inputs_embeds), 0
        if is_image is not None:
            self._check_placeholders(is_image, num_images, image_length)
        else:
            num_added = self._num_in_front(num_images, image_length, len(text))
            index = self.config.image_token_index
            # A mask may also cover a cache, which comes first
            num_cached = attention_mask.shape[1] - text.shape[1]
            is_image = _put_in_front(torch.zeros_like(attention_mask[:, num_cached:]).bool(), num_added, True)
            attention_mask = _put_in_front(attention_mask, num_added, 1, num_cached)
            if inputs_embeds is not None:
                inputs_embeds = _put_in_front(inputs_embeds, num_added, 0.0)
            if input_ids is not None:
                input_ids = _put_in_front(input_ids, num_added, -1 if index is None else index)
            if labels is not None and not self.config.is_encoder_decoder:
                labels = _put_in_front(labels, num_added, -100)
        return {
            "inputs_embeds": inputs_embeds,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "is_image": is_image,
            "num_added": num_added,
        }

    def _fill_in(self, prompt: dict[str, Any], image_features: torch.Tensor) -> dict[str, Any]:
        """Embed the text of [`_place_images`], with the image features at their places."""
        is_image, inputs_embeds = prompt["is_image"], prompt["inputs_embeds"]
        if inputs_embeds is None:
            # A placeholder may have no embedding
            inputs_embeds = self.get_input_embeddings()(prompt["input_ids"].masked_fill(is_image, 0))
        if image_features.shape[2] != inputs_embeds.shape[2]:
            raise ValueError(
                f"image_features are {image_features.shape[2]} wide, the language model's embeddings "
                f"{inputs_embeds.shape[2]}: give what get_image_features(...).pooler_output returned."
            )
        attention_mask = prompt["attention_mask"]
        # The feature of each place by its number, because the backward pass of masked_scatter reads the mask. Places
        # before an image have number 0, of zeros
        is_image = is_image.to(inputs_embeds.device)
        image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype).flatten(0, 1)
        image_features = nn.functional.pad(image_features, (0, 0, 1, 0))
        image_features = image_features.index_select(0, is_image.flatten().cumsum(0)).view_as(inputs_embeds)
        inputs_embeds = torch.where(is_image[..., None], image_features, inputs_embeds)
        if self.config.is_encoder_decoder:
            # Positions are relative, and padding between image and text would move them apart
            order = (attention_mask == 0).int().argsort(dim=1, stable=True)
            attention_mask = attention_mask.gather(1, order)
            inputs_embeds = inputs_embeds.gather(1, order[..., None].expand_as(inputs_embeds).to(inputs_embeds.device))
        return prompt | {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask}

    def _num_in_front(self, num_images: int, image_length: int, batch_size: int) -> int:
        """Return the number of positions that the images of each text take in front of it."""
        if num_images % batch_size:
            raise ValueError(
                f"{num_images} images for {batch_size} texts without `<image>` placeholders: the same number for each "
                "text was expected. Let Blip2Processor make input_ids, or give one image for each text."
            )
        return num_images // batch_size * image_length

    def _placeholders(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor | None:
        """Return where the text has `<image>`, boolean, of shape `(batch_size, length)`, or `None` if it has none."""
        index = self.config.image_token_index
        if input_ids is not None:
            is_image = None if index is None else input_ids == index
        else:
            # A tokenizer may have given `<image>` an id beyond the embeddings
            embeddings = self.get_input_embeddings()
            has_embedding = index is not None and index < tuple(embeddings.weight.shape)[0]
            is_image = None
            if has_embedding:
                placeholder = embeddings(torch.tensor(index, device=inputs_embeds.device)).to(inputs_embeds)
                is_image = (inputs_embeds == placeholder).all(dim=-1)
        # A compiled graph can't branch on values: there, Blip2Processor's placeholders are expected
        if is_image is not None and (torch.compiler.is_compiling() or bool(is_image.any())):
            return is_image
        if input_ids is not None:
            self._check_unknown_placeholders(input_ids)
        return None

    def _check_text_without_image(self, input_ids: torch.Tensor):
        index = self.config.image_token_index
        if index is None:
            self._check_unknown_placeholders(input_ids)
        if index is None or torch.compiler.is_compiling() or not bool((input_ids == index).any()):
            return
        raise ValueError(
            f"input_ids have {int((input_ids == index).sum())} `<image>` placeholders (token id {index}), but no "
            "image was given. Give pixel_values, image_embeds or image_features, or a text without `<image>`."
        )

    def _match_labels(self, labels: torch.Tensor | None, input_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Return labels of the shape of `input_ids`, with -100 at placeholders before the text that has labels."""
        if labels is None or input_ids is None or self.config.is_encoder_decoder or labels.shape == input_ids.shape:
            return labels
        front = input_ids[:, : input_ids.shape[1] - labels.shape[1]]
        index = self.config.image_token_index
        if labels.shape[1] > input_ids.shape[1] or index is None or not bool((front == index).all()):
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} for input_ids of shape {tuple(input_ids.shape)}: for a "
                "decoder-only language model, the same shape was expected. Make both with one Blip2Processor call, "
                "whose is_encoder_decoder must be False."
            )
        return torch.cat([labels.new_full(front.shape, -100), labels], dim=1)

    def _check_labels_of_embeddings(self, labels: torch.Tensor, inputs_embeds: torch.Tensor):
        if not self.config.is_encoder_decoder and labels.shape[1] != inputs_embeds.shape[1]:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} for inputs_embeds of shape {tuple(inputs_embeds.shape)}: one "
                "label for each embedding was expected, -100 at images and at tokens that are not learned."
            )

    def _check_unknown_placeholders(self, input_ids: torch.Tensor):
        front = input_ids[:, : self.config.num_query_tokens]
        if torch.compiler.is_compiling() or not 2 <= self.config.num_query_tokens == front.shape[1]:
            return
        if bool((front == front[0, 0]).all()) and int(front[0, 0]) != self.config.pad_token_id:
            raise ValueError(
                f"All texts begin with {front.shape[1]} tokens of id {int(front[0, 0])}, which look like placeholders "
                f"of an image, but config.image_token_index is {self.config.image_token_index}. If a Blip2Processor "
                "made them, set model.config.image_token_index = processor.image_token_id."
            )

    def _check_placeholders(self, is_image: torch.Tensor, num_images: int, image_length: int):
        expected = num_images * image_length
        if torch.compiler.is_compiling():
            torch._assert_async(is_image.sum() == expected, "as many `<image>` placeholders as image features")
            return
        found = int(is_image.sum())
        if found != expected:
            raise ValueError(
                f"The text has {found} `<image>` placeholders (token id {self.config.image_token_index}), but "
                f"{num_images} images give {image_length} features each, {expected} in all. Each image needs one "
                f"`<image>` in the text given to Blip2Processor, whose num_query_tokens must be {image_length}."
            )


def _put_in_front(values: torch.Tensor, count: int, value: float, past: int = 0) -> torch.Tensor:
    """Return `values` of shape `(batch_size, length, ...)` with `count` more positions after the first `past`."""
    front = values.new_full((len(values), count, *values.shape[2:]), value)
    return torch.cat([values[:, :past], front, values[:, past:]], dim=1)
