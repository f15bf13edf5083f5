"""A web page for models: captions with scores, answers, search in a folder, and where a model looks."""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from .attention_maps import overlay, text_heat_map
from .captioning import answer_questions, caption_images
from .data.image_size import own_image_size, with_image_size
from .jobs.errors import describe
from .models.image_loading import load_image
from .models.modeling_blip2 import Blip2ForConditionalGeneration
from .models.modeling_image_text import Blip2ImageTextPreTrainedModel
from .models.processing_blip2 import Blip2Processor
from .search import SearchIndex


MAX_FILE_SIZE = "20mb"
_SECONDS_KEPT = 600  # until an upload is deleted
_MOST_CAPTIONS, _MOST_BEAMS = 5, 8
_MOST_SIDE, _THUMBNAIL = 1024, 480  # of a drawing and of what was found, in pixels
# Nothing is fetched from elsewhere, fonts least of all
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
CSS = """
.gradio-container {max-width: 1100px !important; margin: 0 auto !important}
@media (max-width: 640px) {.grid-container {grid-template-columns: repeat(2, 1fr) !important}}
"""
_TITLE = "# BLIP-2\nGive a picture, or click one, then choose what to do with it."


def caption_with_scores(
    model: Blip2ForConditionalGeneration, processor: Blip2Processor, image: Any, num_beams: int, num_captions: int
) -> list[tuple[str, float]]:
    r"""
    Write captions of a picture by beam search.

    Args:
        model ([`Blip2ForConditionalGeneration`]):
            The model.
        processor ([`Blip2Processor`]):
            Its processor. Captions go on from its `prompt`, if it has one.
        image:
            Anything that [`~image_loading.load_image`] takes.
        num_beams (`int`):
            Beams of the search, at least as many as captions.
        num_captions (`int`):
            Captions to return.

    Returns:
        `list[tuple[str, float]]`: each caption, the likeliest first, with the geometric mean of the probabilities of
        its tokens and of its end.
    """
    options = {"num_beams": num_beams, "num_captions": num_captions, "do_sample": False}
    (found,) = caption_images(model, processor, [image], with_confidence=True, **options)
    if found.error is not None:
        raise ValueError(found.error)
    return list(zip(found.texts, found.confidences, strict=True))


def look_for(
    model: Blip2ImageTextPreTrainedModel, processor: Blip2Processor, image: Any, text: str
) -> tuple[Image.Image, float]:
    r"""
    Draw over a picture where a model looks for a text.

    Args:
        model ([`Blip2ForImageTextRetrieval`] or [`Blip2ForPreTraining`]):
            The model.
        processor ([`Blip2Processor`]):
            Its processor.
        image:
            Anything that [`~image_loading.load_image`] takes.
        text (`str`):
            A word or a sentence.

    Returns:
        `tuple[PIL.Image.Image, float]`: the drawing, and the probability that the text fits the picture.
    """
    picture = load_image(image)
    tokenizer = processor.qformer_tokenizer or processor.tokenizer
    tokens = tokenizer([text], split_special_tokens=True, truncation=True, return_tensors="pt").to(model.device)
    given = tokens["input_ids"], tokens["attention_mask"]
    # The whole picture, because a map over a part of it would lie in the wrong place
    side = max(own_image_size(processor.image_processor).values())
    image_processor = with_image_size(processor.image_processor, side)
    pixel_values = image_processor(images=[picture], return_tensors="pt")["pixel_values"]
    pixel_values = pixel_values.to(model.device, model.dtype)
    heat_map = text_heat_map(model, *given, pixel_values)[0]
    with torch.inference_mode():
        match = model.get_matching_logits(*given, pixel_values=pixel_values).softmax(dim=-1)[0, 1].item()
    drawing = picture.copy()
    drawing.thumbnail((_MOST_SIDE, _MOST_SIDE))
    return overlay(drawing, heat_map), match


def make_page(
    captioner: tuple[Blip2ForConditionalGeneration, Blip2Processor] | None = None,
    retriever: tuple[Blip2ImageTextPreTrainedModel, Blip2Processor] | None = None,
    index: SearchIndex | None = None,
    examples: Sequence[Path] = (),
) -> gr.Blocks:
    r"""
    Make the page. It has what the models can do.

    Args:
        captioner (`tuple` of a model and its processor, *optional*):
            Writes captions and answers.
        retriever (`tuple` of a model and its processor, *optional*):
            Shows where it looks for a text.
        index ([`SearchIndex`], *optional*):
            Is searched.
        examples (sequence of `Path`, *optional*):
            Pictures to click.

    Returns:
        `gradio.Blocks`, for [`launch`].
    """
    with gr.Blocks(title="BLIP-2", delete_cache=(_SECONDS_KEPT, _SECONDS_KEPT), analytics_enabled=False) as page:
        gr.Markdown(_TITLE)
        if captioner is not None or retriever is not None:
            with gr.Row():
                with gr.Column(min_width=300):
                    picture = gr.Image(type="filepath", sources=["upload", "clipboard"], label="Picture", height=320)
                    # gradio would convert an upload to RGB in its own way
                    picture.preprocess = _upload_path
                    if examples:
                        gr.Examples([[str(path)] for path in examples], picture, label="Pictures to click")
                with gr.Column(min_width=300):
                    if captioner is not None:
                        _add_caption(*captioner, picture)
                        _add_ask(*captioner, picture)
                    if retriever is not None:
                        _add_look(*retriever, picture)
        if index is not None:
            _add_search(index)
    return page


