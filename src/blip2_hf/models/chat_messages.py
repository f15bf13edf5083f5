"""Messages of a chat, with pictures in them, as text with image tokens and the pictures beside it."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any


IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")


def messages_to_text(messages: Iterable, image_token: str) -> tuple[list[dict], list]:
    r"""
    Writes each message's parts as one text, which is what chat templates of language models take.

    Args:
        messages (iterable of `dict`, dataclasses or pydantic models):
            With `role` and `content`: a string, or a list of parts such as `{"type": "text", "text": ...}` and
            `{"type": "image", "image": ...}` (or `url`, `path`, `base64`, or OpenAI's `image_url`).
        image_token (`str`):
            What stands for a picture.

    Returns:
        `tuple[list[dict], list]`: the messages with text as their content, and the pictures in their order.

    Raises:
        ValueError: if a part is neither text nor a picture.
        TypeError: if a message is no mapping and cannot be made one.
    """
    flat, images = [], []
    for message in map(_as_dict, messages):
        content = message.get("content") or ""
        if not isinstance(content, str):
            parts = [_as_dict(part) for part in content]
            images += [picture for part in parts for picture in _pictures(part)]
            content = "".join(part.get("text", "") if part["type"] == "text" else image_token for part in parts)
        flat.append(message | {"content": content})
    return flat, images


def _pictures(part: dict) -> list:
    """The picture of a part, if it names one: a template may leave it to the `images` of the call."""
    if part["type"] not in ("text", "image", "image_url"):
        raise ValueError(
            f"A message has a part of type {part['type']!r}; 'text' and 'image' (with 'image', 'url', 'path' or "
            "'base64') and 'image_url' are understood."
        )
    found = [part[key] for key in IMAGE_KEYS if part["type"] != "text" and part.get(key) is not None][:1]
    return [picture["url"] if isinstance(picture, Mapping) else picture for picture in found]


def _as_dict(value: Any) -> dict:
    """A message or part without its empty fields: templates take a key that is there for one that is filled."""
    if isinstance(value, Mapping):
        fields = value
    elif dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif callable(getattr(value, "model_dump", None)):
        fields = value.model_dump()
    else:
        raise TypeError(
            f"Messages and their parts are dicts, dataclasses or pydantic models; got {type(value).__name__} {value!r}"
        )
    return {key: item for key, item in fields.items() if item is not None}
