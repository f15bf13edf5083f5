"""Checks of the inputs of the models, and texts with all padding after them."""

from typing import Any

import torch
from transformers.utils import TransformersKwargs

from .configuration_blip2 import Blip2Config


def check_one_image_input(pixel_values: torch.Tensor | None, image_embeds: torch.Tensor | None):
    """Refuse images that are given in no form or in two."""
    if (pixel_values is None) == (image_embeds is None):
        given = "none" if pixel_values is None else "both"
        raise ValueError(f"Give either pixel_values or image_embeds (the tower's output); {given} of them was given.")


def count_images(pixel_values: torch.Tensor | None, image_embeds: torch.Tensor | None) -> int:
    """
    Return the number of images in `pixel_values` of shape `(..., channels, height, width)` or `image_embeds` of shape
    `(..., features, hidden_size)`. A row of a batch may have several, such as the frames of a video.
    """
    given, of_one = (pixel_values, 3) if image_embeds is None else (image_embeds, 2)
    return given.shape[:-of_one].numel()


def check_options(options: dict[str, Any], takes: str):
    """
    Refuse options that are not those of `TransformersKwargs`, because a model would ignore them. Take out
    `token_type_ids`, which BERT's tokenizer returns with each text, and of which the Q-Former has no embeddings.
    """
    options.pop("token_type_ids", None)
    if unknown := sorted(options.keys() - TransformersKwargs.__annotations__.keys() - {"return_dict"}):
        raise TypeError(
            f"The model was given {', '.join(unknown)}, and takes {takes}. Leave out what it does not know."
        )


def check_attention_mask(
    attention_mask: torch.Tensor | None, text: torch.Tensor, past_length: int = 0, name: str = "the text"
):
    """
    Refuse a mask of another length than the text, because it would cut the text off.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            The mask.
        text (`torch.Tensor` of shape `(batch_size, sequence_length, ...)`):
            Token ids, or embedded text.
        past_length (`int`, *optional*, defaults to 0):
            Length of a cache, which the mask may cover too.
        name (`str`, *optional*, defaults to `"the text"`):
            Name of the text in the error.

    Raises:
        ValueError: if the mask is of another shape.
    """
    if attention_mask is None or attention_mask.dim() == 4:
        return
    expected, given = tuple(text.shape[:2]), tuple(attention_mask.shape)
    if given not in (expected, (expected[0], past_length + expected[1])):
        raise ValueError(
            f"attention_mask of shape {given} for {name} of shape {expected}: the same shape was expected, with 1 at "
            "tokens and 0 at padding. Give the mask that was made with the text, or none."
        )


def pad_right(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, name: str = "input_ids"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same texts with all padding after them, because the Q-Former's positions count tokens."""
    if attention_mask is None:
        return input_ids, torch.ones_like(input_ids)
    check_attention_mask(attention_mask, input_ids, name=name)
    order = attention_mask.eq(0).int().argsort(dim=1, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)


def check_texts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, config: Blip2Config, name: str, min_length: int = 1
):
    """
    Refuse texts that the Q-Former can't read.

    Args:
        input_ids (`torch.LongTensor` of shape `(num_texts, text_length)`):
            Texts, with all padding after them.
        attention_mask (`torch.Tensor` of shape `(num_texts, text_length)`):
            0 at padding.
        config ([`Blip2Config`]):
            Configuration of the model.
        name (`str`):
            The caller's name for `input_ids`.
        min_length (`int`, *optional*, defaults to 1):
            Fewest tokens of a text.

    Raises:
        ValueError: if a text is longer than the Q-Former's positions, has fewer tokens than `min_length` or a token
            beyond the vocabulary, or begins with what looks like placeholders of an image. The message names the row.
    """
    limit, num_queries = config.qformer_config.max_position_embeddings, config.num_query_tokens
    if input_ids.shape[1] > limit:
        raise ValueError(
            f"A text of {name} has {input_ids.shape[1]} tokens, but the Q-Former has {limit} positions. Cut it with "
            f"tokenizer(..., truncation=True, max_length={limit})."
        )
    if torch.compiler.is_compiling():
        # A compiled graph can't branch on values
        return
    lengths = attention_mask.ne(0).sum(dim=1)
    is_short = lengths < min_length
    is_foreign = input_ids.ge(config.qformer_config.vocab_size).any(dim=1)
    is_image = torch.zeros_like(is_short)
    if 2 <= num_queries <= input_ids.shape[1]:
        # A text begins with [CLS], which does not come twice
        is_image = input_ids[:, :num_queries].eq(input_ids[:, :1]).all(dim=1) & (lengths >= num_queries)
    # One check of all values, because each check waits for the device
    if not bool((is_short | is_foreign | is_image).any()):
        return
    row = int((is_short | is_foreign | is_image).int().argmax())
    if bool(is_short[row]):
        raise ValueError(
            f"Row {row} of {name} has {int(lengths[row])} tokens, but at least {min_length} were expected. An empty "
            "text has two, [CLS] and [SEP]. The attention mask has to be 1 at tokens and 0 at padding."
        )
    found = f"the token id {int(input_ids[row].max())}, beyond its vocabulary of {config.qformer_config.vocab_size}"
    if bool(is_image[row]):
        found = f"{num_queries} tokens of id {int(input_ids[row, 0])} in front, which look like those of an image"
    raise ValueError(
        f"Row {row} of {name} is no text of the Q-Former: it has {found}. Give the token ids of the Q-Former's own "
        "tokenizer. If Blip2Processor put placeholders of images into input_ids, set "
        "model.config.image_token_index = processor.image_token_id: they are then left out."
    )


def text_positions(
    input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, attention_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Return positions that count tokens but not padding, as `generate` makes them."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return None
    length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
    return (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)[:, -length:]


def decoder_inputs(language_model: Any, labels: torch.Tensor) -> torch.Tensor:
    """
    Return what the decoder of an encoder-decoder reads to predict labels, of the same shape. Families shift labels in
    ways of their own; those without one begin with `decoder_start_token_id`.
    """
    prepare = getattr(language_model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        return prepare(labels=labels)
    config = language_model.config
    start = config.decoder_start_token_id
    if start is None:
        raise ValueError(
            f"The configuration of {type(language_model).__name__} has no decoder_start_token_id, with which its "
            "decoder begins. Set it."
        )
    shifted = torch.cat([labels.new_full((len(labels), 1), start), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, config.pad_token_id)