def launch(page: gr.Blocks, **kwargs):
    r"""
    Serve the page.

    Args:
        page (`gradio.Blocks`):
            What [`make_page`] returned.
        kwargs:
            Arguments of `gradio.Blocks.launch`, such as `server_port`.

    Returns:
        What `gradio.Blocks.launch` returns.
    """
    return page.launch(
        max_file_size=MAX_FILE_SIZE,
        show_error=True,
        theme=gr.themes.Soft(**FONTS),
        css=CSS,
        footer_links=[],
        **kwargs,
    )


def _on_click(button: gr.Button, function: Callable, inputs: list, outputs: list, api_name: str, *also: Any):
    """Run a function at a click and at the events of `also`, one at a time. Its errors are shown on the page."""

    @functools.wraps(function)
    def run(*values):
        try:
            return function(*values)
        except (OSError, RuntimeError, ValueError) as error:
            message = describe(error)
            for value in values:
                if isinstance(value, str) and os.path.isabs(value):
                    # The name of an upload, and not the folder that it lies in
                    message = message.replace(value, os.path.basename(value))
            raise gr.Error(message, print_exception=False) from error

    gr.on([button.click, *also], run, inputs, outputs, api_name=api_name, concurrency_limit=1, concurrency_id="model")


def _upload_path(payload: Any) -> str | None:
    """Return where an upload lies, unopened, because this library's way to read pictures is to be the only one."""
    return None if payload is None else payload.path


def _given(picture: str | None, text: str | None = None) -> str:
    """Refuse what is missing."""
    if picture is None:
        raise ValueError("There is no picture. Upload one.")
    if not os.path.exists(picture):
        raise ValueError("The picture is no longer here. Upload it again.")
    if text is not None and not text.strip():
        raise ValueError("The text is empty. Write something first.")
    return picture


def _add_caption(model: Any, processor: Any, picture: gr.Image):
    def write(picture: str | None, num_beams: float, num_captions: float) -> list[list[str]]:
        num_captions = int(num_captions)
        found = caption_with_scores(model, processor, _given(picture), max(int(num_beams), num_captions), num_captions)
        return [[text, f"{score:.0%}"] for text, score in found]

    with gr.Tab("Caption"):
        beams = gr.Slider(1, _MOST_BEAMS, 5, step=1, label="Beams")
        captions = gr.Slider(1, _MOST_CAPTIONS, 3, step=1, label="Captions")
        button = gr.Button("Write captions", variant="primary")
        table = gr.Dataframe(
            headers=["Caption", "Certainty"],
            column_widths=["75%", "25%"],
            wrap=True,
            interactive=False,
            label="Captions",
        )
        gr.Markdown("Certainty is the mean probability of a caption's tokens and of its end.")
        _on_click(button, write, [picture, beams, captions], [table], "caption")


def _add_ask(model: Any, processor: Any, picture: gr.Image):
    def answer(picture: str | None, question: str) -> str:
        (found,) = answer_questions(model, processor, [_given(picture, question)], [question])
        if found.error is not None:
            raise ValueError(found.error)
        return found.texts[0]

    with gr.Tab("Ask"):
        question = gr.Textbox(label="Question", placeholder="what is in the picture?")
        button = gr.Button("Ask", variant="primary")
        text = gr.Textbox(label="Answer", interactive=False)
        _on_click(button, answer, [picture, question], [text], "ask", question.submit)


def _add_look(model: Any, processor: Any, picture: gr.Image):
    def look(picture: str | None, text: str) -> tuple[Image.Image, str]:
        drawing, match = look_for(model, processor, _given(picture, text), text)
        return drawing, f"“{text}” fits the picture with a probability of {match:.0%}."

    with gr.Tab("Where is it looking?"):
        text = gr.Textbox(label="Word or sentence", placeholder="a lemon")
        button = gr.Button("Look", variant="primary")
        drawing = gr.Image(
            label="Yellow: where it looks", buttons=["download", "fullscreen"], height=320, interactive=False
        )
        match = gr.Markdown()
        _on_click(button, look, [picture, text], [drawing, match], "look", text.submit)


def _thumbnail(path: Path) -> Image.Image:
    """Return a small copy of a picture, so that the page has no access to its folder."""
    picture = load_image(path).copy()
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return picture


def _add_search(index: SearchIndex):
    def search(text: str, top: float) -> list[tuple[Image.Image, str]]:
        if not text.strip():
            raise ValueError("The text is empty. Write what to look for.")
        return [(_thumbnail(path), f"{score:.3f}  {path.name}") for path, score in index.search(text, top=int(top))]

    gr.Markdown(f"## Search\n{len(index)} pictures")
    with gr.Row():
        text = gr.Textbox(label="What to look for", placeholder="a strawberry", scale=3, min_width=300)
        top = gr.Slider(1, 24, 8, step=1, label="Pictures", scale=1, min_width=300)
    button = gr.Button("Search", variant="primary")
    gallery = gr.Gallery(
        label="Found, the best first", columns=4, height="auto", object_fit="contain", interactive=False
    )
    _on_click(button, search, [text, top], [gallery], "search", text.submit)


__all__ = ["caption_with_scores", "launch", "look_for", "make_page"]
