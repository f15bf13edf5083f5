"""Messages of a chat with pictures, as text with image tokens and a list of images, and the default chat template."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from .video_loading import Video


IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")
VIDEO_KEYS = ("video", "url", "path")
# Content is a text, in which images are marked, or a list of parts, whose images the processor puts in front
_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.content is string -%}{%- set text = message.content -%}
{%- else -%}
{%- set text = message.content | selectattr("type", "equalto", "text") | map(attribute="text") | join("") -%}
{%- endif -%}
{{- IMAGE * (text.split(IMAGE) | length - 1) -}}
{%- set text = text.replace(IMAGE, "") | trim -%}
{%- if message.role == "assistant" -%}
{{- " " -}}{%- generation -%}{{- text + END -}}{%- endgeneration -%}
{%- elif message.role == "user" -%}
{{- QUESTION.replace("{}", text) if text else CAPTION -}}
{%- elif text -%}
{{- text + " " -}}
{%- endif -%}
{%- endfor -%}"""


def messages_to_text(messages: Iterable, image_token: str, num_frames: int) -> tuple[list[dict], list]:
    r"""
    Write the parts of each message as one text, because chat templates of language models take text.

    Args:
        messages (iterable of `dict`, dataclasses or pydantic models):
            With `role` and `content`: a string, or a list of parts such as `{"type": "text", "text": ...}` and
            `{"type": "image", "image": ...}` (or `url`, `path`, `base64`, or OpenAI's `image_url`), or
            `{"type": "video", "video": ...}` (or `url`, `path`).
        image_token (`str`):
            The token that stands for an image, or for a frame of a video.
        num_frames (`int`):
            Frames of a video.

    Returns:
        `tuple[list[dict], list]`: the messages with text as their content, and the images and
        [`~video_loading.Video`]s in their order.

    Raises:
        ValueError: if a part is neither text nor an image nor a video.
        TypeError: if a message is not a mapping and cannot be converted to one.
    """
    flat: list[dict] = []
    images: list = []
    marks = {"image": image_token, "image_url": image_token, "video": image_token * num_frames}
    for message in map(_as_dict, messages):
        content = message.get("content") or ""
        if not isinstance(content, str):
            parts = [_as_dict(part) for part in content]
            images += [image for part in parts for image in _images(part)]
            content = "".join(
                part.get("text", "") if part["type"] == "text" else marks[part["type"]] for part in parts
            )
        flat.append(message | {"content": content})
    return flat, images


def default_chat_template(question_prompt: str, caption_prompt: str, image_token: str, end: str) -> str:
    r"""
    Write a chat template in the form of prompts: images first, then a question. A message without text asks for a
    caption.

    Args:
        question_prompt (`str`):
            The prompt of questions, with `{}` in the place of the question.
        caption_prompt (`str`):
            The prompt of captions.
        image_token (`str`):
            The token that stands for an image.
        end (`str`):
            What ends an answer.

    Returns:
        `str`: a template in Jinja.

    Example:

    ```python
    >>> template = default_chat_template("Question: {} Answer:", "a photo of", "<image>", "</s>")
    >>> # [{"role": "user", "content": "<image>what is it?"}] becomes "<image>Question: what is it? Answer:"
    ```"""
    names = {"IMAGE": image_token, "END": end, "QUESTION": question_prompt, "CAPTION": caption_prompt}
    return "".join(f"{{%- set {name} = {json.dumps(text)} -%}}\n" for name, text in names.items()) + _TEMPLATE


def is_default_chat_template(template: Any) -> bool:
    """Tell whether a template is one of [`default_chat_template`]."""
    return isinstance(template, str) and template.endswith(_TEMPLATE)


def _images(part: dict) -> list:
    """Return the image of a part in a list, which is empty if the part leaves it to the `images` of the call."""
    kind = part.get("type")
    if kind not in ("text", "image", "image_url", "video"):
        raise ValueError(
            f"A message has a part of type {kind!r}: 'text', 'image' (with 'image', 'url', 'path' or 'base64'), "
            "'image_url' or 'video' (with 'video' or 'path') was expected."
        )
    keys = () if kind == "text" else VIDEO_KEYS if kind == "video" else IMAGE_KEYS
    found = [part[key] for key in keys if part.get(key) is not None][:1]
    if kind == "video":
        return [Video(video) for video in found]
    return [image["url"] if isinstance(image, Mapping) else image for image in found]


def _as_dict(value: Any) -> dict:
    """Return a message or part without its empty fields, because templates only test whether a key is there."""
    if isinstance(value, Mapping):
        fields = value
    elif dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif callable(getattr(value, "model_dump", None)):
        fields = value.model_dump()
    else:
        raise TypeError(
            f"A message, or a part of one, is {value!r} of type {type(value).__name__}: a dict, a dataclass or a "
            "pydantic model was expected."
        )
    return {key: item for key, item in fields.items() if item is not None}
