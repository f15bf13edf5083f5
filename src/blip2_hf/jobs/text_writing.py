"""Texts that a model writes from prompts about pictures and videos, or chooses from given ones."""

from collections.abc import Sequence
from typing import Any

import torch


def write_texts(
    model: Any, processor: Any, generate_kwargs: dict[str, Any], prompts: list[str], pictures: Sequence[torch.Tensor]
) -> list[str]:
    """
    Return a text for each prompt and picture. A picture has the shape `(channels, height, width)`, and a video
    `(num_frames, channels, height, width)`. A picture that stands several times goes through the tower and the
    Q-Former once.
    """
    inputs = _inputs(model, processor, prompts, pictures)
    tokens = model.generate(**inputs, **generate_kwargs)
    return processor.post_process_image_text_to_text(tokens, input_ids=inputs["input_ids"])


def choose_texts(
    model: Any,
    processor: Any,
    candidates: Sequence[str] | Sequence[Sequence[str]],
    normalization: str,
    prompts: list[str],
    pictures: Sequence[torch.Tensor],
) -> list[list[float]]:
    """
    Return the probabilities of candidates among each other, for each prompt and picture. `candidates` are those of all
    prompts, or a list for each. Pictures are read as in [`write_texts`].
    """
    inputs = _inputs(model, processor, prompts, pictures, candidates=candidates)
    scores = model.score_texts(**inputs, normalization=normalization)
    return scores.softmax(dim=-1).tolist()


def _inputs(model: Any, processor: Any, prompts: list[str], pictures: Sequence[torch.Tensor], **kwargs) -> Any:
    inputs = processor(text=prompts, return_tensors="pt", **kwargs).to(model.device)
    if processor.qformer_tokenizer is not None:
        # The Q-Former reads the question: each has features of its own
        inputs["pixel_values"] = _stack(pictures, model)
    else:
        distinct = {id(picture): picture for picture in pictures}
        row = {key: number for number, key in enumerate(distinct)}
        features = model.get_image_features(_stack(list(distinct.values()), model)).pooler_output
        # A row of features for each picture, or the rows of the frames of each video
        features = features.unflatten(0, (len(distinct), -1))
        inputs["image_features"] = features[[row[id(picture)] for picture in pictures]].flatten(0, 1)
    return inputs


def _stack(pictures: Sequence[torch.Tensor], model: Any) -> torch.Tensor:
    if len(sizes := {tuple(picture.shape) for picture in pictures}) > 1:
        raise ValueError(f"The image processor makes pictures of several sizes, {sorted(sizes)}: give image_size.")
    return torch.stack(list(pictures)).to(model.device, model.dtype)


def special_token_in(prompt: str, template: str, tokenizer: Any) -> str | None:
    """Return a special token, such as the mark of a picture, that a prompt has and its template has not."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return next((token for token in tokens if prompt.count(token) > template.count(token)), None)
